"""Padded [B, L] tensors give the loss and the gradient of packed ones, and misfits are named as they are called."""

import dataclasses
import math
import warnings

import pytest
import torch
from markdown_it import MarkdownIt

import gspo_megatron
from gspo_megatron.algorithms import LOSSES
from gspo_megatron.algorithms.interface import ClipRange, GlobalCounts, LossInputs, LossOptions
from gspo_megatron.algorithms.supervised import supervised_loss
from tools.validation.launching import ROOT

E64 = {"dtype": torch.float64}
EVERY = LossOptions(
    ClipRange(0.2, 0.3, 2.5), kl_coef=0.1, entropy_coef=0.05, mismatch="sequence_truncated", mismatch_threshold=1.5
)
FIELDS = ("logprobs", "old_logprobs", "entropy", "ref_logprobs", "rollout_logprobs")
# Two sequences of up to 3 tokens. Mean log-ratios (0.1 - 0.1 + 0) / 3 = 0 and (0 - 0.2) / 2 = -0.1.
NEW = [[-1.0, -2.0, -0.5], [-0.7, -1.2, 9.0]]
OLD = [[-1.1, -1.9, -0.5], [-0.7, -1.0, math.nan]]
MASK = [[1, 1, 1], [1, 1, 0]]


def small(**changes) -> LossInputs:
    """The two sequences, with advantages 1 and -1."""
    given = {
        "logprobs": torch.tensor(NEW, **E64, requires_grad=True),
        "old_logprobs": torch.tensor(OLD, **E64),
        "loss_mask": torch.tensor(MASK),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    return LossInputs.padded(**given | changes)


def check_small(loss: torch.Tensor, logprobs: torch.Tensor) -> None:
    """s = 1 and e^-0.1, both inside 0.8 to 1.2: the loss is -(1 * 1 - 1 * e^-0.1) / 2. Slopes are -s A / (2 |y|): -1/6
    at each of three tokens, e^-0.1 / 4 at each of two, 0 at padding."""
    s = math.exp(-0.1)
    assert loss.item() == pytest.approx(-(1 - s) / 2, abs=1e-7)
    slopes = [[-1 / 6] * 3, [s / 4, s / 4, 0.0]]
    torch.testing.assert_close(logprobs.grad.double(), torch.tensor(slopes, **E64), rtol=1e-6, atol=1e-8)


def test_gspo_by_hand():
    logprobs = torch.tensor(NEW, **E64, requires_grad=True)
    out = gspo_megatron.gspo_loss(small(logprobs=logprobs), LossOptions(ClipRange(0.2, 0.2)))
    out.loss.backward()
    check_small(out.loss, logprobs)
    assert out.table.column("num_tokens").tolist() == [3, 2]


def test_the_documents_example_runs():
    """The code of docs/algorithms.md, with the numbers above."""
    tokens = MarkdownIt("commonmark").parse((ROOT / "docs/algorithms.md").read_text(encoding="utf-8"))
    (code,) = [token.content for token in tokens if token.type == "code_block" and "LossInputs.padded" in token.content]
    names: dict = {}
    exec(code, names)
    check_small(names["out"].loss, names["logprobs"])


@pytest.mark.parametrize("mask", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16])
def test_masks_of_any_type(mask):
    out = gspo_megatron.gspo_loss(small(loss_mask=torch.tensor(MASK).to(mask)), LossOptions(ClipRange(0.2, 0.2)))
    assert out.loss.item() == pytest.approx(-(1 - math.exp(-0.1)) / 2, abs=1e-15)


def test_without_old_log_probs_the_ratio_is_one():
    """Value -(1 - 1) / 2, and the gradient does not flow into the old ones: -A / (2 |y|)."""
    logprobs = torch.tensor(NEW, **E64, requires_grad=True)
    out = gspo_megatron.gspo_loss(small(logprobs=logprobs, old_logprobs=None), LossOptions(ClipRange(0.2, 0.2)))
    out.loss.backward()
    assert out.loss.item() == 0.0
    torch.testing.assert_close(logprobs.grad, torch.tensor([[-1 / 6] * 3, [0.25, 0.25, 0.0]], **E64))


def ragged(seed: int, by_token: bool) -> tuple[LossInputs, LossInputs, torch.Tensor]:
    """(padded, packed, trained places) of six rows of up to 7 tokens, padded on the left or on the right with NaN, with
    gaps in the mask, and ratios on both sides of every bound. In pairs for DPO, each with a trained token."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = 6, 7
    sizes = torch.randint(1, length + 1, (rows,), generator=generator)
    places = torch.arange(length)
    right, left = places < sizes.unsqueeze(1), places >= length - sizes.unsqueeze(1)
    there = torch.where((torch.arange(rows) % 3 == 0).unsqueeze(1), left, right)
    mask = there & (torch.rand(rows, length, generator=generator) > 0.3)
    first = there.int().argmax(1)
    mask[torch.arange(rows), first] = True
    values = {name: torch.randn(rows, length, generator=generator, **E64) * 0.4 - 2 for name in FIELDS}
    advantages = torch.randn((rows, length) if by_token else (rows,), generator=generator, **E64)
    noise = {name: torch.where(there, one, torch.nan) for name, one in values.items()}
    for name in ("logprobs", "entropy"):
        noise[name].requires_grad_()
    padded = LossInputs.padded(loss_mask=mask, advantages=advantages, **noise)
    packed = LossInputs(
        **{name: one.detach()[there].requires_grad_(name in ("logprobs", "entropy")) for name, one in noise.items()},
        loss_mask=mask[there].float(),
        cu_seqlens=torch.tensor([0, *sizes.cumsum(0)], dtype=torch.int32),
        num_sequences=rows,
        advantages=advantages[there] if by_token else advantages,
        counts=GlobalCounts(rows, int(mask.sum())),
    )
    return padded, packed, there


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("name", [*LOSSES, "supervised"])
def test_any_ragged_batch_equals_its_packed_form(name, by_token):
    """Loss, gradients and table of each algorithm, with KL, entropy bonus, dual clip and mismatch weights, in fp64."""
    options = dataclasses.replace(EVERY, aggregation="constant_length" if name == "dr_grpo" else "token_mean")
    options = dataclasses.replace(options, constant_length=9, beta=0.5)
    for seed in range(5):
        padded, packed, there = ragged(seed, by_token)
        outs = [
            supervised_loss(one) if name == "supervised" else LOSSES[name](one, options) for one in (padded, packed)
        ]
        assert outs[1].loss.abs() > 1e-3
        torch.testing.assert_close(outs[0].loss, outs[1].loss, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(outs[0].value, outs[1].value, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(outs[0].table.values, outs[1].table.values, rtol=1e-12, atol=1e-13)
        got, want = (
            torch.autograd.grad(out.loss, (one.logprobs, one.entropy), materialize_grads=True)
            for out, one in zip(outs, (padded, packed), strict=True)
        )
        assert want[0].abs().max() > 1e-3
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.view(there.shape)[there], theirs, rtol=1e-12, atol=1e-14)
            assert not ours.view(there.shape)[~there].any()


def test_two_batches_of_a_step_share_its_counts():
    """With the counts of both, 2 sequences, the two losses add up to that of one batch; each alone would be doubled."""
    options, counts = LossOptions(ClipRange(0.2, 0.2)), GlobalCounts(2, 5)
    keys = {"logprobs": torch.tensor(NEW, **E64), "old_logprobs": torch.tensor(OLD, **E64)}
    keys |= {"loss_mask": torch.tensor(MASK), "advantages": torch.tensor([1.0, -1.0])}
    parts = [
        gspo_megatron.gspo_loss(LossInputs.padded(**{k: v[i : i + 1] for k, v in keys.items()}, counts=counts), options)
        for i in (0, 1)
    ]
    whole = gspo_megatron.gspo_loss(small(), options)
    assert sum(p.loss.item() for p in parts) == pytest.approx(whole.loss.item(), abs=1e-15)
    empty = small(loss_mask=torch.zeros(2, 3), counts=counts)  # a batch of the step may have nothing to train
    assert gspo_megatron.gspo_loss(empty, options).loss.item() == 0.0


WRONG = [
    ({"logprobs": torch.zeros(6)}, ValueError, r"^logprobs has shape \[6\]: must be \[B, L\]"),
    ({"logprobs": torch.zeros(2, 3, 1)}, ValueError, r"^logprobs has shape \[2, 3, 1\]"),
    ({"logprobs": NEW}, TypeError, "^logprobs is a list: must be a tensor"),
    ({"logprobs": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "^logprobs is torch.int64: must be one of float32"),
    ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"^old_logprobs has shape \[2, 4\]: must be \[2, 3\]"),
    ({"old_logprobs": torch.zeros(6)}, ValueError, r"^old_logprobs has shape \[6\]"),
    ({"old_logprobs": torch.zeros(2, 3).long()}, TypeError, "^old_logprobs is torch.int64"),
    ({"old_logprobs": torch.zeros(2, 3, device="meta")}, ValueError, "^old_logprobs is on meta: must be on cpu"),
    ({"ref_logprobs": torch.zeros(2, 2)}, ValueError, r"^ref_logprobs has shape \[2, 2\]"),
    ({"rollout_logprobs": 0.0}, TypeError, "^rollout_logprobs is a float"),
    ({"entropy": torch.zeros(3, 2)}, ValueError, r"^entropy has shape \[3, 2\]"),
    ({"loss_mask": torch.ones(2, 2)}, ValueError, r"^loss_mask has shape \[2, 2\]"),
    ({"loss_mask": None}, TypeError, "^loss_mask is a NoneType"),
    ({"loss_mask": torch.full((2, 3), 0.5)}, ValueError, r"^loss_mask\[0, 0\] = 0.5: must be 0 or 1"),
    ({"loss_mask": torch.tensor([[1, 1, 1], [1, 1, -100]])}, ValueError, r"^loss_mask\[1, 2\] = -100: must be 0 or 1"),
    ({"loss_mask": torch.full((2, 3), math.nan)}, ValueError, r"^loss_mask\[0, 0\] = nan"),
    ({"loss_mask": torch.zeros(2, 3)}, ValueError, "^loss_mask: has no trained token, and .* divided by 0"),
    ({"advantages": torch.ones(2, 1)}, ValueError, r"^advantages has shape \[2, 1\]: must be \[2\], one a sequence or"),
    ({"advantages": torch.ones(3)}, ValueError, r"^advantages has shape \[3\]"),
    ({"advantages": torch.ones(2).long()}, TypeError, "^advantages is torch.int64: must be one of float32, float64"),
    ({"advantages": torch.ones(2).bfloat16()}, TypeError, "^advantages is torch.bfloat16"),
    (
        {"counts": GlobalCounts(1, 5)},
        ValueError,
        "^counts = GlobalCounts.*loss_mask alone has 2 sequences .* 5 ",
    ),
    ({"counts": GlobalCounts(2, 4)}, ValueError, "^counts = GlobalCounts"),
    ({"counts": (2, 5)}, TypeError, "^counts is a tuple: must be GlobalCounts"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_what_does_not_fit_is_named_as_it_was_given(change, error, message):
    with pytest.raises(error, match=message):
        small(**change)


def test_an_empty_batch_has_no_trained_token():
    nothing = torch.zeros(0, 3)
    with pytest.raises(ValueError, match="loss_mask: has no trained token"):
        small(logprobs=nothing, old_logprobs=nothing, loss_mask=nothing, advantages=torch.zeros(0))


PACKED_WRONG = [
    ({"logprobs": torch.zeros(2, 3)}, ValueError, r"^logprobs has shape \[2, 3\].*LossInputs.padded"),
    ({"old_logprobs": torch.zeros(5)}, ValueError, r"^old_logprobs has shape \[5\]: must be \[6\]"),
    ({"old_logprobs": None}, TypeError, "^old_logprobs is a NoneType: must be a tensor"),
    ({"loss_mask": torch.ones(6).long()}, TypeError, "^loss_mask is torch.int64: must be one of bool, uint8"),
    ({"loss_mask": torch.ones(5)}, ValueError, r"^loss_mask has shape \[5\]"),
    ({"cu_seqlens": torch.tensor([0, 3, 6])}, TypeError, "^cu_seqlens is torch.int64: must be one of int32"),
    ({"cu_seqlens": torch.tensor([0, 6]).int()}, ValueError, r"^cu_seqlens has shape \[2\]: must be \[3\]"),
    ({"advantages": torch.ones(3)}, ValueError, r"^advantages has shape \[3\]: must be \[2\].*\[6\]"),
    ({"entropy": torch.ones(6).int()}, TypeError, "^entropy is torch.int32"),
]


@pytest.mark.parametrize("loss", [*LOSSES.values(), lambda inputs, options: supervised_loss(inputs)])
@pytest.mark.parametrize(("change", "error", "message"), PACKED_WRONG)
def test_packed_fields_are_named_by_every_loss(loss, change, error, message):
    """And not by the operators' names (logp_new, mask)."""
    with pytest.raises(error, match=message):
        loss(dataclasses.replace(small(), **change), LossOptions(ClipRange(0.2, 0.2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GlobalCounts(0, 0), "^num_sequences = 0: must be 1 or more"),
        (lambda: GlobalCounts(-1, 5), "^num_sequences = -1"),
        (lambda: GlobalCounts(2, 0), "^num_tokens = 0: must be at least num_sequences = 2"),
        (lambda: ClipRange(-0.1, 0.2), "low=-0.1"),
        (lambda: ClipRange(0.2, math.nan), "high=nan"),
        (lambda: ClipRange(0.2, 0.2, 1.1), "dual=1.1"),
    ],
)
def test_counts_of_zero_and_bounds_that_are_none_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


OPTIONS = LossOptions(ClipRange(0.2, 0.2))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("grpo", {"aggregation": "mean"}, "^aggregation = 'mean': must be one of sequence_mean, token_mean"),
        ("gspo", {"mismatch": "tis"}, "^mismatch = 'tis': must be one of none"),
        ("grpo", {"kl_coef": 0.1}, "^ref_logprobs = None: this loss needs it. Give ref_logprobs, or kl_coef 0"),
        ("gspo", {"entropy_coef": 0.1}, "^entropy = None: this loss needs it. Give entropy, or entropy_coef 0"),
        ("gspo", {"mismatch": "token_masked"}, "^rollout_logprobs = None: this loss needs it"),
        ("dr_grpo", {"aggregation": "constant_length"}, "^constant_length = None .max_response_length of policy_loss."),
        ("dpo", {}, "^ref_logprobs = None"),
    ],
)
def test_what_an_option_needs_is_asked_for(name, change, message):
    """No term is left out in silence."""
    with pytest.raises(ValueError, match=message):
        LOSSES[name](small(), dataclasses.replace(OPTIONS, **change))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dpo"])
def test_advantages_are_for_dpo_alone_to_leave_out(name):
    with pytest.raises(ValueError, match="^advantages = None"):
        LOSSES[name](small(advantages=None), OPTIONS)


def test_preferences_come_in_pairs():
    """Chosen and rejected in turn; h = sum (logp - ref) = (0.1 - 0.1) - (-0.2) = 0.2, beta 0.1: log(1 + e^-0.02)."""
    pair = small(old_logprobs=None, advantages=None, ref_logprobs=torch.tensor(OLD, **E64))
    assert LOSSES["dpo"](pair, OPTIONS).loss.item() == pytest.approx(math.log1p(math.exp(-0.02)), abs=1e-15)
    three = {"logprobs": torch.zeros(3, 2), "old_logprobs": None, "advantages": None, "ref_logprobs": torch.zeros(3, 2)}
    with pytest.raises(ValueError, match="^num_sequences = 3: must be even"):
        LOSSES["dpo"](small(**three, loss_mask=torch.ones(3, 2)), OPTIONS)
    one_empty = small(ref_logprobs=torch.tensor(OLD, **E64), loss_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="^loss_mask: sequence 1 has no trained token"):
        LOSSES["dpo"](one_empty, OPTIONS)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*LOSSES, "supervised"])
def test_log_probs_in_half_precision_are_warned_of_once(name, half):
    """The warning names the argument and points at the caller's line, and there is one also where mismatch weights
    make new inputs. In fp32 there is none."""
    options = dataclasses.replace(OPTIONS, mismatch="token_truncated")
    for kind, number in ((half, 1), (torch.float32, 0)):
        logprobs = torch.tensor(NEW).to(kind).requires_grad_()
        changes = {f"{key}_logprobs": torch.tensor(OLD) for key in ("old", "ref", "rollout")}
        inputs = small(logprobs=logprobs, **changes)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            out = supervised_loss(inputs) if name == "supervised" else LOSSES[name](inputs, options)
        assert [str(one.message).split(":")[0] for one in told] == ["logprobs"] * number
        assert all("4e-4" in str(one.message) and one.filename == __file__ for one in told)
        out.loss.backward()
        assert logprobs.grad.dtype == kind and logprobs.grad.isfinite().all()


def test_public_names_are_there():
    """GspoTrainer, whose import takes seconds, has tests of its own."""
    assert all(getattr(gspo_megatron, name) is not None for name in gspo_megatron.__all__ if name != "GspoTrainer")
    assert {f"{name}_loss" for name in LOSSES} < set(gspo_megatron.__all__)
