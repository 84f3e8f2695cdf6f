"""DAPO (arXiv 2503.14476): a wider upper clip bound, the mean over tokens, resampled groups, a soft length penalty.

J = (1/M) sum_i sum_t m_it min(r_it A_i, clip(r_it, 1 - low, 1 + high) A_i), M the trained tokens of the whole step

(equation 8). Clip-higher leaves rare tokens room to grow: 0.2 / 0.28 (section 3.1). Groups with one reward for all have
no gradient and are sampled anew (section 3.2; trainer/collect.py). The mean over tokens lets long responses weigh
by their length (section 3.3). Responses near the limit lose reward by `overlong_penalty` (section 3.4, equation 13).
"""

import torch

from gspo_megatron.algorithms.interface import LossInputs, LossOptions, LossOutputs
from gspo_megatron.algorithms.surrogate import token_surrogate


def dapo_loss(inputs: LossInputs, options: LossOptions) -> LossOutputs:
    """Compute -J of this microbatch; advantages [S]. `options.aggregation` is token_mean."""
    inputs.check()
    return token_surrogate(inputs, options)


def overlong_penalty(lengths: torch.Tensor, limit: int, buffer: int, factor: float) -> torch.Tensor:
    """Return what is added to rewards: 0 up to limit - buffer tokens, then linearly down to -factor at the limit.

    Args:
        lengths: [N] response tokens.
        limit: rollout.max_response_length.
        buffer: tokens below the limit where the penalty begins; 0: no penalty.

    Returns:
        [N] fp64, 0 or negative.
    """
    if buffer == 0:
        return torch.zeros_like(lengths, dtype=torch.float64)
    return -factor * ((lengths.double() - (limit - buffer)) / buffer).clamp(0, 1)
