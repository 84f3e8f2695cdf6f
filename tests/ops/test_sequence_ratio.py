"""The sequence ratio by hand, against exact sums, and the C++ kernels against the plain formulas."""

import math
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.ops import library
from gspo_megatron.ops import sequence_ratio_reference as reference
from gspo_megatron.ops.sequence_ratio import COLUMNS, TOKEN_COLUMNS, gspo_surrogate, sequence_partials

OPS = torch.ops.gspo_megatron
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
native = pytest.mark.skipif(bool(library.load()), reason=library.load())
E32, E64 = dict(dtype=torch.float32), dict(dtype=torch.float64)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


@contextmanager
def threads(number: int):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_case(lengths: list[int], seed: int = 0, dtype=torch.float32, spread: float = 0.3, padding: int = 0):
    """(new, old, mask, cu_seqlens, entropy, advantages by sequence, advantages by token)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths) + padding
    old = -3 * torch.rand(tokens, generator=generator)
    new = old + spread * torch.randn(tokens, generator=generator)
    mask = (torch.rand(tokens, generator=generator) > 0.3).float()
    entropy = torch.rand(tokens, generator=generator)
    by_sequence = torch.randn(len(lengths), generator=generator, **E64)
    by_token = torch.randn(tokens, generator=generator, **E64)
    return new.to(dtype), old.to(dtype), mask, bounds(*lengths), entropy.to(dtype), by_sequence, by_token


def by_hand():
    """Sequence 0: ln 2, a masked NaN, -2 ln 2; sequence 1 is empty; 2 has one masked token; 1 token of padding."""
    two = math.log(2)
    new = torch.tensor([two, math.nan, -2 * two, -1.0, 50.0], **E64)
    old = torch.tensor([0.0, 1.0, 0.0, -3.0, 0.0], **E64)
    return new, old, torch.tensor([1.0, 0, 1, 0, 1]), bounds(3, 0, 1)


@pytest.fixture(params=[pytest.param("C++", marks=native), "reference"])
def partials(request):
    return OPS.sequence_partials if request.param == "C++" else reference.sequence_partials


def test_partials_by_hand(partials):
    """Sum -ln 2, squares 5 ln^2 2; k3 (2 - 1 - ln 2) + (1/4 - 1 + 2 ln 2) = 1/4 + ln 2; max 2 ln 2.

    A = (3, NaN, -1/2)."""
    two = math.log(2)
    new, old, mask, cu = by_hand()
    entropy = torch.tensor([0.5, math.nan, 0.25, 9, 9], **E64)
    advantages = torch.tensor([3.0, math.nan, -0.5, 9, 9])
    table = partials(new, old, mask, cu, entropy, advantages)
    row = [2, -two, 5 * two**2, 0.25 + two, 2 * two, 0.75, 3, -0.5, 1, 1]
    expected = torch.tensor([row, [0.0] * 10, [0.0] * 10], **E64)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-15)
    assert table.shape[1] == len(COLUMNS + TOKEN_COLUMNS)
    assert torch.equal(partials(new, old, mask, cu, None, None)[:, :5], table[:, :5])


@pytest.mark.parametrize("d", [1e-12, -1e-6, 1e-3, 0.2499, -0.25, 0.2501, -0.34, 0.35, -1.0, 5.0, -40.0, 700.0, -800.0])
def test_k3_keeps_its_digits(partials, d):
    """exp(d) - 1 - d for tiny and large d. 64 tokens, so that whole vectors see it."""
    exact = float(sum(Fraction(d) ** k / math.factorial(k) for k in range(2, 60))) if abs(d) < 1 else math.expm1(d) - d
    table = partials(torch.full((64,), d, **E64), torch.zeros(64, **E64), torch.ones(64), bounds(64), None, None)
    rel = 1e-12 if abs(d) > 1e-2 else 1e-4  # the reference forms expm1(d) - d
    assert table[0, 3].item() == pytest.approx(64 * exact, rel=rel, abs=1e-16 * 64)


@native
@pytest.mark.parametrize("d", [1e-12, -1e-6, 1e-3, -0.01])
def test_k3_of_tiny_log_ratios_in_cpp(d):
    exact = float(sum(Fraction(d) ** k / math.factorial(k) for k in range(2, 20)))
    table = sequence_partials(torch.full((64,), d, **E64), torch.zeros(64, **E64), torch.ones(64), bounds(64))
    assert table[0, 3].item() == pytest.approx(64 * exact, rel=1e-12, abs=0)


def test_overflow_and_not_a_number_show(partials):
    """A trained NaN, infinity or overflow reaches the table and the loss instead of being dropped by a comparison."""
    new = torch.tensor([math.nan] + [0.1] * 9 + [800.0] * 10 + [math.inf] * 2)
    table = partials(new, torch.zeros(22), torch.ones(22), bounds(10, 10, 2), None, None)
    assert table[0, 1:5].isnan().all() and table[1, 3] == math.inf and table[1, 4] == 800 and table[2, 4] == math.inf
    loss = OPS.gspo_forward(new, table[:1], torch.ones(1), torch.ones(22), bounds(10), 0.1, 0.1, 1.0, math.inf)[0]
    assert loss.isnan()


@pytest.mark.parametrize("length", [1, 7, 4096, 4097, 131072])
@pytest.mark.parametrize("kind", ["cancelling", "offset", "noise", "wide"])
def test_the_ratio_against_exact_sums(length, kind):
    """The error of s against math.fsum over the same fp32 numbers, at most 1e-7 for lengths to 128k."""
    generator = torch.Generator().manual_seed(length)
    old = -20 * torch.rand(length, generator=generator)
    sign = 1 - 2 * (torch.arange(length) % 2)
    step = {"cancelling": 1e4 * sign, "offset": torch.full((length,), 3e-4), "wide": 10.0 ** (4 * sign) * sign}
    new = old + step.get(kind, 0.05 * torch.randn(length, generator=generator))
    if kind in ("cancelling", "wide"):  # the two halves nearly cancel, the rest is small
        new = torch.where(torch.arange(length) == 0, old + 0.01, new)
        new[1:] = torch.where(sign[1:] < 0, old[1:] - 1e4, old[1:] + 1e4)
    terms = [a - b for a, b in zip(new.double().tolist(), old.double().tolist(), strict=True)]
    mean = math.fsum(terms) / length
    table = sequence_partials(new, old, torch.ones(length), bounds(length))
    got = (table[0, 1] / table[0, 0]).item()
    assert abs(math.expm1(got - mean)) <= 1e-7
    assert table[0, 0] == length


def surrogate(new, old, mask, cu, advantages, low=0.1, high=0.2, denominator=1.0):
    token = advantages if advantages.numel() != cu.numel() - 1 else None
    return gspo_surrogate(
        new, sequence_partials(new, old, mask, cu, None, token), advantages, mask, cu, low, high, denominator
    )


@pytest.mark.parametrize("mask_dtype", reference.MASKS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_loss_and_gradient_by_hand(dtype, mask_dtype):
    """d = 1, 0, (masked), A = -1: s = exp(1/2), not clipped; loss s / 2, slope s / 4 with denominator 2."""
    new = torch.tensor([0.0, -1.0, -2.0, 5.0], dtype=dtype, requires_grad=True)
    old = torch.tensor([-1.0, -1.0, 7.0, 0.0], dtype=dtype)
    mask = torch.tensor([1, 1, 0, 1]).to(mask_dtype)
    loss, ratios, clipped = surrogate(new, old, mask, bounds(3), torch.tensor([-1.0]), denominator=2.0)
    s = math.exp(0.5)
    assert loss.item() == pytest.approx(s / 2, abs=1e-15) and ratios.item() == pytest.approx(s, abs=1e-15)
    assert clipped.tolist() == [[0, 0]] and not ratios.requires_grad and not clipped.requires_grad
    (grad,) = torch.autograd.grad(loss, new)
    assert grad.dtype == dtype and grad.tolist() == torch.tensor([s / 4, s / 4, 0, 0], **E64).to(dtype).tolist()


@native
@pytest.mark.parametrize("new_dtype", FLOATS)
@pytest.mark.parametrize("old_dtype", FLOATS)
def test_every_pair_of_types_reads_every_number(new_dtype, old_dtype):
    """Subnormal, largest and ordinary numbers of each type, against torch's own conversion."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(333, generator=generator) * 10.0 ** torch.randint(-7, 4, (333,), generator=generator)
    new, old = values.to(new_dtype), values.flip(0).to(old_dtype)
    for mask in (torch.ones(333), torch.ones(333, dtype=torch.bool), torch.ones(333, **E64)):
        got = sequence_partials(new, old, mask, bounds(1, 7, 325), new, values)
        want = reference.sequence_partials(new, old, mask, bounds(1, 7, 325), new, values)
        keep = [0, 1, 2, 4, 5, 6, 7, 8, 9]  # k3 overflows here
        torch.testing.assert_close(got[:, keep], want[:, keep], rtol=1e-13, atol=1e-13)


@native
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_are_rounded_as_torch_rounds(dtype):
    """Advantages over 20 orders of magnitude: ties, subnormals and overflow of fp16 and bf16."""
    advantages = torch.cat([s * 2.0 ** torch.linspace(-40, 30, 5000, **E64) for s in (1, -1)])
    advantages[:3] = torch.tensor([0.0, 1 + 2.0**-9, 1 + 2.0**-12])
    args = (torch.ones((), **E64), torch.ones(1, 2, **E64), advantages, torch.ones(10000), bounds(10000), 1.0, dtype)
    assert torch.equal(OPS.gspo_backward(*args), reference.gspo_backward(*args))


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 7, 8, 9, 31, 33, 100, 4095, 4096, 4097, 9000]), max_size=7)


@native
@given(
    LENGTHS, st.integers(0, 99), st.sampled_from([0.01, 1.0, 30.0]), st.sampled_from([0, 5]), st.sampled_from(FLOATS)
)
@settings(max_examples=60, deadline=None)
def test_cpp_equals_the_reference(lengths, seed, spread, padding, dtype):
    new, old, mask, cu, entropy, by_sequence, by_token = random_case(lengths, seed, dtype, spread, padding)
    for advantages in (by_sequence, by_token):
        token = advantages if advantages.numel() != len(lengths) else None
        inputs = (new, old, mask, cu, entropy, token)
        table = OPS.sequence_partials(*inputs)
        torch.testing.assert_close(table, reference.sequence_partials(*inputs), rtol=1e-11, atol=1e-11)
        for dual in (math.inf, 1.2):
            inputs = (new, table, advantages, mask, cu, 0.05, 0.1, 3.0, dual)
            got, want = OPS.gspo_forward(*inputs), reference.gspo_forward(*inputs)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        inputs = (torch.tensor(1.5, **E64), got[3], token, mask, cu, 3.0, torch.float64)
        back = OPS.gspo_backward(*inputs)
        torch.testing.assert_close(back, reference.gspo_backward(*inputs), rtol=1e-12, atol=1e-14)


@native
@pytest.mark.parametrize("lengths", [[1_000_000], [16] * 9000, [1, 0, 300_000, 5, 70_001, 0], [4096] * 40])
def test_the_bits_do_not_depend_on_threads_or_neighbours(lengths):
    new, old, mask, cu, entropy, by_sequence, by_token = random_case(lengths, 3)
    results = []
    for number in (1, 2, 3):
        with threads(number):
            table = sequence_partials(new, old, mask, cu, entropy, by_token)
            forward = OPS.gspo_forward(new, table, by_sequence, mask, cu, 0.01, 0.01, 7.0, 3.0)
            results.append((table, *forward))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    start, end = int(cu[-2]), int(cu[-1])  # the last sequence alone, at another alignment
    alone = [x[start:end].clone() for x in (new, old, mask, entropy, by_token)]
    row = sequence_partials(alone[0], alone[1], alone[2], bounds(end - start), alone[3], alone[4])
    assert torch.equal(row[0], results[0][0][-1])


def test_a_million_tokens():
    new, old, mask, cu, _, _, _ = random_case([1_000_000], 5)
    loss, ratios, _ = surrogate(new.requires_grad_(), old, mask, cu, torch.ones(1, **E64))
    assert ratios.item() == pytest.approx(math.exp(((new - old).detach().double() * mask).sum() / mask.sum()), rel=1e-7)
    assert torch.autograd.grad(loss, new)[0].count_nonzero() == mask.sum()


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0], [1]])
def test_nothing_and_almost_nothing(lengths):
    new, old, mask, cu, _, by_sequence, _ = random_case(lengths, padding=2)
    mask[-2:] = 1  # trained padding belongs to nobody
    loss, ratios, clipped = surrogate(new.requires_grad_(), old, mask, cu, by_sequence)
    (grad,) = torch.autograd.grad(loss, new)
    assert ratios.shape == (len(lengths),) and clipped.shape == (len(lengths), 2) and not grad[-2:].any()
    assert loss.isfinite() and grad.shape == new.shape
    empty = surrogate(new[:0], old[:0], mask[:0], bounds(), by_sequence[:0])
    assert empty[0].item() == 0


def test_inputs_need_not_be_contiguous():
    new, old, mask, cu, entropy, by_sequence, by_token = random_case([5, 90, 33], 2)
    spread = [torch.stack([x, x + 1], dim=1)[:, 0] for x in (new, old, mask, entropy, by_token)]
    table = sequence_partials(spread[0], spread[1], spread[2], torch.stack([cu, cu], dim=1)[:, 0], *spread[3:])
    assert torch.equal(table, sequence_partials(new, old, mask, cu, entropy, by_token))
    one = torch.ones(1).expand(128)
    for advantages, strided in ((by_sequence, by_sequence), (by_token, spread[4])):
        leaves = [x.detach().requires_grad_() for x in (new, spread[0])]
        want = torch.autograd.grad(surrogate(leaves[0], old, one.clone(), cu, advantages)[0], leaves[0])[0]
        got = torch.autograd.grad(surrogate(leaves[1], spread[1], one, cu, strided)[0], leaves[1])[0]
        assert torch.equal(got, want)


@pytest.mark.parametrize("by_token", [False, True])
def test_gradcheck(by_token):
    """With one advantage a sequence GSPO-token's value is GSPO's, so finite differences hold for both."""
    new, old, mask, cu, _, advantages, _ = random_case([3, 0, 5, 1, 4], 6, torch.float64)
    if by_token:
        advantages = torch.cat([torch.repeat_interleave(advantages, cu.diff()), advantages.new_zeros(0)])
    assert torch.autograd.gradcheck(lambda x: surrogate(x, old, mask, cu, advantages)[0], (new.requires_grad_(),))


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(by_token, dtype):
    new, old, mask, cu, entropy, by_sequence, token = random_case([3, 0, 5], 7, dtype)
    token = token if by_token else None
    torch.library.opcheck(OPS.sequence_partials.default, (new, old, mask, cu, entropy, token))
    table = sequence_partials(new, old, mask, cu, entropy, token)
    advantages = token if by_token else by_sequence
    new.requires_grad_()
    torch.library.opcheck(OPS.gspo_forward.default, (new, table, advantages, mask, cu, 0.1, 0.2, 2.0, 3.0))
    slopes = torch.ones(3, 2, **E64)
    torch.library.opcheck(OPS.gspo_backward.default, (torch.ones((), **E64), slopes, token, mask, cu, 2.0, dtype))


def test_status_says_what_runs():
    status = library.status()
    assert set(status) == {*library.OPS, "reduce_tables", "publish"} and len(library.OPS) == 5
    wanted = "PyTorch formulas" if library.load() else "C++ ("
    assert all(status[op].startswith(wanted) for op in library.OPS)
    wanted = "C++" if library.load_collectives()[0] else "torch.distributed: "
    assert all(status[op].startswith(wanted) for op in library.COLLECTIVES)


@native
def test_status_names_cuda_kernels_where_they_exist():
    """Registered here as the CUDA library does; without a GPU nothing calls them."""
    had = library.has_cuda()
    assert all(library.status()[op].endswith(", CUDA") == had for op in library.OPS)
    if not had:
        with torch.library._scoped_library("gspo_megatron", "IMPL") as scope:
            for op in library.OPS:
                scope.impl(op, lambda *inputs: None, "CUDA")
            assert library.has_cuda() and all(library.status()[op].endswith("), CUDA") for op in library.OPS)
        assert not library.has_cuda()
