"""How much of the ratio's spread comes with changed routes.

With the old policy's log-probs l_old, the new policy's l_free along the routes it chooses itself, and l_fixed along the
old policy's routes, every token's log-ratio is a sum of two:

    d = l_free - l_old = (l_fixed - l_old) + (l_free - l_fixed)
                         what the weights do  what the changed routes add

The parts may be correlated, so their variances need not add up to that of d. In the part of the routes there is also
what changed routes of earlier tokens do through attention.
"""

import torch

PARTS = ("total", "weights", "routes")


def log_ratio_parts(old: torch.Tensor, free: torch.Tensor, fixed: torch.Tensor) -> list[torch.Tensor]:
    """Take the log-ratio apart: [T] log-probs -> the PARTS, [T] fp64 each."""
    old, free, fixed = old.double(), free.double(), fixed.double()
    return [free - old, fixed - old, free - fixed]


def spread(lengths: torch.Tensor, sums: torch.Tensor, squares: torch.Tensor) -> dict[str, float]:
    """Compute variances (divisor n) of each part over tokens, and of its mean over sequences (log s and its parts).

    Args:
        lengths: [N] fp64, |y_i|.
        sums, squares: [N, 3] fp64, sum_t m_t x and sum_t m_t x^2 of each part.

    Returns:
        ratio_parts/token_<part>, ratio_parts/sequence_<part>; empty where no sequence has a trained token.
    """
    real = lengths > 0
    if not bool(real.any()):
        return {}
    lengths, sums, squares = lengths[real], sums[real], squares[real]
    tokens = lengths.sum()
    by_token = squares.sum(0) / tokens - (sums.sum(0) / tokens).square()
    by_sequence = (sums / lengths.unsqueeze(1)).var(0, correction=0)
    return {
        f"ratio_parts/{kind}_{part}": float(value)
        for kind, values in (("token", by_token), ("sequence", by_sequence))
        for part, value in zip(PARTS, values, strict=True)
    }
