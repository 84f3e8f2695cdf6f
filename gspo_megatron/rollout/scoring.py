"""Rewards of sampled responses, by each task's own scorer.

The first rank of a replica in generation scores, so that a scorer that is slow or not deterministic runs once.
"""

import math

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel.collective_errors import raise_if_any
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import RolloutGroup
from gspo_megatron.errors import GspoError, RolloutError
from gspo_megatron.tasks.mixture import TaskMixture


def score(groups: list[RolloutGroup], mixture: TaskMixture, topology: Topology, device: torch.device) -> None:
    """Fill in `rewards` by each task's own scorer. A collective over all ranks.

    Raises:
        RolloutError: a scorer failed or gave no number; on every rank alike, with the first such response.
    """
    error = None
    size = sum(len(group.completions) for group in groups)
    rewards = torch.zeros(size, dtype=torch.float64, device=device)
    ranks = dist.get_process_group_ranks(topology.model_parallel_group)
    if topology.is_first_of_replica:
        try:
            values = [_score(group, i, mixture) for group in groups for i in range(len(group.texts))]
            rewards.copy_(torch.tensor(values, dtype=torch.float64))
        except RolloutError as problem:
            error = problem
    # Those that do not score would wait in the broadcast, and other replicas in the next collective.
    raise_if_any(error, device)
    if len(ranks) > 1:
        dist.broadcast(rewards, src=ranks[0], group=topology.model_parallel_group)
    flat = rewards.tolist()
    for index, group in enumerate(groups):
        group.rewards = flat[index * len(group.completions) : (index + 1) * len(group.completions)]


def _score(group: RolloutGroup, index: int, mixture: TaskMixture) -> float:
    """The reward of one response. Whatever the scorer raises, the message names the response."""
    item, text = group.prompt.item, group.texts[index]
    where = f"response {index} to prompt {group.prompt.uid} ({item.task}), {text[:80]!r}"
    try:
        reward = float(mixture.score(item, text))
    except GspoError as error:
        raise RolloutError(f"{where}: {error}") from error
    except Exception as error:
        raise RolloutError(
            f"{where}: the scorer raised {type(error).__name__}: {error}. Take the task out of the recipe, or correct "
            "its scorer."
        ) from error
    if not math.isfinite(reward):
        raise RolloutError(f"{where}: the reward is {reward} and must be finite. Take the task out of the recipe.")
    return reward
