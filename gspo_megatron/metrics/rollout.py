"""This computes reward/*, advantage/* and response/* of one RL step, over all replicas."""

import torch
import torch.distributed as dist

from gspo_megatron.batch import RolloutGroup
from gspo_megatron.metrics.reduce import gather_rows


def group_metrics(
    groups: list[RolloutGroup], values: torch.Tensor, tasks: list[str], group: dist.ProcessGroup, device: torch.device
) -> dict[str, float]:
    """Return reward, advantage and response metrics over all replicas. A collective.

    Args:
        values: [P * G] fp64, advantages in the order of the responses.
        tasks: names of the recipe's tasks.
        group: data-parallel ranks.
    """
    rows = [
        (
            rewarded.rewards[i],
            tasks.index(rewarded.prompt.item.task),
            len(c.token_ids),
            float(c.truncated),
            len(rewarded.prompt.token_ids),
            float(not rewarded.has_signal),
        )
        for rewarded in groups
        for i, c in enumerate(rewarded.completions)
    ]
    table = torch.tensor(rows, dtype=torch.float64)
    local = torch.cat([table, _zero_groups(groups, values).view(-1, 1), values.view(-1, 1)], dim=1).to(device)
    reward, task, length, truncated, prompt, flat, zero, advantage = gather_rows(local, group).unbind(1)
    metrics = {
        "reward/mean": reward.mean(),
        "reward/std": reward.std(correction=0),
        "reward/equal_groups": flat.mean(),
        "advantage/mean": advantage.mean(),
        "advantage/std": advantage.std(correction=0),
        "advantage/min": advantage.min(),
        "advantage/max": advantage.max(),
        "advantage/zero_groups": zero.mean(),
        "response/length": length.mean(),
        "response/length_max": length.max(),
        "response/truncated": truncated.mean(),
        "tokens": (length + prompt).sum(),
    }
    for index, name in enumerate(tasks):
        if bool((task == index).any()):
            metrics[f"reward/{name}"] = reward[task == index].mean()
    return {key: float(value) for key, value in metrics.items()}


def _zero_groups(groups: list[RolloutGroup], values: torch.Tensor) -> torch.Tensor:
    """Return [P * G] fp64: 1 at responses of a group whose advantages are all 0, so that nothing is learned from it.

    Not the same as equal rewards: penalties may tell such responses apart.
    """
    parts = values.split([len(group.completions) for group in groups])
    return torch.cat([torch.full_like(part, float(not part.any())) for part in parts])
