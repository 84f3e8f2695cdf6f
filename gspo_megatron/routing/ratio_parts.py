"""How much of the ratio's spread comes with changed routes.

With the old policy's log-probs l_old, the new policy's l_free along the routes it chooses itself, and l_fixed along the
old policy's routes, every token's log-ratio is a sum of two:

    d = l_free - l_old = (l_fixed - l_old) + (l_free - l_fixed)
                          what the weights do    what the changed routes add

The parts may be correlated, so their variances need not add up to that of d. The part of the routes has in it also what
changed routes of earlier tokens do through attention.
"""

import torch

PARTS = ("total", "weights", "routes")


def token_moments(old: torch.Tensor, free: torch.Tensor, fixed: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """[3, 3] fp64: of each part over the counted tokens (number, sum, sum of squares). Add up over batches and ranks.

    Args:
        old, free, fixed: [T] log-probs.
        counted: [T] bool.
    """
    return torch.stack([_moments(part[counted]) for part in _parts(old, free, fixed)])


def sequence_moments(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[3, 3] fp64: of each part's mean over a sequence (log s and its two parts), over sequences with a trained token.

    Args:
        sums: [N, 3] fp64, sum_t m_t of each part.
        lengths: [N] fp64, |y|.
    """
    real = lengths > 0
    return torch.stack([_moments(part) for part in (sums[real] / lengths[real].unsqueeze(1)).unbind(1)])


def parts(old: torch.Tensor, free: torch.Tensor, fixed: torch.Tensor) -> torch.Tensor:
    """[T, 3] fp64, in the order of PARTS."""
    return torch.stack(_parts(old, free, fixed), dim=1)


def variances(moments: torch.Tensor) -> dict[str, float]:
    """Of each part, from [3, 3] moments; divisor n."""
    number, total, squares = moments.unbind(1)
    mean = total / number.clamp(min=1)
    return {
        name: float(value) for name, value in zip(PARTS, squares / number.clamp(min=1) - mean.square(), strict=True)
    }


def _parts(old: torch.Tensor, free: torch.Tensor, fixed: torch.Tensor) -> list[torch.Tensor]:
    old, free, fixed = old.double(), free.double(), fixed.double()
    return [free - old, fixed - old, free - fixed]


def _moments(values: torch.Tensor) -> torch.Tensor:
    return torch.stack([values.new_tensor(float(values.numel())), values.sum(), values.square().sum()])
