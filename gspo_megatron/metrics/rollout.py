"""This computes reward/*, advantage/* and response/* of one RL step, over all replicas."""

from collections import defaultdict

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.batch import RolloutGroup
from gspo_megatron.metrics.reduce import gather_rows

COLUMNS = 7  # of a response, before its advantage


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
            float(rewarded.is_kept[i]),
            tasks.index(rewarded.prompt.item.task),
            len(c.token_ids),
            float(c.truncated),
            len(rewarded.prompt.token_ids),
            float(not rewarded.has_signal),
        )
        for rewarded in groups
        for i, c in enumerate(rewarded.completions)
    ]
    table = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), COLUMNS)
    local = torch.cat([table, _zero_groups(groups, values).view(-1, 1), values.view(-1, 1)], dim=1).to(device)
    reward, is_kept, task, length, truncated, prompt, flat, zero, advantage = gather_rows(local, group).unbind(1)
    kept = is_kept > 0
    metrics = {
        "reward/mean": reward[kept].mean(),
        "reward/std": reward[kept].std(correction=0),
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
        if bool((kept & (task == index)).any()):
            metrics[f"reward/{name}"] = reward[kept & (task == index)].mean()
    return {key: float(value) for key, value in metrics.items()} | part_metrics(groups, group)


def part_metrics(groups: list[RolloutGroup], group: dist.ProcessGroup) -> dict[str, float]:
    """Return what reward functions gave before weights, reward/TASK/FUNCTION, each a mean over the responses that it
    applied to; reward/errors, the number of responses that one failed at, and reward/left_out, those without a reward.
    Nothing for tasks whose scorers have no parts. A collective over `group`."""
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for rewarded in groups:
        for score in rewarded.scores:
            for name, value in score.parts.items():
                _add(sums[f"reward/{rewarded.prompt.item.task}/{name}"], value)
            if score.parts or score.error:
                _add(sums["reward/errors"], float(score.error is not None))
                _add(sums["reward/left_out"], float(score.reward is None))
    everyone = gather_objects(dict(sums), group)
    names = sorted({name for part in everyone for name in part})
    totals = {name: [sum(part.get(name, (0.0, 0.0))[i] for part in everyone) for i in (0, 1)] for name in names}
    counts = ("reward/errors", "reward/left_out")
    return {name: total if name in counts else total / number for name, (total, number) in totals.items()}


def _add(sums: list[float], value: float) -> None:
    sums[0] += value
    sums[1] += 1.0


def _zero_groups(groups: list[RolloutGroup], values: torch.Tensor) -> torch.Tensor:
    """Return [P * G] fp64: 1 at responses of a group whose advantages are all 0, so that nothing is learned from it.

    Not the same as equal rewards: penalties may tell such responses apart.
    """
    parts = values.split([len(group.completions) for group in groups])
    return torch.cat([values[:0], *(torch.full_like(part, float(not part.any())) for part in parts)])
