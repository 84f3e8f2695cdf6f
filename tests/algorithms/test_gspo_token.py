"""GSPO-token: equal to GSPO where advantages are equal, per-token advantages by hand, and the order of its log form."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gspo_megatron.algorithms.gspo import gspo_loss
from gspo_megatron.algorithms.gspo_token import gspo_token_loss
from gspo_megatron.algorithms.interface import LossOptions
from tests.algorithms.packed import (
    EMPTY,
    MASKED,
    PAPER,
    WIDE,
    Response,
    assert_matches,
    gradient,
    pack,
    ragged,
    reference,
    with_ratio,
)


def close(actual: torch.Tensor, expected: list[float], tolerance: float = 1e-14) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def assert_equal_to_gspo(responses: list[Response], padding: int, clip) -> None:
    whole, token = pack(responses, padding), pack(responses, padding)
    want, got = gspo_loss(whole, options=LossOptions(clip)), gspo_token_loss(token, options=LossOptions(clip))
    size = max(1.0, abs(want.loss.item()))
    assert got.loss.item() == pytest.approx(want.loss.item(), abs=1e-12 * size)
    torch.testing.assert_close(gradient(got.loss, token), gradient(want.loss, whole), rtol=1e-12, atol=1e-12)
    assert torch.equal(got.table.values, want.table.values)  # clip decisions are among its columns


def test_equal_to_gspo_by_hand_cases():
    cases = [with_ratio(s, a) for s in (0.5, 0.95, 1.0, 1.15, 1.5) for a in (2.0, -2.0, 0.0)]
    assert_equal_to_gspo([EMPTY, *cases, MASKED], 3, WIDE)


@given(ragged(by_token=False), st.integers(0, 3), st.sampled_from([WIDE, PAPER]))
@settings(max_examples=60, deadline=None)
def test_equal_to_gspo_on_ragged_batches(responses, padding, clip):
    assume(all(abs(total) < 20 for total in reference(responses, clip).sum_log_ratio))  # 1e-12 is absolute
    assert_equal_to_gspo(responses, padding, clip)


@given(ragged(by_token=True), st.integers(0, 3), st.sampled_from([WIDE, PAPER]))
@settings(max_examples=100, deadline=None)
def test_per_token_advantages_against_plain_python(responses, padding, clip):
    expected = reference(responses, clip)
    assume(expected.margin > 1e-9)
    inputs = pack(responses, padding)
    assume(inputs.advantages.numel() != inputs.num_sequences)  # read as one a sequence
    assert_matches(gspo_token_loss(inputs, options=LossOptions(clip)), inputs, expected)


def test_per_token_advantages_by_hand():
    """s = 1.5 over A = (1, -3): min(1.5, 1.2) = 1.2 clipped, min(-4.5, -3.6) = -4.5 not. loss = -(1.2 - 4.5) / 2.

    Slopes 0 and -s A / 2 = 2.25: the token's own advantage, not the mean of the two. One of two tokens is clipped.
    """
    response = with_ratio(1.5, 0.0)
    inputs = pack([Response(response.new, response.old, response.mask, [100.0, 1.0, -3.0])])
    out = gspo_token_loss(inputs, options=LossOptions(WIDE))
    assert out.loss.item() == pytest.approx(1.65, abs=1e-14)
    close(gradient(out.loss, inputs), [0, 0, 2.25])
    assert out.table.column("clipped_high_tokens").tolist() == [1]
    assert out.table.column("clipped_low_tokens").tolist() == [0]


def test_gradient_is_that_of_the_form_with_its_stopped_values_held_fixed():
    """J(logp) with sg[s_i] and sg[pi] as constants, by central differences; A differs by token.

    Differentiating the value itself would be wrong here: it would give every token the mean advantage.
    """
    advantages = [0.5, 2.0, -1.0]
    response = Response([-1.0, -2.0, -0.5], [-1.1, -2.05, -0.4], [1, 1, 1], advantages)
    inputs = pack([response])
    got = gradient(gspo_token_loss(inputs, options=LossOptions(WIDE)).loss, inputs)
    s = math.exp((0.1 + 0.05 - 0.1) / 3)

    def frozen(t: int, step: float) -> float:
        ratio = s * math.exp(step)  # pi_new moved by step, sg[pi_new] not
        return -min(ratio * advantages[t], min(max(ratio, 0.9), 1.2) * advantages[t]) / 3

    close(got, [(frozen(t, 1e-6) - frozen(t, -1e-6)) / 2e-6 for t in range(3)], 1e-9)
    close(got, [-s * a / 3 for a in advantages])


def test_clip_fraction_by_token_counts_trained_tokens_only():
    """8 positions, 3 trained, s = 1.5 with A = 1: 3 of 3 are clipped. Counted over all positions it would be 8/3."""
    response = Response([math.log(1.5)] * 8, [0.0] * 8, [0, 0, 1, 0, 1, 1, 0, 0], 1.0)
    for loss in (gspo_loss, gspo_token_loss):
        table = loss(pack([response], padding=4, padding_mask=1.0), options=LossOptions(WIDE)).table
        assert table.column("clipped_high_tokens").tolist() == [3] and table.column("num_tokens").tolist() == [3]


def test_a_sequence_counts_as_clipped_once_and_its_tokens_apart():
    """Long (s = 1.5, A = 1, 4 tokens) and short (s = 1, 1 token): half of the sequences, four fifths of the tokens."""
    long = Response([math.log(1.5)] * 4, [0.0] * 4, [1] * 4, 1.0)
    for loss in (gspo_loss, gspo_token_loss):
        table = loss(pack([long, Response([-1.0], [-1.0], [1], 1.0)]), options=LossOptions(WIDE)).table
        high, tokens = table.column("clipped_high_tokens"), table.column("num_tokens")
        assert (high > 0).double().mean() == 0.5 and high.sum() / tokens.sum() == 0.8


def test_other_orders_of_the_log_form_lose_the_ratio():
    """lp = -12.35, log s = 2.5e-4. bf16 has steps of 2^-4 there: (log s + lp) - lp = 0, all of it gone.

    fp32 has steps of 2^-20: 2.5e-4 / 2^-20 = 262.1, so what comes back is 262 x 2^-20, an error of 1.4e-7 that is
    twice what fp32 logits cost. (lp - lp) + log s is exact in both types.
    """
    for dtype, survives in ((torch.bfloat16, 0.0), (torch.float32, 262 * 2.0**-20)):
        lp, mean = torch.tensor(-12.35, dtype=dtype), torch.tensor(2.5e-4, dtype=dtype)
        assert ((mean + lp) - lp).item() == survives != mean.item()
        assert ((lp - lp) + mean).item() == mean.item()


def test_the_order_of_the_log_form_in_fp64():
    """lp = -1.5 x 2^40, where fp64 has steps of 2^-12; log s = (0 + 3 x 2^-12) / 2 falls between two.

    Our order keeps it; (log s + lp) - lp would round it to 2 x 2^-13 or 4 x 2^-13. A = -1, loss = s, slope s / 2.
    """
    lp = -1.5 * 2.0**40
    inputs = pack([Response([lp, lp], [lp, lp - 3 * 2.0**-12], [1, 1], -1.0)])
    out = gspo_token_loss(inputs, options=LossOptions(WIDE))
    s = math.exp(3 * 2.0**-13)
    assert out.loss.item() == pytest.approx(s, abs=1e-15)
    close(gradient(out.loss, inputs), [s / 2, s / 2], 1e-15)
    naive = (torch.tensor(3 * 2.0**-13, dtype=torch.float64) + lp) - lp
    assert naive.item() in (2 * 2.0**-13, 4 * 2.0**-13)


def test_as_many_advantages_as_tokens_and_sequences_are_one_a_sequence():
    """Two tokens of the first sequence and an empty second: S = T = 2. Both tokens have A = 3; loss -3, slope -3/2."""
    inputs = pack([Response([-1.0, -2.0], [-1.0, -2.0], [1, 1], 3.0), EMPTY])
    out = gspo_token_loss(inputs, options=LossOptions(WIDE))
    assert out.loss.item() == -3.0
    close(gradient(out.loss, inputs), [-1.5, -1.5])


@pytest.mark.parametrize("aggregation", ["token_mean", "constant_length", "length_proportional"])
def test_aggregation_reaches_the_value_and_the_gradient_of_token_advantages(aggregation):
    """Two sequences at ratio 1 with advantages (1, 4, -2) and (3,): weights w_i N |y_i| / (N |y_i|) = w_i by token.

    token_mean: w = 1/4, so J = (1 + 4 - 2 + 3) / 4; constant_length with L = 5: w = 1 / (2 * 5), J = 6 / 10;
    length_proportional: w = 1/2, J = 3. The slope of token t is -w A_t.
    """
    weight = {"token_mean": 1 / 4, "constant_length": 1 / 10, "length_proportional": 1 / 2}[aggregation]
    first = Response([-1.0] * 3, [-1.0] * 3, [1, 1, 1], [1.0, 4.0, -2.0])
    inputs = pack([first, Response([-1.0], [-1.0], [1], [3.0])])
    out = gspo_token_loss(inputs, LossOptions(WIDE, aggregation=aggregation, constant_length=5))
    assert out.loss.item() == pytest.approx(-6 * weight, abs=1e-14) and out.value.item() == out.loss.item()
    close(gradient(out.loss, inputs), [-weight * a for a in (1, 4, -2, 3)])
