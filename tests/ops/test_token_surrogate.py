"""The surrogate clipped by token: by hand, at extremes, by finite differences, and its errors, in C++ and formulas."""

import math

import pytest
import torch

from gspo_megatron.ops import token_surrogate_reference as reference
from gspo_megatron.ops.sequence_ratio import sequence_partials
from gspo_megatron.ops.token_surrogate import COLUMNS, token_objectives
from tests.ops.test_sequence_ratio import E64, OPS, bounds, native, random_case

INF, NAN = math.inf, math.nan


@pytest.fixture(params=[pytest.param("C++", marks=native), "reference"])
def ops(request):
    return OPS if request.param == "C++" else reference


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, **E64)


# Ratios 1.1 and 1.5 with A = 2; none; 0.5, 0.9 and 1.5 with A = -1; what is masked or padding is not-a-number.
NEW = column(NAN, math.log(1.1), math.log(1.5), NAN, math.log(0.5), math.log(0.9), math.log(1.5), NAN)
MASK = column(0, 1, 1, 0, 1, 1, 1, 1)
CU = bounds(4, 0, 3)


@pytest.mark.parametrize("by_token", [False, True])
def test_objective_slopes_and_counts_by_hand(ops, by_token):
    """Clip 0.2 / 0.28, dual 1.4: 1.1 * 2 + 1.28 * 2 = 4.76, one clipped above; 0.8 * -1 (clipped below: min(-0.5,
    -0.8)) - 0.9 - 1.4 (the dual bound takes 1.5) = -3.1. Slopes r A where not clipped, times grad 3, 7 and -5."""
    advantages = column(NAN, 2, 2, NAN, -1, -1, -1, NAN) if by_token else column(2, NAN, -1)
    old, entropy = torch.zeros(8, **E64), column(NAN, 0.5, 0.25, NAN, 1, 2, 4, NAN)
    inputs = (NEW, old, MASK, CU)
    objective, table = ops.token_surrogate_forward(*inputs, entropy, advantages, 0.2, 0.28, 1.4)
    torch.testing.assert_close(objective, column(4.76, 0, -3.1), rtol=0, atol=1e-15)
    assert torch.equal(table[:, -1], objective) and table.shape == (3, len(COLUMNS))
    assert table[:, 6:8].tolist() == [[0, 1], [0, 0], [1, 1]]
    assert table[:, 0].tolist() == [2, 0, 3] and table[:, 5].tolist() == [0.75, 0, 7]
    slopes = ops.token_surrogate_backward(column(3, 7, -5), *inputs, advantages, 0.2, 0.28, 1.4)
    torch.testing.assert_close(slopes, column(0, 6.6, 0, 0, 0, 4.5, 0, 0), rtol=0, atol=2e-15)


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize(
    ("d", "advantage", "dual", "objective", "slope"),
    [
        (800, 1, INF, 1.28, 0),  # infinite, and clipped
        (INF, 1, INF, 1.28, 0),
        (INF, 0, INF, 0, 0),  # infinite, without weight
        (INF, -1, INF, -INF, -INF),  # infinite, and nothing bounds it
        (INF, -1, 3.0, -3, 0),
        (709.9, -1, INF, -INF, -INF),
        (-800, 1, INF, 0, 0),
        (-INF, 1, INF, 0, 0),
        (-INF, -1, INF, -0.8, 0),
        (NAN, 0, INF, 0, 0),
        (NAN, 1, INF, NAN, NAN),
        (NAN, -1, 3.0, NAN, NAN),
        (0.1, NAN, 3.0, NAN, NAN),
        (INF, NAN, 3.0, NAN, NAN),
    ],
)
def test_extreme_ratios(ops, d, advantage, dual, objective, slope, count):
    """One token, and many of which whole registers are filled: a NaN comes out where one goes in, and nowhere else."""
    inputs = (torch.full((count,), float(d), **E64), torch.zeros(count, **E64), torch.ones(count), bounds(count))
    advantages = torch.full((count,) if count > 1 else (1,), float(advantage), **E64)
    got, _ = ops.token_surrogate_forward(*inputs, None, advantages, 0.2, 0.28, dual)
    torch.testing.assert_close(got, column(objective) * count, rtol=1e-14, atol=0, equal_nan=True)
    slopes = ops.token_surrogate_backward(column(1.0), *inputs, advantages, 0.2, 0.28, dual)
    torch.testing.assert_close(slopes, torch.full((count,), float(slope), **E64), rtol=0, atol=0, equal_nan=True)


def test_ratios_on_a_bound_keep_their_gradient(ops):
    """exp(0) = 1 with clip 0 / 0 and dual 1 is on every bound and beyond none."""
    inputs = (torch.zeros(2), torch.zeros(2), torch.ones(2), bounds(1, 1))
    assert ops.token_surrogate_forward(*inputs, None, column(3, -2), 0.0, 0.0, 1.0)[1][:, 6:].tolist() == [
        [0, 0, 3],
        [0, 0, -2],
    ]
    assert ops.token_surrogate_backward(column(1, 1), *inputs, column(3, -2), 0.0, 0.0, 1.0).tolist() == [3, -2]


def test_the_ratio_keeps_its_digits(ops):
    """exp(d) to 4 units in the last place over its whole range, as the slope of A = 1 without an upper bound."""
    generator = torch.Generator().manual_seed(3)
    d = torch.cat([1400 * torch.rand(4000, generator=generator, **E64) - 700, torch.linspace(-1, 1, 4001, **E64)])
    size = d.numel()
    inputs = (d, torch.zeros(size, **E64), torch.ones(size), bounds(size))
    slopes = ops.token_surrogate_backward(column(1.0), *inputs, column(1.0), 0.2, INF, INF)
    exact = column(*[math.exp(x) for x in d.tolist()])
    torch.testing.assert_close(slopes, exact, rtol=4 * 2.0**-52, atol=0)


def test_the_other_columns_are_those_of_the_sequence_ratio():
    new, old, mask, cu, entropy, _, by_token = random_case([5, 9000, 0, 4096, 1], 8, padding=3)
    mask[-1] = 0
    new[-1] = NAN
    _, table = token_objectives(new, old, mask, cu, entropy, by_token, 0.1, 0.2)
    torch.testing.assert_close(table[:, :6], sequence_partials(new, old, mask, cu, entropy), rtol=1e-12, atol=1e-12)
    assert not token_objectives(new, old, mask, cu, None, by_token, 0.1, 0.2)[1][:, 5].any()


def test_a_trained_nan_reaches_every_sum(ops):
    new = torch.tensor([0.1] * 9 + [NAN] + [0.2] * 10)
    _, table = ops.token_surrogate_forward(
        new, torch.zeros(20), torch.ones(20), bounds(10, 10), None, column(1, 1), 0.1, 0.2, INF
    )
    assert table[0, [1, 2, 3, 4, 8]].isnan().all() and not table[1].isnan().any()


def results(new, old, mask, cu, entropy, advantages):
    """(table, gradient of 1, 2, 3, ... times the objectives)."""
    new = new.clone().requires_grad_()
    objective, table = token_objectives(new, old, mask, cu, entropy, advantages, 0.05, 0.1, 3.0)
    return table, torch.autograd.grad((objective * torch.arange(1, cu.numel())).sum(), new)[0]


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]])
def test_nothing_and_almost_nothing(ops, lengths):
    new, old, mask, cu, _, by_sequence, _ = random_case(lengths, padding=2)
    mask[-2:] = 1  # trained padding belongs to nobody
    clip = (0.1, 0.2, INF)
    objective, table = ops.token_surrogate_forward(new, old, mask, cu, None, by_sequence, *clip)
    slopes = ops.token_surrogate_backward(torch.ones_like(objective), new, old, mask, cu, by_sequence, *clip)
    assert objective.shape == (len(lengths),) and table.shape == (len(lengths), 9) and table.isfinite().all()
    assert slopes.shape == new.shape and not slopes[-2:].any()
    objective, _ = ops.token_surrogate_forward(new[:0], old[:0], mask[:0], bounds(), None, by_sequence[:0], *clip)
    assert objective.shape == (0,)


def test_inputs_need_not_be_contiguous():
    new, old, mask, cu, entropy, by_sequence, by_token = random_case([5, 90, 33], 2)
    spread = [torch.stack([x, x + 1], dim=1)[:, 0] for x in (new, old, mask, entropy, by_token, by_sequence)]
    strided = torch.stack([cu, cu], dim=1)[:, 0]
    for advantages, other in ((by_token, spread[4]), (by_sequence, spread[5])):
        want = results(new, old, mask, cu, entropy, advantages)
        leaf = spread[0].detach().requires_grad_()
        objective, table = token_objectives(*(leaf, *spread[1:3], strided, spread[3], other), 0.05, 0.1, 3.0)
        got = torch.autograd.grad((objective * torch.arange(1, 4)).sum(), leaf)[0]
        assert torch.equal(table, want[0]) and torch.equal(got, want[1])


@pytest.mark.parametrize("by_token", [False, True])
def test_the_slope_is_the_derivative_of_the_objective(ops, by_token):
    """Central differences of step h in fp64, error O(h^2); no ratio is within 1e-3 of a bound."""
    new, old, mask, cu, _, by_sequence, advantages = random_case([3, 0, 5, 1, 40], 6, torch.float64)
    clip, h = (0.05, 0.1, 1.4), 1e-5
    advantages = advantages if by_token else by_sequence
    ratio = (new - old).exp()
    assert min((ratio - b).abs().min() for b in (0.95, 1.1, 1.4)) > 1e-3
    grad = column(1, 2, -3, 4, 5)

    def value(x):
        return ops.token_surrogate_forward(x, old, mask, cu, None, advantages, *clip)[0] @ grad

    steps = h * torch.eye(new.numel(), **E64)
    want = torch.stack([(value(new + step) - value(new - step)) / (2 * h) for step in steps])
    got = ops.token_surrogate_backward(grad, new, old, mask, cu, advantages, *clip)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    assert 5 < got.count_nonzero() < mask.sum()  # some are clipped


@pytest.mark.parametrize("by_token", [False, True])
def test_gradcheck(by_token):
    """Through autograd, as the losses use it; the table carries no gradient."""
    new, old, mask, cu, entropy, by_sequence, token = random_case([3, 0, 5, 1, 4], 6, torch.float64)
    advantages = token if by_token else by_sequence

    def objective(x):
        return token_objectives(x, old, mask, cu, entropy, advantages, 0.05, 0.1, 1.4)[0]

    assert torch.autograd.gradcheck(objective, (new.requires_grad_(),))
    assert not token_objectives(new, old, mask, cu, entropy, advantages, 0.05, 0.1)[1].requires_grad


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(by_token, dtype):
    new, old, mask, cu, entropy, by_sequence, token = random_case([3, 0, 5], 7, dtype)
    advantages = token if by_token else by_sequence
    new.requires_grad_()
    clip = (0.1, 0.2, 3.0)
    torch.library.opcheck(OPS.token_surrogate_forward.default, (new, old, mask, cu, entropy, advantages, *clip))
    inputs = (torch.ones(3, **E64), new.detach(), old, mask, cu, advantages, *clip)
    torch.library.opcheck(OPS.token_surrogate_backward.default, inputs)


def test_nothing_of_token_size_is_kept_for_the_backward_but_inputs():
    new, old, mask, cu, entropy, _, by_token = random_case([100, 100])
    inputs = (new.requires_grad_(), old, mask, cu, entropy, by_token)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        token_objectives(*inputs, 0.1, 0.2)
    assert kept and {x.data_ptr() for x in kept} <= {x.data_ptr() for x in inputs}


WRONG = [
    ({"new": torch.zeros(4, dtype=torch.int64)}, TypeError, "logp_new is .*expected fp32, fp64, bf16 or fp16"),
    ({"old": torch.zeros(4, dtype=torch.complex64)}, TypeError, "logp_old is"),
    ({"old": torch.zeros(3)}, ValueError, r"logp_old has shape \[3\]; expected \[4\]"),
    ({"mask": torch.ones(4, dtype=torch.int64)}, TypeError, "mask is .*expected bool, uint8, fp32 or fp64"),
    ({"cu": torch.tensor([0, 4])}, TypeError, "cu_seqlens is .*expected int32"),
    ({"cu": torch.tensor([0, 3, 2, 4]).int()}, ValueError, r"cu_seqlens\[2\] = 2 is less than cu_seqlens\[1\] = 3"),
    ({"cu": torch.tensor([0, 5]).int()}, ValueError, "cu_seqlens ends at 5 but there are 4 tokens"),
    ({"entropy": torch.zeros(4).long()}, TypeError, "entropy is"),
    ({"entropy": torch.zeros(5)}, ValueError, r"entropy has shape \[5\]"),
    ({"advantages": torch.zeros(1).half()}, TypeError, "advantages is .*expected fp32 or fp64"),
    (
        {"advantages": torch.zeros(3)},
        ValueError,
        r"advantages has shape \[3\]; expected \[1\], one a sequence, or \[4\]",
    ),
    ({"advantages": torch.zeros(1, device="meta")}, ValueError, "advantages is on meta; .*on one device"),
    ({"old": torch.zeros(4, device="meta")}, ValueError, "on one device"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_inputs_are_named(ops, change, error, message):
    inputs = {"new": torch.zeros(4), "old": torch.zeros(4), "mask": torch.ones(4), "cu": bounds(4), "entropy": None}
    inputs = inputs | {"advantages": torch.zeros(4)} | change
    with pytest.raises(error, match=message):
        ops.token_surrogate_forward(*inputs.values(), 0.1, 0.1, INF)
    if "entropy" not in change:
        inputs.pop("entropy")
        with pytest.raises(error, match=message):
            ops.token_surrogate_backward(column(1.0), *inputs.values(), 0.1, 0.1, INF)


@pytest.mark.parametrize("grad", [torch.ones(2, **E64), torch.ones(1), torch.ones(1, 1, **E64)])
def test_a_wrong_gradient_is_named(ops, grad):
    inputs = (torch.zeros(4), torch.zeros(4), torch.ones(4), bounds(4), column(1.0))
    with pytest.raises(ValueError, match=r"grad must be \[1\] fp64 on cpu"):
        ops.token_surrogate_backward(grad, *inputs, 0.1, 0.1, INF)
