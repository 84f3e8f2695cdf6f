"""Correction for the gap between what sampled the responses and what trains on them (rollout against old log-probs).

An importance weight v = exp(old - rollout), by token or by sequence (there the geometric mean of the tokens' weights),
multiplies the advantage. It is never negative, so it passes through min and clip unchanged. A weight of 0 takes a
token's gradient away but leaves |y_i| and every denominator as they were.

Truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
2025. Masking: IcePop, 2025. Left out: a weight on the product over a sequence, whose spread grows with its length.
"""

import dataclasses
from collections.abc import Callable

import torch

from gspo_megatron.algorithms.checks import entry, given
from gspo_megatron.algorithms.interface import LossInputs, LossOptions


def _truncated(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    return weight.clamp(max=threshold)


def _masked(weight: torch.Tensor, threshold: float) -> torch.Tensor:
    return torch.where((weight >= 1 / threshold) & (weight <= threshold), weight, 0.0)


Bound = Callable[[torch.Tensor, float], torch.Tensor]
CORRECTIONS: dict[str, tuple[bool, Bound] | None] = {  # name -> (by token, weight and threshold -> weight)
    "none": None,
    "token_truncated": (True, _truncated),
    "token_masked": (True, _masked),
    "sequence_truncated": (False, _truncated),
    "sequence_masked": (False, _masked),
}


def corrected(inputs: LossInputs, options: LossOptions) -> LossInputs:
    """Multiply the advantages of `inputs` by the weights; [T] instead of [S] where the weights differ by token."""
    correction = entry(CORRECTIONS, options.mismatch, "mismatch")
    if correction is None:
        return inputs
    by_token, bound = correction
    rollout = given(inputs.rollout_logprobs, "rollout_logprobs", ", or mismatch none")
    difference = inputs.old_logprobs.double() - rollout.double()  # [T]
    if by_token:
        difference = torch.where(inputs.loss_mask > 0, difference, 0.0)
        advantages = inputs.token_advantages.double() * bound(difference.exp(), options.mismatch_threshold)
    else:
        mean = inputs.reduce(inputs.sum_by_sequence(difference).unsqueeze(1)).squeeze(1) / inputs.token_lengths.clamp(
            min=1
        )
        weight = bound(mean.exp(), options.mismatch_threshold)  # [S]
        weight = inputs.by_token(weight) if inputs.has_token_advantages else weight
        advantages = inputs.given_advantages.double() * weight
    return dataclasses.replace(inputs, advantages=advantages)
