"""The warm start's next-token loss by hand."""

from dataclasses import replace

import pytest
import torch

from gspo_megatron.algorithms.interface import GlobalCounts
from gspo_megatron.algorithms.supervised import supervised_loss
from tests.algorithms.packed import EMPTY, MASKED, Response, gradient, pack

LONG = Response([-9.0, -1.0, -2.0, -3.0], [0.0] * 4, [0, 1, 1, 1])
SHORT = Response([-9.0, -4.0], [0.0] * 2, [0, 1])


def test_mean_over_tokens_by_hand():
    """(1 + 2 + 3 + 4) / 4 = 2.5 over the batch's tokens; a mean of the sequences' means would be (2 + 4) / 2 = 3."""
    inputs = pack([LONG, EMPTY, SHORT, MASKED], padding=2)
    out = supervised_loss(inputs)
    assert out.loss.dtype == torch.float64 and out.loss.item() == 2.5
    assert gradient(out.loss, inputs).tolist() == [0, -0.25, -0.25, -0.25, 0, -0.25, 0, 0, 0, 0]


def test_any_split_into_microbatches_gives_the_same_step():
    """With the global count of 4 tokens the shares are 6/4 and 4/4; each microbatch's own mean would give 2 and 4."""
    counts = GlobalCounts(2, 4)
    first, second = (pack([r], padding=1, counts=counts) for r in (LONG, SHORT))
    losses = supervised_loss(first).loss, supervised_loss(second).loss
    assert [loss.item() for loss in losses] == [1.5, 1.0]
    assert gradient(losses[0], first).tolist() == [0, -0.25, -0.25, -0.25, 0]
    assert gradient(losses[1], second).tolist() == [0, -0.25, 0]


def test_old_log_probs_and_advantages_play_no_part():
    """The table counts tokens and entropy (0.5 a token) and is otherwise 0."""
    inputs = pack([LONG, MASKED])
    nothing = torch.full_like(inputs.old_logprobs, torch.nan)
    out = supervised_loss(replace(inputs, old_logprobs=nothing, advantages=torch.full((2,), torch.nan)))
    assert out.loss.item() == 2.0
    assert out.table.values.tolist() == [[3, 0, 0, 0, 0, 1.5, 0, 0, 0, 0], [0] * 10]


def test_nothing_to_train_on_is_zero_not_nan():
    inputs = pack([MASKED, EMPTY])
    out = supervised_loss(inputs)
    assert out.loss.item() == 0 and gradient(out.loss, inputs).tolist() == [0, 0]


def test_gradient_against_finite_differences():
    inputs = pack([LONG, MASKED, SHORT], padding=1)
    value = lambda logprobs: supervised_loss(replace(inputs, logprobs=logprobs)).loss  # noqa: E731
    assert torch.autograd.gradcheck(value, (inputs.logprobs,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_is_fp64(dtype):
    """-(2^24 + 1 + 1) / 3 = -5592406; summed in fp32 the ones are lost. The gradient comes in the log-probs' type."""
    inputs = pack([Response([2.0**24, 1.0, 1.0], [0.0] * 3, [1, 1, 1])])
    logprobs = inputs.logprobs.detach().to(dtype).requires_grad_()
    inputs = replace(inputs, logprobs=logprobs)
    out = supervised_loss(inputs)
    assert out.loss.item() == -5592406
    assert gradient(out.loss, inputs).dtype == dtype
