"""Advantages come from each rollout batch's own groups, or from a critic. rl.py asks whichever the recipe names.

Both see the packed minibatches after old and reference log-probs are there, so that a KL penalty can be part of the
reward. GroupAdvantages is here; CriticAdvantages, which also learns, is in advantages/critic.py.
"""

from typing import Protocol

import torch

from gspo_megatron.algorithms.advantages import group_advantages
from gspo_megatron.algorithms.dapo import overlong_penalty
from gspo_megatron.algorithms.interface import GlobalCounts
from gspo_megatron.algorithms.surrogate import KL_ESTIMATORS
from gspo_megatron.backend.engine.critic import Critic
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.batch import Minibatch, RolloutGroup
from gspo_megatron.config import ResolvedConfig, TrainConfig


class AdvantageEstimator(Protocol):
    """Fills in advantages, and may learn from what it filled in."""

    @property
    def critic(self) -> Critic | None:
        """Return the network that learns, if one does."""

    def fill(self, groups: list[RolloutGroup], minibatches: list[Minibatch], seed: int) -> torch.Tensor:
        """Set `advantages` of every batch. Returns [P * G] fp64, one a response (its tokens' mean), on every rank."""

    def learn(self, minibatch: Minibatch, counts: GlobalCounts) -> dict[str, float]:
        """Take one optimizer step of its own on the minibatch that the policy has just learned from. Returns
        metrics."""


class GroupAdvantages:
    """Compares rewards within each group. It has nothing to learn."""

    critic = None

    def __init__(self, config: ResolvedConfig, policy: Policy):
        self.config, self.policy = config, policy

    def fill(self, groups: list[RolloutGroup], minibatches: list[Minibatch], seed: int) -> torch.Tensor:
        """Do as AdvantageEstimator says. The reward is the task's plus the penalties of the recipe.

        With dynamic sampling (algorithm.resampling_rounds), a group without signal has the advantage 0.
        """
        algorithm = self.config.algorithm
        rewards = shaped_rewards(groups, self.config)
        if algorithm.kl.place == "reward" and algorithm.kl.coef:
            rewards = rewards - algorithm.kl.coef * kl_by_response(self.policy, minibatches, algorithm.kl.estimator)
        values = group_advantages(rewards, _compared(groups), algorithm.normalize_advantage_by_std)
        if algorithm.resampling_rounds:
            values = values.masked_fill(_without_signal(groups), 0.0)
        if algorithm.shuffle_advantages:
            values = _shuffled(values, groups, seed)
        for minibatch in minibatches:
            for batch, numbers in minibatch.numbered():
                batch.advantages = values[numbers].float().to(batch.tokens.device)
        return values

    def learn(self, minibatch: Minibatch, counts: GlobalCounts) -> dict[str, float]:
        return {}


def shaped_rewards(groups: list[RolloutGroup], config: TrainConfig) -> torch.Tensor:
    """Return [P * G] fp64: the task's reward, less what the soft length penalty takes (DAPO)."""
    algorithm = config.algorithm
    rewards = torch.tensor([r for group in groups for r in group.rewards], dtype=torch.float64)
    lengths = torch.tensor([len(c.token_ids) for group in groups for c in group.completions])
    limit = config.rollout.max_response_length
    buffer = max(limit // 5, 1) if algorithm.overlong_buffer is None else algorithm.overlong_buffer
    return rewards + overlong_penalty(lengths, limit, buffer, algorithm.overlong_penalty)


def _compared(groups: list[RolloutGroup]) -> torch.Tensor:
    """Return [P * G] int64: equal numbers are compared. A response without a reward is alone, so its advantage is 0."""
    ids, alone = [], -1
    for group in groups:
        for is_kept in group.is_kept:
            ids.append(group.prompt.uid if is_kept else alone)
            alone -= not is_kept
    return torch.tensor(ids)


def _without_signal(groups: list[RolloutGroup]) -> torch.Tensor:
    """Return [P * G] bool: the response is of a group without signal.

    Dynamic sampling trains on none of them (DAPO, section 3.2). Those that fill a batch would otherwise learn from
    their penalties alone, which normalisation blows up to the size of a reward.
    """
    return torch.tensor([not group.has_signal for group in groups for _ in group.completions])


def kl_by_response(policy: Policy, minibatches: list[Minibatch], estimator: str) -> torch.Tensor:
    """Return sum_t m_t KL_t of old against reference, [P * G] fp64 in the order of responses, on every stage."""
    estimate = KL_ESTIMATORS[estimator]
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]

    def by_token(number: int) -> torch.Tensor:
        batch = batches[number]
        return estimate(batch.filled("old_logprobs").double() - batch.filled("ref_logprobs").double())

    rows = policy.sums_by_sequence(batches, by_token)
    return by_response(rows, minibatches)


def by_response(rows: torch.Tensor, minibatches: list[Minibatch]) -> torch.Tensor:
    """Put [P * G] fp64 in the order of packing into the order of responses, on the CPU."""
    numbers = [number for minibatch in minibatches for _, numbers in minibatch.numbered() for number in numbers]
    return torch.empty_like(rows, device="cpu").index_copy(0, torch.tensor(numbers), rows.cpu())


def _shuffled(values: torch.Tensor, groups: list[RolloutGroup], seed: int) -> torch.Tensor:
    """Put each group's advantages in another order, whatever the layout: the control run."""
    parts = values.split([len(group.completions) for group in groups])
    shuffled = []
    for group, part in zip(groups, parts, strict=True):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + group.prompt.uid) % 2**63)
        kept = torch.tensor(group.is_kept).nonzero().squeeze(1)
        part = part.clone()
        part[kept] = part[kept[torch.randperm(kept.numel(), generator=generator)]]
        shuffled.append(part)
    return torch.cat(shuffled)
