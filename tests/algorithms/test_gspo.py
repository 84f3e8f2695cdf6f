"""GSPO by hand, against finite differences, and against plain Python on ragged batches."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gspo_megatron.algorithms import policy_loss
from gspo_megatron.algorithms.advantages import group_advantages
from gspo_megatron.algorithms.gspo import gspo_loss
from gspo_megatron.algorithms.gspo_token import gspo_token_loss
from gspo_megatron.algorithms.interface import GlobalCounts, LossOptions
from gspo_megatron.config import AlgorithmConfig
from tests.algorithms.packed import (
    EMPTY,
    MASKED,
    PAPER,
    WIDE,
    Response,
    assert_matches,
    gradient,
    losses_of_split,
    pack,
    ragged,
    reference,
    with_ratio,
)


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-14) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("s", "a", "loss", "slope", "low", "high"),
    [  # bounds 0.9 and 1.2; two trained tokens, so d loss / d logp_t = -s A / 2 unless clipped
        (0.5, 2.0, -1.0, -0.5, 0, 0),
        (0.5, -2.0, 1.8, 0.0, 2, 0),
        (1.1, 2.0, -2.2, -1.1, 0, 0),
        (1.1, -2.0, 2.2, 1.1, 0, 0),
        (1.5, 2.0, -2.4, 0.0, 0, 2),
        (1.5, -2.0, 3.0, 1.5, 0, 0),
    ],
)
def test_one_sequence_by_hand(s, a, loss, slope, low, high):
    """-min(s A, clip(s) A) on both sides of the range and for both signs; the masked prompt token gets nothing."""
    inputs = pack([with_ratio(s, a)])
    out = gspo_loss(inputs, options=LossOptions(WIDE))
    assert out.loss.dtype == torch.float64 and out.loss.item() == pytest.approx(loss, abs=1e-14)
    close(gradient(out.loss, inputs), [0, slope, slope])
    assert out.table.column("clipped_low_tokens").tolist() == [low]
    assert out.table.column("clipped_high_tokens").tolist() == [high]


def test_three_sequences_by_hand():
    """s A = 0.5 x 3, 1.1 x (-1), and 1.5 x 2 clipped to 2.4: -J = -(1.5 - 1.1 + 2.4) / 3.

    Slopes -s A / (2 x 3): -0.25, 1.1 / 6, 0. A sum over tokens instead of a mean would double them.
    """
    inputs = pack([with_ratio(0.5, 3.0), with_ratio(1.1, -1.0), with_ratio(1.5, 2.0)])
    out = gspo_loss(inputs, options=LossOptions(WIDE))
    assert out.loss.item() == pytest.approx(-2.8 / 3, abs=1e-14)
    close(gradient(out.loss, inputs), [0, -0.25, -0.25, 0, 1.1 / 6, 1.1 / 6, 0, 0, 0])


def test_the_ratio_is_normalised_by_length_over_a_mask_with_gaps():
    """d = 0.3, (gap), -0.1, (gap), 0.4 over |y| = 3: s = exp(0.2); A = -1 is not clipped there. Slope s / 3."""
    response = Response([-0.7, 0.0, -1.1, -9.0, -0.6], [-1.0, -5.0, -1.0, -1.0, -1.0], [1, 0, 1, 0, 1], -1.0)
    inputs = pack([response])
    out = gspo_loss(inputs, options=LossOptions(WIDE))
    s = math.exp(0.2)
    assert out.loss.item() == pytest.approx(s, abs=1e-14)
    close(gradient(out.loss, inputs), [s / 3, 0, s / 3, 0, s / 3])


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_a_token_log_ratio_is_not_clamped_before_the_mean(loss):
    """d = 30 and three of -10 cancel: s = 1, loss -A, slope -A/4. Clamped at +-20 the ratio would be exp(-2.5)."""
    inputs = pack([Response([-1.0, -31.0, -31.0, -31.0], [-31.0, -21.0, -21.0, -21.0], [1, 1, 1, 1], 2.0)])
    out = loss(inputs, options=LossOptions(PAPER))
    assert out.loss.item() == -2.0 and out.table.column("max_abs_log_ratio").tolist() == [30]
    close(gradient(out.loss, inputs), [-0.5] * 4)


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_log_probs_of_large_size_do_not_drown_the_ratio(loss):
    """fp32 log-probs whose d = 2^-12 at logp = -16: exp(2^-12) = 1.00024417; a bf16 rounding (step 2^-4) gives 1."""
    inputs = pack([Response([-16 + 2.0**-12] * 3, [-16.0] * 3, [1, 1, 1], 1.0)])
    inputs = replace(inputs, logprobs=inputs.logprobs.detach().float(), old_logprobs=inputs.old_logprobs.float())
    assert loss(inputs, options=LossOptions(PAPER)).loss.item() == pytest.approx(-math.exp(2.0**-12), abs=1e-15)


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_the_first_step_has_no_loss_but_a_gradient(loss):
    """s = 1 and group-normalised advantages sum to 0; slope -A_i / (|y_i| N), not 0: for |y| = 1, 2, 3, 4 and N = 4."""
    advantages = group_advantages(torch.tensor([1.0, 0, 0, 1]), torch.zeros(4)).tolist()
    logp = [-2.5, -0.125, -7.0, -1.0]
    inputs = pack([Response(logp[:n], logp[:n], [1] * n, a) for n, a in enumerate(advantages, start=1)])
    out = loss(inputs, options=LossOptions(PAPER))
    assert abs(out.loss.item()) < 1e-15 < 0.8 < abs(advantages[0])
    close(gradient(out.loss, inputs), [-a / n / 4 for n, a in enumerate(advantages, start=1) for _ in range(n)])


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_any_split_into_microbatches_gives_the_same_step(loss):
    """Seven sequences of unequal length: cut anywhere, total loss and gradients agree to 1e-12.

    A mean of each microbatch's own would not: the cuts [1, 6] and [7] weigh the first sequence by 1/2 and by 1/5.
    """
    responses = [with_ratio(0.95, 1.0), MASKED, with_ratio(1.15, -2.0), with_ratio(0.5, -1.0)]
    responses += [EMPTY, with_ratio(1.5, 0.25), Response([-1.0] * 5, [-1.1] * 5, [1, 0, 1, 1, 0], 3.0)]
    want_loss, want_gradient = losses_of_split(loss, responses, [7], WIDE)
    assert abs(want_loss) > 0.01 and want_gradient.abs().max() > 0.01
    for sizes in ([1, 6], [1, 1, 5], [2, 3, 2], [4, 1, 2], [1] * 7):
        total, gradients = losses_of_split(loss, responses, sizes, WIDE)
        assert total == pytest.approx(want_loss, abs=1e-12)
        torch.testing.assert_close(gradients, want_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_sequences_without_a_trained_token_do_not_count(loss):
    """One counted sequence (s = 1.1, A = 2) among masked and empty ones: loss -2.2, not -2.2 / 4; they get nothing."""
    inputs = pack([EMPTY, MASKED, with_ratio(1.1, 2.0), EMPTY, MASKED], padding=3)
    assert inputs.counts == GlobalCounts(1, 2)
    out = loss(inputs, options=LossOptions(WIDE))
    assert out.loss.item() == pytest.approx(-2.2, abs=1e-14)
    close(gradient(out.loss, inputs), [0, 0, 0, -1.1, -1.1, 0, 0, 0, 0, 0])
    assert out.table.column("num_tokens").tolist() == [0, 0, 2, 0, 0]


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_a_microbatch_without_a_trained_token_is_zero_not_nan(loss):
    inputs = pack([MASKED, EMPTY], padding=1)
    out = loss(inputs, options=LossOptions(WIDE))
    assert out.loss.item() == 0 and gradient(out.loss, inputs).tolist() == [0, 0, 0]


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_padding_is_ignored_whatever_it_holds(loss, mask):
    responses = [with_ratio(1.1, 2.0), with_ratio(0.5, -1.0)]
    bare, padded = pack(responses), pack(responses, padding=2, padding_mask=mask)
    assert padded.cu_seqlens.tolist() == [0, 3, 6, 8] and bare.cu_seqlens.tolist() == [0, 3, 6]
    want, got = loss(bare, options=LossOptions(WIDE)), loss(padded, options=LossOptions(WIDE))
    assert got.loss.item() == want.loss.item()
    assert gradient(got.loss, padded).tolist() == gradient(want.loss, bare).tolist() + [0, 0]
    assert torch.equal(got.table.values, want.table.values)


def test_not_a_number_in_a_masked_old_log_prob_is_harmless():
    for loss in (gspo_loss, gspo_token_loss):
        inputs = pack([Response([-1.0, -1.0], [math.nan, -1.0], [0, 1], 2.0)])
        out = loss(inputs, options=LossOptions(WIDE))
        assert out.loss.item() == -2.0 and gradient(out.loss, inputs).tolist() == [0, -2]
        assert bool(torch.isfinite(out.table.values).all())


@pytest.mark.parametrize("loss", [gspo_loss, gspo_token_loss])
def test_gradient_against_finite_differences(loss):
    """Both sides of the range, both signs, a masked and an empty sequence, padding; clipped ones have slope 0.

    With one advantage a sequence GSPO-token's value is GSPO's, so finite differences hold for it as well.
    """
    responses = [with_ratio(s, a) for s in (0.5, 1.05, 1.5) for a in (2.0, -0.7)] + [MASKED, EMPTY]
    inputs = pack(responses, padding=2)

    def value(logprobs: torch.Tensor) -> torch.Tensor:
        return loss(replace(inputs, logprobs=logprobs), options=LossOptions(WIDE)).loss

    assert torch.autograd.gradcheck(value, (inputs.logprobs,), eps=1e-6, atol=1e-8)


@given(ragged(by_token=False), st.integers(0, 3), st.sampled_from([WIDE, PAPER]))
@settings(max_examples=100, deadline=None)
def test_ragged_batches_against_plain_python(responses, padding, clip):
    expected = reference(responses, clip)
    assume(expected.margin > 1e-9)  # on a bound, rounding decides which side a ratio is on
    inputs = pack(responses, padding)
    assert_matches(gspo_loss(inputs, options=LossOptions(clip)), inputs, expected)


@pytest.mark.parametrize(("name", "loss"), [("gspo", gspo_loss), ("gspo_token", gspo_token_loss)])
def test_the_recipe_names_the_loss_and_its_clip_range(name, loss):
    """low 0.1 and high 0.4: s = 1.5 with A = 1 is clipped to 1.4, s = 0.5 with A = -1 to 0.9."""
    chosen = policy_loss(AlgorithmConfig(name=name, clip_ratio_low=0.1, clip_ratio_high=0.4))
    assert chosen.func is loss
    assert chosen(pack([with_ratio(1.5, 1.0)])).loss.item() == pytest.approx(-1.4, abs=1e-14)
    assert chosen(pack([with_ratio(0.5, -1.0)])).loss.item() == pytest.approx(0.9, abs=1e-14)
