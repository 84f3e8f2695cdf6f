"""The plain formulas behind ops/token_surrogate.py in PyTorch, for any device: what the kernels are tested against."""

import torch

from gspo_megatron.ops import sequence_ratio_reference as sequences

# After the columns of the sequence ratio: trained tokens that lost their gradient to the lower and to an upper bound,
# and sum_t m_t min(r_t A_t, clip(r_t) A_t).
SURROGATE_COLUMNS = ("clipped_low", "clipped_high", "objective")


def token_terms(log_ratio, advantage, clip_low, clip_high, clip_dual):
    """Compute each token's share of the objective, its slope, and what lost its gradient.

    Args:
        log_ratio, advantage: [T] fp64; both 0 where a token is not trained.

    Returns:
        (objective [T], its derivative by log_ratio [T], low [T] bool, high [T] bool: what lost its gradient to the
        lower bound, and to an upper one).
    """
    ratio = log_ratio.exp()
    up, down = advantage > 0, advantage < 0
    low = (ratio < 1 - clip_low) & down
    high = (ratio > 1 + clip_high) & up | (ratio > clip_dual) & down
    # A ratio may be infinite where it is clipped or has no weight: its product is not used there.
    slope = torch.where(low | high | (advantage == 0), 0.0, ratio * advantage)
    # full_like: torch.where of two plain numbers would round the bound to fp32.
    bound = torch.where(up, torch.full_like(ratio, 1 + clip_high), clip_dual).masked_fill(low, 1 - clip_low)
    return torch.where(low | high, bound * advantage, slope), slope, low, high


def token_surrogate_forward(logp_new, logp_old, mask, cu_seqlens, entropy, advantages, clip_low, clip_high, clip_dual):
    check_tokens(logp_new, logp_old, mask, cu_seqlens, entropy, advantages)
    partials = sequences.sequence_partials(logp_new, logp_old, mask, cu_seqlens, entropy, None)
    log_ratio, advantage, ids = _by_token(logp_new, logp_old, mask, cu_seqlens, advantages)
    objective, _, low, high = token_terms(log_ratio, advantage, clip_low, clip_high, clip_dual)
    added = torch.stack([low.double(), high.double(), objective], dim=1)
    size = cu_seqlens.numel() - 1
    table = torch.cat([partials, added.new_zeros(size + 1, 3).index_add(0, ids, added)[:size]], dim=1)
    return table[:, -1].clone(), table


def token_surrogate_backward(grad, logp_new, logp_old, mask, cu_seqlens, advantages, clip_low, clip_high, clip_dual):
    check_tokens(logp_new, logp_old, mask, cu_seqlens, None, advantages)
    sequences.check_boundaries(cu_seqlens, logp_new.numel())
    size = cu_seqlens.numel() - 1
    if list(grad.shape) != [size] or grad.dtype != torch.float64 or grad.device != logp_new.device:
        raise ValueError(f"grad must be [{size}] fp64 on {logp_new.device}")
    log_ratio, advantage, ids = _by_token(logp_new, logp_old, mask, cu_seqlens, advantages)
    slope = token_terms(log_ratio, advantage, clip_low, clip_high, clip_dual)[1]
    factor = torch.cat([grad, grad.new_zeros(1)])[ids]
    return torch.where((mask > 0) & (ids < size), slope * factor, 0.0).to(logp_new.dtype)


def _by_token(logp_new, logp_old, mask, cu_seqlens, advantages):
    """(log-ratio [T], advantage [T], both fp64 and 0 where not trained, sequence [T])."""
    ids = sequences.sequence_ids(cu_seqlens, logp_new.numel())
    if advantages.numel() == cu_seqlens.numel() - 1:
        advantages = torch.cat([advantages, advantages.new_zeros(1)])[ids]
    keep = mask > 0
    log_ratio = torch.where(keep, logp_new.double() - logp_old.double(), 0.0)
    return log_ratio, torch.where(keep, advantages.double(), 0.0), ids


def check_tokens(logp_new, logp_old, mask, cu_seqlens, entropy, advantages) -> None:
    """Check types, shapes and devices of the forward; the C++ library makes the same checks."""
    sequences.check_tokens(logp_new, logp_old, mask, cu_seqlens, entropy, None)
    sequences.check_advantages(advantages, cu_seqlens.numel() - 1, logp_new)
