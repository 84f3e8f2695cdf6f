"""Weights against the gap between rollout and training log-probs, by hand. They leave |y_i| and denominators alone."""

import dataclasses
import math

import pytest
import torch

from gspo_megatron.algorithms import LOSSES
from gspo_megatron.algorithms.interface import ClipRange, LossOptions
from gspo_megatron.algorithms.mismatch import corrected
from tests.algorithms.packed import Response, gradient, pack

# old - rollout: ln 4, ln 1/4 and 0 on trained tokens; the first token is a prompt's. Mean 0, so its weight is 1.
ODD = Response([-1.0] * 4, [-1.0] * 4, [0, 1, 1, 1], 2.0)
ROLLOUT = [9.0, -1 - math.log(4), -1 + math.log(4), -1.0]
# old - rollout = ln 3 on both trained tokens: the sequence weight is 3.
FAR = Response([-2.0] * 2, [-2.0] * 2, [1, 1], -1.0)
FAR_ROLLOUT = [-2 - math.log(3)] * 2


def inputs():
    packed = pack([ODD, FAR], padding=1)
    return dataclasses.replace(
        packed, rollout_logprobs=torch.tensor([*ROLLOUT, *FAR_ROLLOUT, 5.0], dtype=torch.float64)
    )


@pytest.mark.parametrize(
    ("correction", "weights"),
    [
        ("token_truncated", [2, 0.25, 1, 2, 2]),  # min(v, 2) of 4, 1/4, 1, 3, 3
        ("token_masked", [0, 0, 1, 0, 0]),  # 0 outside 1/2 .. 2
        ("sequence_truncated", [1, 1, 1, 2, 2]),
        ("sequence_masked", [1, 1, 1, 0, 0]),
    ],
)
def test_weights_by_hand(correction, weights):
    """GRPO at ratio 1: the slope of a trained token is -v A / (N |y|), with |y| = 3 and 2 whatever the weights."""
    packed = inputs()
    out = LOSSES["grpo"](packed, LossOptions(ClipRange(0.2, 0.2), mismatch=correction, mismatch_threshold=2.0))
    one, two = [-2.0 / 6 * v for v in weights[:3]], [1.0 / 4 * v for v in weights[3:]]
    expected = torch.tensor([0, *one, *two, 0], dtype=torch.float64)
    torch.testing.assert_close(gradient(out.loss, packed), expected, rtol=0, atol=1e-14)
    assert out.table.column("num_tokens").tolist() == [3, 2]
    assert out.table.column("sum_mismatch").tolist() == pytest.approx([0, 2 * math.log(3)], abs=1e-14)


@pytest.mark.parametrize("name", ["gspo", "gspo_token"])
def test_sequence_ratios_are_weighed_too(name):
    """s = 1, A = (2, -1), weights 1 and 2: J = (2 - 2) / 2. By token, weights (2, 1/4, 1) give GSPO-token's slopes
    -v A / (N |y|) = -2 v / 6, for gspo as well, since advantages that differ by token make it that."""
    packed = inputs()
    options = LossOptions(ClipRange(3e-4, 4e-4), mismatch="sequence_truncated", mismatch_threshold=2.0)
    assert LOSSES[name](packed, options).value.item() == pytest.approx(0.0, abs=1e-15)
    out = LOSSES[name](packed, dataclasses.replace(options, mismatch="token_truncated"))
    expected = torch.tensor([-4 / 6, -0.5 / 6, -2 / 6], dtype=torch.float64)
    torch.testing.assert_close(gradient(out.loss, packed)[1:4], expected, rtol=0, atol=1e-14)


def test_no_correction_is_the_same_object():
    packed = inputs()
    assert corrected(packed, LossOptions(ClipRange(0.2, 0.2))) is packed
