"""PPO estimates advantages over a critic's values (generalised advantage estimation), and the critic learns.

Left out: a reward for each step of a response (there is one, at its last token), and updates of the critic alone before
the policy's first.
"""

import functools
import operator

import torch
import torch.distributed as dist

from gspo_megatron.algorithms.advantages import EPS, gae, last_tokens
from gspo_megatron.algorithms.interface import GlobalCounts
from gspo_megatron.algorithms.surrogate import KL_ESTIMATORS
from gspo_megatron.backend.engine.critic import Critic, ValueStatistics
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.batch import Minibatch, PackedBatch, RolloutGroup
from gspo_megatron.config import ResolvedConfig
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids
from gspo_megatron.trainer.advantages.estimator import by_response, shaped_rewards


class CriticAdvantages:
    """This AdvantageEstimator learns. The last stage alone computes; others get each response's mean."""

    def __init__(self, config: ResolvedConfig, policy: Policy, critic: Critic):
        self.config, self.policy, self.critic = config, policy, critic
        self._learned: list[ValueStatistics | None] = []  # of this rollout batch's minibatches so far

    @torch.no_grad()
    def fill(self, groups: list[RolloutGroup], minibatches: list[Minibatch], seed: int) -> torch.Tensor:
        """Set values, advantages and returns [T] of every batch on the last stage; else see AdvantageEstimator."""
        self._learned.clear()
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        self.critic.fill_values(batches)
        rewards = shaped_rewards(groups, self.config)
        means = None
        if self.policy.topology.is_last_stage:
            for minibatch in minibatches:
                for batch, numbers in minibatch.numbered():
                    self._estimate(batch, rewards[numbers])
            if self.config.algorithm.critic.whiten_advantages:
                whiten(batches, self.policy.topology.dp_group)
            means = torch.cat([_means(batch) for batch in batches])
        rows = self.policy.from_last_stage(means, sum(batch.num_sequences for batch in batches))
        return by_response(rows, minibatches)

    def learn(self, minibatch: Minibatch, counts: GlobalCounts) -> dict[str, float]:
        """Take one critic step. Returns value/* of the minibatches since `fill`, so that the last ones are the whole
        batch's."""
        self._learned.append(self.critic.update(minibatch.batches, counts))
        done = [step for step in self._learned if step is not None]
        metrics = functools.reduce(operator.add, done).metrics() if done else {}
        return metrics | {"value/not_finite": float(len(self._learned) - len(done))}

    def _estimate(self, batch: PackedBatch, rewards: torch.Tensor) -> None:
        """Set advantages and returns of a batch from rewards [S] fp64 of whole responses."""
        critic = self.config.algorithm.critic
        penalty = self._prepare(batch)
        values = batch.filled("values")
        ids = sequence_ids(batch.cu_seqlens[: batch.num_sequences + 1], batch.num_tokens)
        last = last_tokens(batch.loss_mask, ids, batch.num_sequences)
        trained = last >= 0
        by_token = (-penalty).index_add(0, last[trained], rewards.to(penalty.device)[trained])
        advantages, returns = gae(
            by_token,
            values,
            batch.loss_mask,
            batch.cu_seqlens,
            batch.num_sequences,
            critic.gamma,
            critic.gae_lambda,
        )
        batch.advantages, batch.returns = advantages.to(values.dtype), returns.to(values.dtype)

    def _prepare(self, batch: PackedBatch) -> torch.Tensor:
        """Return kl.coef * KL_t of old against reference, [T] fp64, 0 where the mask is 0 or the penalty is not the
        reward's.

        Under context parallelism a rank knows values and log-probs of its own targets alone, but the sum over later
        tokens needs all of them: PPO alone pays for vectors of T numbers over that group, once a rollout batch.
        """
        kl = self.config.algorithm.kl
        batch.values = self._whole(batch.filled("values"))
        if not kl.is_in_reward:
            return torch.zeros_like(batch.values, dtype=torch.float64)
        sampled = self.config.algorithm.old_logprobs == "rollout"  # every rank has all of these
        old = batch.filled("old_logprobs")
        delta = (old if sampled else self._whole(old)).double() - self._whole(batch.filled("ref_logprobs")).double()
        return kl.coef * KL_ESTIMATORS[kl.estimator](torch.where(batch.loss_mask > 0, delta, 0.0))

    def _whole(self, own: torch.Tensor) -> torch.Tensor:
        """Return [T] with all targets of [T] that is 0 at other context-parallel ranks' targets."""
        topology = self.policy.topology
        if topology.cp_size == 1:
            return own
        whole = own.clone()
        dist.all_reduce(whole, group=topology.cp_group)
        return whole


def whiten(batches: list[PackedBatch], group: dist.ProcessGroup) -> None:
    """Give all trained tokens of all batches and replicas mean 0 and sample standard deviation 1, other tokens 0.

    Context-parallel ranks hold the same whole vectors, so `group` is the data-parallel one without them.
    """

    def total(*sums: torch.Tensor) -> torch.Tensor:
        message = torch.stack(sums)
        dist.all_reduce(message, group=group)
        return message

    found = torch.cat([batch.advantages[batch.loss_mask > 0].double() for batch in batches])
    count, first = total(found.new_tensor(float(found.numel())), found.sum())
    mean = first / count.clamp(min=1)
    (squares,) = total((found - mean).square().sum())  # about the mean: in one pass they would cancel
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    for batch in batches:
        scaled = (batch.advantages.double() - mean) / (std + EPS)
        batch.advantages = torch.where(batch.loss_mask > 0, scaled, 0.0).to(batch.advantages.dtype)


def _means(batch: PackedBatch) -> torch.Tensor:
    """Return [S] fp64: the mean advantage over each response's trained tokens, 0 where it has none."""
    ids = sequence_ids(batch.cu_seqlens[: batch.num_sequences + 1], batch.num_tokens)
    trained = (batch.loss_mask > 0).double()
    sums = trained.new_zeros(batch.num_sequences + 1, 2)
    sums = sums.index_add(0, ids, torch.stack([batch.advantages.double() * trained, trained], dim=1))
    return (sums[:, 0] / sums[:, 1].clamp(min=1))[:-1]
