"""From prompts to rewarded groups, and from groups to training sequences: the data of one RL step.

Every rank of a replica in generation (a data-parallel and context-parallel rank) holds the replica's groups; the first
of them scores, so that a scorer that is slow or not deterministic runs once. Training wants the groups of all
context-parallel ranks together, because those share each sequence: `join_context` brings them there.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gspo_megatron.backend.agreement import raise_together
from gspo_megatron.backend.topology import Topology
from gspo_megatron.errors import GspoError, RolloutError
from gspo_megatron.metrics.reduce import gather_rows
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams, uniforms
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.types import Prompt, RolloutGroup, TrainSequence


def generate(engine: MegatronEngine, prompts: list[Prompt], group_size: int, params: SamplingParams, seed: int,
             tokenizer: PreTrainedTokenizerBase) -> list[RolloutGroup]:  # fmt: skip
    """Sample this replica's share of `prompts` (all of the step's, the same on every rank; a multiple of
    Topology.replicas). `seed` fixes the samples whatever the layout."""
    topology = engine.topology
    share = len(prompts) // topology.replicas
    mine = slice(topology.dp_cp_rank * share, (topology.dp_cp_rank + 1) * share)
    rows = slice(mine.start * group_size, mine.stop * group_size)
    uniform = uniforms(len(prompts) * group_size, params.max_tokens, seed)[rows]
    completions = engine.generate(prompts[mine], group_size, params, uniform)
    return [
        RolloutGroup(prompt, answers, texts=[tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in answers])
        for prompt, answers in zip(prompts[mine], completions, strict=True)
    ]


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
    # Those that do not score would wait in the broadcast, and other replicas in the next collective. One number is
    # cheaper than to ask for the error itself.
    failed = torch.tensor([error is not None], device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed:
        raise_together(error)
    if len(ranks) > 1:
        dist.broadcast(rewards, src=ranks[0], group=topology.model_parallel_group)
    flat = rewards.tolist()
    for index, group in enumerate(groups):
        group.rewards = flat[index * len(group.completions) : (index + 1) * len(group.completions)]


def join_context(groups: list[RolloutGroup], topology: Topology) -> list[RolloutGroup]:
    """The scored groups of all context-parallel ranks, in the order of the prompts. A collective over them.

    They travel as objects: a step's token ids and log-probs are kilobytes to a few megabytes, once a step, against the
    seconds that sampling them took; packing them into tensors would save nothing that can be measured.
    """
    if topology.cp_size == 1:
        return groups
    everyone: list = [None] * topology.cp_size
    dist.all_gather_object(everyone, groups, group=topology.cp_group)
    return [group for part in everyone for group in part]


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


def train_sequences(groups: list[RolloutGroup]) -> list[TrainSequence]:
    """One sequence a response, group after group. Advantages come later (estimator.py)."""
    return [
        TrainSequence(
            token_ids=group.prompt.token_ids + completion.token_ids,
            prompt_length=len(group.prompt.token_ids),
            reward=reward,
            group_id=group.prompt.uid,
            truncated=completion.truncated,
            rollout_logprobs=completion.logprobs,
            routes=completion.routes,
        )
        for group in groups for completion, reward in zip(group.completions, group.rewards, strict=True)
    ]  # fmt: skip


def minibatch_indices(groups: list[RolloutGroup], count: int, seed: tuple[int, int]) -> list[list[int]]:
    """Numbers of this replica's responses in each of `count` minibatches, the same share of every group in each.

    Responses of a group are shuffled by (seed, its prompt's uid) and dealt out in turn, so who is in which minibatch
    does not depend on how many replicas there are.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    place = 0
    for group in groups:
        order = np.random.default_rng((*seed, group.prompt.uid)).permutation(len(group.completions))
        for index in order:
            parts[place % count].append(place - place % len(order) + int(index))
            place += 1
    return parts


def group_metrics(groups: list[RolloutGroup], values: torch.Tensor, tasks: list[str], topology: Topology,
                  device: torch.device) -> dict[str, float]:  # fmt: skip
    """Reward, advantage and response metrics over all replicas. A collective over data parallelism."""
    rows = [
        (group.rewards[i], tasks.index(group.prompt.item.task), len(c.token_ids), float(c.truncated),
         len(group.prompt.token_ids), float(max(group.rewards) == min(group.rewards)))
        for group in groups for i, c in enumerate(group.completions)
    ]  # fmt: skip
    local = torch.cat([torch.tensor(rows, dtype=torch.float64), values.view(-1, 1)], dim=1).to(device)
    reward, task, length, truncated, prompt, flat, advantage = gather_rows(local, topology.dp_group).unbind(1)
    metrics = {
        "reward/mean": reward.mean(), "reward/std": reward.std(correction=0),
        "advantage/mean": advantage.mean(), "advantage/std": advantage.std(correction=0),
        "advantage/min": advantage.min(), "advantage/max": advantage.max(), "advantage/zero_groups": flat.mean(),
        "response/length": length.mean(), "response/length_max": length.max(), "response/truncated": truncated.mean(),
        "tokens": (length + prompt).sum(),
    }  # fmt: skip
    for index, name in enumerate(tasks):
        if bool((task == index).any()):
            metrics[f"reward/{name}"] = reward[task == index].mean()
    return {key: float(value) for key, value in metrics.items()}
