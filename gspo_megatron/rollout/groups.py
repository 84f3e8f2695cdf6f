"""From prompts to rewarded groups, and from groups to training sequences: the data of one RL step.

Every rank of a data-parallel replica holds the replica's groups; the first of them scores, so that a scorer that is
slow or not deterministic runs once.
"""

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from gspo_megatron.algorithms.advantages import group_advantages
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import AlgorithmConfig
from gspo_megatron.metrics.reduce import gather_rows
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampling import SamplingParams, uniforms
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.types import Prompt, RolloutGroup, TrainSequence


def generate(engine: MegatronEngine, prompts: list[Prompt], group_size: int, params: SamplingParams, seed: int,
             tokenizer: PreTrainedTokenizerBase) -> list[RolloutGroup]:  # fmt: skip
    """Sample this replica's share of `prompts` (all of the step's, the same on every rank; a multiple of the
    data-parallel size). `seed` fixes the samples whatever the layout."""
    topology = engine.topology
    share = len(prompts) // topology.dp_size
    mine = slice(topology.dp_rank * share, (topology.dp_rank + 1) * share)
    rows = slice(mine.start * group_size, mine.stop * group_size)
    uniform = uniforms(len(prompts) * group_size, params.max_tokens, seed)[rows]
    completions = engine.generate(prompts[mine], group_size, params, uniform)
    return [
        RolloutGroup(prompt, answers, texts=[tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in answers])
        for prompt, answers in zip(prompts[mine], completions, strict=True)
    ]


def score(groups: list[RolloutGroup], mixture: TaskMixture, topology: Topology, device: torch.device) -> None:
    """Fill in `rewards` by each task's own scorer."""
    size = sum(len(group.completions) for group in groups)
    rewards = torch.zeros(size, dtype=torch.float64, device=device)
    ranks = dist.get_process_group_ranks(topology.model_parallel_group)
    if dist.get_rank() == ranks[0]:
        values = [mixture.score(group.prompt.item, text) for group in groups for text in group.texts]
        rewards.copy_(torch.tensor(values, dtype=torch.float64))
    if len(ranks) > 1:
        dist.broadcast(rewards, src=ranks[0], group=topology.model_parallel_group)
    flat = rewards.tolist()
    for index, group in enumerate(groups):
        group.rewards = flat[index * len(group.completions) : (index + 1) * len(group.completions)]


def advantages(groups: list[RolloutGroup], algorithm: AlgorithmConfig, seed: int) -> torch.Tensor:
    """[P * G] fp64; the control run permutes them over the replica's batch."""
    rewards = torch.tensor([r for group in groups for r in group.rewards], dtype=torch.float64)
    values = group_advantages(rewards, len(groups[0].completions), algorithm.normalize_advantage_by_std)
    if algorithm.shuffle_advantages:
        values = values[torch.randperm(values.numel(), generator=torch.Generator().manual_seed(seed))]
    return values


def train_sequences(groups: list[RolloutGroup], values: torch.Tensor) -> list[TrainSequence]:
    """One sequence a response, in the order of `values` [P * G]."""
    flat = [(group, index) for group in groups for index in range(len(group.completions))]
    return [
        TrainSequence(
            token_ids=group.prompt.token_ids + group.completions[index].token_ids,
            prompt_length=len(group.prompt.token_ids),
            advantage=advantage,
            reward=group.rewards[index],
            group_id=group.prompt.uid,
            truncated=group.completions[index].truncated,
            rollout_logprobs=group.completions[index].logprobs,
        )
        for (group, index), advantage in zip(flat, values.tolist(), strict=True)
    ]


def minibatches(sequences: list[TrainSequence], count: int, seed: tuple[int, ...]) -> list[list[TrainSequence]]:
    """`count` equal parts of a seeded permutation: a minibatch mixes groups, as fresh data would."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    return [[sequences[i] for i in part] for part in np.split(order, count)]


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
