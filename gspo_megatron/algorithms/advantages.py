"""Advantages: normalised within a group (GRPO, arXiv 2402.03300, section 4.1.2; GSPO, arXiv 2507.18071, equation 6), or
estimated by a critic (generalised advantage estimation, arXiv 1506.02438, equation 16)."""

import torch

EPS = 1e-6


def group_advantages(rewards: torch.Tensor, group_ids: torch.Tensor, normalize_by_std: bool = True) -> torch.Tensor:
    """Compute A_i = (r_i - mean of its group) / (sample std of its group + 1e-6).

    Args:
        rewards: [N] fp32 or fp64.
        group_ids: [N] int64; equal numbers are one group, groups may differ in size.
        normalize_by_std: False keeps r_i - mean (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [N] fp64. A group whose rewards are all equal gets 0, and so does a response that is alone in its group.

    Raises:
        ValueError: shapes that differ, or a reward that is not finite (the message has the first bad index).
    """
    if rewards.shape != group_ids.shape or rewards.dim() != 1:
        raise ValueError(
            f"rewards have shape {list(rewards.shape)} and group_ids {list(group_ids.shape)}: both must be [N], one a "
            "response. Check the rollout engine."
        )
    bad = (~torch.isfinite(rewards)).nonzero()
    if bad.numel():
        raise ValueError(
            f"rewards[{int(bad[0])}] = {rewards[int(bad[0])].item()} must be finite. Check the scorer of that response."
        )
    _, group = torch.unique(group_ids, return_inverse=True)  # [N], 0 to number of groups - 1
    number = int(group.max()) + 1 if group.numel() else 0
    total = rewards.new_zeros(number, dtype=torch.float64)
    size = total.index_add(0, group, torch.ones_like(rewards, dtype=torch.float64))
    # Equal rewards become exactly 0 when the group's largest is taken off first; subtracting a rounded mean does not.
    largest = total.scatter_reduce(0, group, rewards.double(), "amax", include_self=False)
    shifted = rewards.double() - largest[group]
    centred = shifted - (total.index_add(0, group, shifted) / size)[group]
    if normalize_by_std:
        variance = total.index_add(0, group, centred.square()) / (size - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + EPS)[group]
    return centred


def last_tokens(loss_mask: torch.Tensor, ids: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """Find each sequence's last trained token, [S] int64; -1 where it has none.

    Args:
        loss_mask: [T]. ids: [T] int64, the sequence of each token, S at padding.
    """
    place = torch.where(loss_mask > 0, torch.arange(ids.numel(), device=ids.device), -1)
    return place.new_full((num_sequences + 1,), -1).scatter_reduce(0, ids, place, "amax")[:num_sequences]


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_sequences: int,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, over trained tokens.

    Tokens with mask 0 between two trained ones (another's turn) are stepped over: "next" means the next trained token.
    V_t is the value before token t was chosen; after the last trained token it is 0.

    Args:
        rewards, values, loss_mask: [T]; rewards of each token. cu_seqlens: [>= S+1] int32.

    Returns:
        (advantages, returns = advantages + values), both [T] fp64, 0 where the mask is 0.
    """
    trained = loss_mask > 0
    rewards, values = rewards.double(), values.double()
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    bounds = cu_seqlens[: num_sequences + 1].tolist()
    sequences = [trained[a:b].nonzero().squeeze(1) + a for a, b in zip(bounds, bounds[1:], strict=False)]
    longest = max((places.numel() for places in sequences), default=0)
    # All sequences at once, from their last trained token backwards: [S, longest], right-aligned, -1 where none is.
    index = torch.full((len(sequences), longest), -1, dtype=torch.int64, device=values.device)
    for row, places in enumerate(sequences):
        index[row, longest - places.numel() :] = places
    ahead = later = values.new_zeros(len(sequences))
    for column in range(longest - 1, -1, -1):
        places = index[:, column]
        real = places >= 0
        at = places.clamp(min=0)
        delta = rewards[at] + gamma * ahead - values[at]
        later = torch.where(real, delta + gamma * lam * later, later)
        ahead = torch.where(real, values[at], ahead)
        advantages[places[real]] = later[real]
        returns[places[real]] = (later + values[at])[real]
    return advantages, returns
