"""The shared pieces of the losses, each by hand."""

import math
from dataclasses import replace

import pytest
import torch

from gspo_megatron.algorithms import surrogate
from tests.algorithms.packed import EMPTY, MASKED, WIDE, Response, pack


def test_sequence_ids_with_empty_sequences_and_padding():
    """Lengths 0, 2, 0, 3, 0 and 2 tokens of padding, which belong to no sequence: id S = 5."""
    expected = [1, 1, 3, 3, 3, 5, 5]
    for bounds in ([0, 0, 2, 2, 5, 5, 7], [0, 0, 2, 2, 5, 5]):  # with and without the padding's own segment
        ids = surrogate.sequence_ids(torch.tensor(bounds, dtype=torch.int32), 5, 7)
        assert ids.dtype == torch.int64 and ids.tolist() == expected


def test_sequence_sum_is_fp64_and_drops_padding():
    """2^24 + 1 + 1 is 16777218; summed in fp32 it stays 16777216."""
    values = torch.tensor([2.0**24, 1, 1, 3, 100])
    total = surrogate.sequence_sum(values, torch.tensor([0, 0, 0, 2, 3]), 3)
    assert total.dtype == torch.float64 and total.tolist() == [16777218, 0, 3]


def test_sequence_sum_passes_the_gradient_to_counted_tokens_only():
    """d (2 sum_0 + 5 sum_1) / d values = 2 for tokens of sequence 0, 5 for sequence 1, 0 for padding (id 2)."""
    values = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    total = surrogate.sequence_sum(values, torch.tensor([0, 1, 1, 2]), 2)
    (grad,) = torch.autograd.grad((total * torch.tensor([2.0, 5])).sum(), values)
    assert grad.tolist() == [2, 5, 5, 0]


def test_the_difference_of_fp32_log_probs_is_taken_in_fp64():
    """-16 - (-2^-24) = -16 + 2^-24; in fp32 the small one is lost."""
    inputs = pack([Response([-16.0], [-(2.0**-24)], [1])])
    inputs = replace(inputs, logprobs=inputs.logprobs.detach().float(), old_logprobs=inputs.old_logprobs.float())
    assert surrogate.masked_log_ratio(inputs).tolist() == [-16 + 2.0**-24]


def test_log_ratio_is_masked_and_never_clamped():
    """Whatever stands where the mask is 0, not-a-number included, gives 0 and gets no gradient."""
    inputs = pack([Response([-1.0, -2.0, -700.0], [math.nan, -602.0, 0.0], [0, 1, 1])])
    log_ratio = surrogate.masked_log_ratio(inputs)
    assert log_ratio.tolist() == [0, 600, -700]
    (grad,) = torch.autograd.grad(log_ratio.sum(), inputs.logprobs)
    assert grad.tolist() == [0, 1, 1]


CLIPPING = [
    # s, A, min(s A, clip(s) A), d/ds, low, high: bounds 0.9 and 1.2
    (0.5, 2.0, 1.0, 2.0, False, False),  # min(1.0, 1.8)
    (0.5, -2.0, -1.8, 0.0, True, False),  # min(-1.0, -1.8)
    (1.0, 2.0, 2.0, 2.0, False, False),
    (1.0, -2.0, -2.0, -2.0, False, False),
    (1.5, 2.0, 2.4, 0.0, False, True),  # min(3.0, 2.4)
    (1.5, -2.0, -3.0, -2.0, False, False),  # min(-3.0, -2.4)
    (0.5, 0.0, 0.0, 0.0, False, False),
    (1.5, 0.0, 0.0, 0.0, False, False),
    (1 - 0.1, -2.0, -1.8, -2.0, False, False),  # on the bound the gradient is still there
    (1 + 0.2, 2.0, 2.4, 2.0, False, False),
]


@pytest.mark.parametrize(("s", "a", "value", "slope", "low", "high"), CLIPPING)
def test_clipping_by_hand(s, a, value, slope, low, high):
    ratio = torch.tensor([s], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([a], dtype=torch.float64)
    objective = surrogate.clipped_surrogate(ratio, advantage, WIDE)
    assert objective.item() == pytest.approx(value, abs=1e-15)
    assert torch.autograd.grad(objective.sum(), ratio)[0].item() == pytest.approx(slope, abs=1e-15)
    assert [bool(side) for side in surrogate.clipped_sides(ratio.detach(), advantage, WIDE)] == [low, high]


def test_the_sides_are_where_the_gradient_is_gone():
    """3000 random (s, A): a side is reported exactly where d/ds is 0, and never both."""
    generator = torch.Generator().manual_seed(3)
    ratio = (0.3 * torch.randn(3000, generator=generator, dtype=torch.float64)).exp().requires_grad_()
    advantages = torch.randn(3000, generator=generator, dtype=torch.float64)
    (slope,) = torch.autograd.grad(surrogate.clipped_surrogate(ratio, advantages, WIDE).sum(), ratio)
    low, high = surrogate.clipped_sides(ratio.detach(), advantages, WIDE)
    assert torch.equal(low | high, slope == 0) and not (low & high).any()
    assert low.sum() > 200 and high.sum() > 200


def table(inputs, low: list[bool], high: list[bool]):
    ids = surrogate.sequence_ids(inputs.cu_seqlens, inputs.num_sequences, inputs.logprobs.numel())
    log_ratio = surrogate.masked_log_ratio(inputs).detach()
    return surrogate.sequence_table(inputs, log_ratio, ids, torch.tensor(low), torch.tensor(high))


def test_table_by_hand():
    """d = ln 2, (masked), -2 ln 2: sum -ln 2, squares 5 ln^2 2, max 2 ln 2, and the k3 terms are
    (2 - 1 - ln 2) + (1/4 - 1 + 2 ln 2) = 1/4 + ln 2; with d of the other sign they would be 5/2 - ln 2.

    Entropy 0.5 for each of 2 trained tokens; 2 tokens are clipped low and 3 high, but one of each is masked; 4 padding
    tokens with mask 1, all clipped, belong to nobody. A masked or empty sequence is a row of zeros.
    """
    two = math.log(2)
    inputs = pack([EMPTY, Response([two, 3.0, -2 * two], [0.0, -4.0, 0.0], [1, 0, 1]), MASKED], 4, padding_mask=1.0)
    pad = [True] * 4
    got = table(inputs, [False, True, True, True, True] + pad, [True, True, True, False, False] + pad)
    assert got.values.dtype == torch.float64 and not got.values.requires_grad
    row = [2, -two, 5 * two**2, 0.25 + two, 2 * two, 1, 1, 2]
    expected = torch.tensor([[0.0] * 8, row, [0.0] * 8], dtype=torch.float64)
    torch.testing.assert_close(got.values, expected, rtol=0, atol=1e-15)
    assert got.column("num_tokens").tolist() == [0, 2, 0] and got.column("clipped_high_tokens").tolist() == [0, 2, 0]


def test_k3_keeps_its_digits_at_small_ratios():
    """exp(d) - 1 - d = d^2/2 + d^3/6 + ...: at d = 1e-6 that is 5e-13, of which exp(d) - 1 loses 1e-16 to rounding."""
    got = table(pack([Response([-1.0 + 1e-6], [-1.0], [1])]), [False], [False]).column("sum_k3")
    d = (-1.0 + 1e-6) + 1.0  # the difference that fp64 can hold
    assert float(got) == pytest.approx(d * d / 2 + d**3 / 6, rel=1e-8, abs=0)
