"""Shared pieces of the losses: sums by sequence, sequence ratio, clipping, and the table of diagnostics."""

import torch

from gspo_megatron.algorithms.contract import ClipRange, LossInputs
from gspo_megatron.types import SequenceTable


def sequence_ids(cu_seqlens: torch.Tensor, num_sequences: int, num_tokens: int) -> torch.Tensor:
    """[T] int64: which sequence each token belongs to; tokens of a padding segment get S, one past the last."""
    boundaries = cu_seqlens[1 : num_sequences + 1].long()
    return torch.searchsorted(boundaries, torch.arange(num_tokens, device=cu_seqlens.device), right=True)


def sequence_sum(values: torch.Tensor, ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """[T] -> [S] fp64 sums; differentiable. Padding tokens (id S) are dropped."""
    out = torch.zeros(num_sequences + 1, dtype=torch.float64, device=values.device)
    return out.index_add(0, ids, values.double())[:num_sequences]


def masked_log_ratio(inputs: LossInputs) -> torch.Tensor:
    """d_t = logp_new - logp_old where the mask is 1, else 0. [T] fp64, differentiable, never clamped by token."""
    difference = inputs.logprobs.double() - inputs.old_logprobs.double()
    return torch.where(inputs.loss_mask > 0, difference, 0.0)


def clipped_surrogate(ratio: torch.Tensor, advantages: torch.Tensor, clip: ClipRange) -> torch.Tensor:
    """min(s A, clip(s, 1 - low, 1 + high) A), elementwise (PPO, arXiv 1707.06347, equation 7)."""
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip.low, 1 + clip.high) * advantages)


def clipped_sides(ratio: torch.Tensor, advantages: torch.Tensor, clip: ClipRange) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high) booleans: where the clip took the gradient away, that is where the minimum chose the clipped term."""
    return (ratio < 1 - clip.low) & (advantages < 0), (ratio > 1 + clip.high) & (advantages > 0)


@torch.no_grad()
def sequence_table(
    inputs: LossInputs, log_ratio: torch.Tensor, ids: torch.Tensor, low: torch.Tensor, high: torch.Tensor
) -> SequenceTable:
    """The diagnostics of one microbatch.

    Args:
        log_ratio: [T] fp64, 0 where masked.
        ids: [T] sequence of each token.
        low, high: [T] bool, tokens whose gradient was clipped away.

    KL(old || new) per token from samples of the old policy: k1 = -d; k3 = exp(d) - 1 - d (Schulman, "Approximating KL
    divergence"), both summed over the trained tokens.
    """
    size = inputs.num_sequences
    mask = inputs.loss_mask.double()
    magnitude = torch.zeros(size + 1, dtype=torch.float64, device=ids.device)
    magnitude = magnitude.scatter_reduce(0, ids, log_ratio.abs(), "amax")[:size]
    columns = {
        "num_tokens": sequence_sum(mask, ids, size),
        "sum_log_ratio": sequence_sum(log_ratio, ids, size),
        "sum_sq_log_ratio": sequence_sum(log_ratio.square(), ids, size),
        "sum_k3": sequence_sum((log_ratio.expm1() - log_ratio) * mask, ids, size),
        "max_abs_log_ratio": magnitude,
        "sum_entropy": sequence_sum(inputs.entropy.double() * mask, ids, size),
        "clipped_low_tokens": sequence_sum(low.double() * mask, ids, size),
        "clipped_high_tokens": sequence_sum(high.double() * mask, ids, size),
    }
    return SequenceTable(torch.stack([columns[name] for name in SequenceTable.COLUMNS], dim=1))
