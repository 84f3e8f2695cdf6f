"""Group-normalised advantages (GRPO, arXiv 2402.03300, section 4.1.2; GSPO, arXiv 2507.18071, equation 6)."""

import torch

EPS = 1e-6


def group_advantages(rewards: torch.Tensor, group_size: int, normalize_by_std: bool = True) -> torch.Tensor:
    """A_i = (r_i - mean of its group) / (sample std of its group + 1e-6).

    Args:
        rewards: [P * G] fp32 or fp64, the G responses of a prompt next to each other.
        group_size: G >= 2.
        normalize_by_std: False keeps r_i - mean (Dr. GRPO, arXiv 2503.20783).

    Returns:
        [P * G] fp64. A group whose rewards are all equal gets 0.

    Raises:
        ValueError: rewards that do not fill whole groups, or are not finite (the message has the first bad index).
    """
    if group_size < 2 or rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not fill groups of {group_size} (2 or more)")
    bad = (~torch.isfinite(rewards)).nonzero()
    if bad.numel():
        raise ValueError(f"rewards[{int(bad[0])}] = {rewards[int(bad[0])].item()} is not finite")
    groups = rewards.double().view(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards become exactly 0, which subtracting a rounded mean does not give
    centred = groups - groups.mean(dim=1, keepdim=True)
    if normalize_by_std:
        centred = centred / (groups.std(dim=1, keepdim=True) + EPS)
    return centred.flatten()
