"""Advantages come from each rollout batch's own groups, or from a critic. rl.py asks whichever the recipe names.

Both see the packed minibatches after old and reference log-probs are there, so that a KL penalty can be part of the
reward. GroupAdvantages is here; CriticAdvantages, which also learns, is in advantages/critic.py.
"""

from collections.abc import Sequence
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
from gspo_megatron.trainer.advantages.units import Key, Unit, compared, fill_tokens, means, units_of


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

        With dynamic sampling (algorithm.resampling_rounds), a group without signal has the advantage 0; signal is that
        of whole responses. Advantages are [S], or [T] where each turn has its own (algorithm.advantage_level).
        """
        algorithm = self.config.algorithm
        rewards = shaped_rewards(groups, self.config)
        if algorithm.kl.is_in_reward:
            rewards = rewards - algorithm.kl.coef * kl_by_response(self.policy, minibatches, algorithm.kl.estimator)
        by_turn = algorithm.advantage_level == "turn"
        units = units_of(groups, by_turn)
        before = torch.tensor([unit.before for unit in units], dtype=torch.float64)
        returns = rewards[[unit.response for unit in units]] - before
        values = group_advantages(returns, compared(units), algorithm.normalize_advantage_by_std)
        if algorithm.resampling_rounds:
            # Dynamic sampling trains on no group without signal (DAPO, section 3.2). Those that fill a batch would
            # otherwise learn from their penalties alone, which normalisation blows up to the size of a reward.
            values = values.masked_fill(torch.tensor([not unit.has_signal for unit in units]), 0.0)
        if algorithm.shuffle_advantages:
            values = _shuffled(values, units, seed)
        if by_turn:
            fill_tokens(minibatches, units, values)
            return means(units, values)
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


def _shuffled(values: torch.Tensor, units: Sequence[Unit], seed: int) -> torch.Tensor:
    """Put the advantages of units that are compared in another order, whatever the layout: the control run."""
    places: dict[Key, list[int]] = {}
    for place, unit in enumerate(units):
        if unit.key is not None:
            places.setdefault(unit.key, []).append(place)
    shuffled, generators = values.clone(), {}
    for uid, turn in sorted(places):
        if uid not in generators:
            generators[uid] = torch.Generator().manual_seed((seed * 1_000_003 + uid) % 2**63)
        kept = torch.tensor(places[uid, turn])
        shuffled[kept] = values[kept[torch.randperm(kept.numel(), generator=generators[uid])]]
    return shuffled
