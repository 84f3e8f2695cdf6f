"""Each known fault of the mathematics is put in by hand; what must be seen is seen, and ours does not have it.

The faults of parallel layouts are in test_traps_in_megatron.py.
"""

import dataclasses

import pytest
import torch

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.algorithms.interface import GlobalCounts, LossInputs, LossOutputs
from gspo_megatron.batch import PackedBatch, SequenceStats, UpdateResult
from gspo_megatron.config import AlgorithmConfig, KlConfig, MismatchConfig, TrainConfig
from gspo_megatron.metrics import reduce
from gspo_megatron.ops.linear_logprobs import linear_logprobs
from gspo_megatron.ops.sequence_ratio import sequence_partials
from gspo_megatron.recipe import lint
from gspo_megatron.trainer import sanity_checks

LENGTHS = (64, 9, 130, 2, 40)
BOUNDS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
TOTAL = sum(LENGTHS)
RATIO_LIMIT = 1e-6  # what our head and reduction may add to log s


def example(noise: float = 2e-3, shift: float = 1e-3, dtype: torch.dtype = torch.float32, **changes) -> LossInputs:
    """Five sequences, the first token of each untrained, old log-probs perturbed as in the parity fixture."""
    generator = torch.Generator().manual_seed(5)
    new = (-12 * torch.rand(TOTAL, generator=generator)).to(dtype)
    shifts = (shift * torch.randn(len(LENGTHS), generator=generator)).repeat_interleave(torch.tensor(LENGTHS))
    old = new.float() + noise * torch.randn(TOTAL, generator=generator) + shifts
    mask = torch.ones(TOTAL)
    mask[BOUNDS[:-1].long()] = 0
    advantages = torch.tensor([1.0, -0.5, -1.5, 0.7, 0.3])
    counts = GlobalCounts(len(LENGTHS), int(mask.sum()))
    given = {"entropy": torch.zeros(TOTAL), "old_logprobs": old, "loss_mask": mask, "advantages": advantages} | changes
    return LossInputs(
        logprobs=new.requires_grad_(), cu_seqlens=BOUNDS, num_sequences=len(LENGTHS), counts=counts, **given
    )


def loss_of(inputs: LossInputs, name: str = "gspo", **settings) -> tuple[LossOutputs, torch.Tensor]:
    """(outputs, gradient by token)."""
    out = policy_loss(AlgorithmConfig(name=name, **settings))(inputs)
    return out, torch.autograd.grad(out.loss, inputs.logprobs)[0]


def mean_log_ratio(inputs: LossInputs) -> torch.Tensor:
    partials = sequence_partials(inputs.logprobs, inputs.old_logprobs, inputs.loss_mask, inputs.bounds)
    return partials[:, 1] / partials[:, 0]


def plain_mean(inputs: LossInputs, d: torch.Tensor) -> torch.Tensor:
    parts = zip(d.split(LENGTHS), inputs.loss_mask.split(LENGTHS), strict=True)
    return torch.stack([part[mask > 0].mean() for part, mask in parts])


def test_log_ratio_clamped_by_token_before_the_mean():
    """One surprising token moves s; a clamp at 0.5 hides it. Sequences with one differ by more than the limit."""
    inputs = example()
    inputs.old_logprobs[30] -= 3.0
    d = (inputs.logprobs.double() - inputs.old_logprobs.double()).detach()
    truth, trap = plain_mean(inputs, d), plain_mean(inputs, d.clamp(-0.5, 0.5))
    assert float((mean_log_ratio(inputs) - truth).abs().max()) < 1e-9
    assert float((trap - truth).abs().max()) > 0.03


def test_logits_rounded_to_bf16():
    """The same bf16 hidden states and head: rounding the logits moves log s by more than the limit, we do not."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOTAL, 64, generator=generator).bfloat16()
    weight = (0.1 * torch.randn(512, 64, generator=generator)).bfloat16()
    targets = torch.randint(0, 512, (TOTAL,), generator=generator)
    logits = hidden.double() @ weight.double().T

    def log_s(logprobs: torch.Tensor) -> torch.Tensor:
        return plain_mean(inputs, logprobs.double() - old)

    inputs = example()
    truth_by_token = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    old = truth_by_token - 1e-3
    rounded = logits.bfloat16().float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    ours, _ = linear_logprobs(hidden, weight, targets)
    assert float((log_s(rounded) - log_s(truth_by_token)).abs().max()) > 100 * RATIO_LIMIT
    assert float((log_s(ours) - log_s(truth_by_token)).abs().max()) < RATIO_LIMIT


def test_old_log_probs_stored_in_bf16():
    """They move log s by more than the limit, and the look at a run's first step says so."""
    inputs = example()
    truth = mean_log_ratio(inputs)
    stored = dataclasses.replace(inputs, old_logprobs=inputs.old_logprobs.bfloat16().float())
    assert float((mean_log_ratio(stored) - truth).abs().max()) > 100 * RATIO_LIMIT
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    batch = PackedBatch(
        torch.zeros(TOTAL, dtype=torch.int64),
        positions,
        BOUNDS,
        len(LENGTHS),
        inputs.loss_mask,
        inputs.advantages,
        old_logprobs=stored.old_logprobs,
    )
    assert sanity_checks.is_stored_in_bf16([batch])
    batch.old_logprobs = inputs.old_logprobs
    assert not sanity_checks.is_stored_in_bf16([batch])


def test_gspo_token_formed_in_another_order():
    """log s_it = logp - sg(logp) + sg(mean), summed from the left. From the right, bf16 loses a mean of 2.5e-4."""
    logp, mean = torch.tensor(-12.35, dtype=torch.bfloat16), torch.tensor(2.5e-4, dtype=torch.bfloat16)
    assert float((logp + mean) - logp) == 0.0
    assert float((logp - logp) + mean) == pytest.approx(2.5e-4, rel=1e-2)
    # Ours forms neither: with bf16 log-probs the ratio is exact, and so is the gradient s A / (N |y|).
    inputs = example(dtype=torch.bfloat16, advantages=torch.linspace(-1, 1, TOTAL))
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.logprobs.detach().float() - 2.5e-4)
    out, gradient = loss_of(inputs, "gspo_token")
    log_s = out.table.column("sum_log_ratio") / out.table.column("num_tokens")
    assert float((log_s - 2.5e-4).abs().max()) < RATIO_LIMIT
    first = -float(torch.tensor(2.5e-4).double().exp()) * float(inputs.advantages[1]) / (len(LENGTHS) * 63)
    assert float(gradient[1]) == pytest.approx(first, rel=2**-7)  # of bf16 type itself


def test_gspo_token_with_the_tokens_own_ratio():
    """With one advantage a sequence GSPO-token is GSPO; clipping each token's own ratio is neither."""
    inputs = example()
    gspo, gspo_gradient = loss_of(inputs)
    ours, our_gradient = loss_of(inputs, "gspo_token")
    trap, trap_gradient = loss_of(inputs, "grpo", clip_ratio_low=3e-4, clip_ratio_high=4e-4, kl=KlConfig(coef=0.0))
    assert torch.allclose(our_gradient, gspo_gradient, rtol=0, atol=1e-9)
    assert float(ours.value) == pytest.approx(float(gspo.value), abs=1e-12)
    assert torch.equal(ours.table.values[:, -2:], gspo.table.values[:, -2:])
    assert not torch.allclose(trap_gradient, gspo_gradient, rtol=0, atol=1e-4)
    assert not torch.equal(trap.table.values[:, -2:], gspo.table.values[:, -2:])


def test_clip_fraction_over_untrained_positions(monkeypatch):
    """All positions of a clipped sequence over its trained tokens: a share above 1 where 1 is true."""
    mask = torch.ones(TOTAL)
    positions = torch.cat([torch.arange(n) / n for n in LENGTHS])
    mask[positions < 0.6] = 0  # long prompts
    inputs = example(noise=0.0, shift=0.0, loss_mask=mask, advantages=torch.ones(len(LENGTHS)))
    inputs = dataclasses.replace(inputs, old_logprobs=inputs.logprobs.detach() - 0.1)  # s = exp(0.1), all clipped
    out, _ = loss_of(inputs)
    trap = TOTAL / float(mask.sum())
    monkeypatch.setattr(reduce, "gather_rows", lambda rows, group: rows)
    monkeypatch.setattr(reduce, "global_loss", lambda results, group: 0.0)
    metrics = reduce.update_metrics([UpdateResult(SequenceStats(1, 0, 0.0, out.table), 1.0, 1e-4, True)], None)
    assert trap > 2
    assert metrics["clip/token"] == 1.0 and metrics["clip/seq_high"] == 1.0 and metrics["clip/seq_low"] == 0.0


def test_a_first_update_hides_faults():
    """At s = 1 the loss is 0 whatever the clip range, and the gradient does not see it either: swapped bounds show
    only once old log-probs are perturbed, which is why the parity fixture does so."""
    first = example(noise=0.0, shift=0.0)
    swapped = {"clip_ratio_low": 4e-4, "clip_ratio_high": 3e-4}
    assert torch.equal(loss_of(first)[1], loss_of(first, **swapped)[1])
    assert float(loss_of(first)[0].value) == pytest.approx(0.0, abs=1e-12)  # so a relative error means nothing
    moved = example()
    difference = float(loss_of(moved)[0].value) - float(loss_of(moved, **swapped)[0].value)
    assert abs(difference) > 1e-6 * float(moved.advantages.abs().mean())  # beyond the parity limit


def test_epsilon_of_grpo_with_a_sequence_ratio():
    """It clips nothing at all, and the recipe check warns."""
    settings = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
    out, _ = loss_of(example(), **settings)
    assert float(out.table.values[:, -2:].sum()) == 0 < float(loss_of(example())[0].table.values[:, -2:].sum())
    recipe = TrainConfig(algorithm=AlgorithmConfig(**settings))
    assert sum("nothing would be clipped" in sentence for sentence in lint.warnings(recipe)) == 2
    assert not any("clipped" in sentence for sentence in lint.warnings(TrainConfig()))


def test_masking_a_mismatch_shortens_the_response():
    """Tokens masked out of loss_mask leave |y| and the mean; a weight of 0 leaves both as they were."""
    inputs = example()
    rollout = inputs.old_logprobs.clone()
    rollout[BOUNDS[2] : BOUNDS[2] + 40] -= 2.0  # weights e^2, beyond the threshold
    inputs = dataclasses.replace(inputs, rollout_logprobs=rollout)
    correction = MismatchConfig("token_masked", 2.0)
    out, gradient = loss_of(inputs, "gspo_token", mismatch=correction)
    kept = (inputs.old_logprobs - rollout).abs() < 0.5
    trap, _ = loss_of(dataclasses.replace(inputs, loss_mask=inputs.loss_mask * kept), "gspo_token")
    assert torch.equal(out.table.column("num_tokens"), torch.tensor(LENGTHS).double() - 1)
    assert float(gradient[~kept].abs().max()) == 0
    assert float(trap.table.column("num_tokens")[2]) == LENGTHS[2] - 40
    log_s, trapped = (o.table.column("sum_log_ratio") / o.table.column("num_tokens") for o in (out, trap))
    assert torch.equal(log_s, mean_log_ratio(inputs)) and abs(float(log_s[2] - trapped[2])) > RATIO_LIMIT
