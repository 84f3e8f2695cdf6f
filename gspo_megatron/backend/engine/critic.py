"""PPO's critic in Megatron: values of packed batches, and optimizer steps on the returns.

A model of the policy's shape and layout with a value head, and an optimizer of its own. Left out: checkpoints, and a
critic that is smaller than the policy.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from gspo_megatron.algorithms.checks import given
from gspo_megatron.algorithms.interface import GlobalCounts
from gspo_megatron.algorithms.ppo import value_loss
from gspo_megatron.backend.engine import optimizer as optimizers
from gspo_megatron.backend.engine.network import Microbatch, Network
from gspo_megatron.backend.engine.nonfinite_guard import NonfiniteGuard
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.engine.targets import Targets
from gspo_megatron.backend.model import builder as model_builder
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.model.value_head import ValueModel
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch
from gspo_megatron.config import ResolvedConfig


@dataclasses.dataclass(frozen=True)
class ValueStatistics:
    """Sums over the trained tokens of one or more critic updates, over all ranks; the same on every rank."""

    updates: float
    loss: float  # of all updates together
    clipped: float  # tokens whose gradient the value clip took
    tokens: float
    value: float  # sum_t V_t, before the update
    returns: float  # sum_t R_t
    squared_returns: float
    error: float  # sum_t R_t - V_t
    squared_error: float

    def __add__(self, other: "ValueStatistics") -> "ValueStatistics":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return ValueStatistics(*(a + b for a, b in pairs))

    def metrics(self) -> dict[str, float]:
        """Return value/*. Explained variance is 1 - Var(R - V) / Var(R): 1 is a perfect critic, 0 as good as a
        constant; it is left out where all returns are equal."""
        n = max(self.tokens, 1.0)
        found = {
            "value/loss": self.loss / self.updates,
            "value/clip_fraction": self.clipped / n,
            "value/mean": self.value / n,
            "value/return": self.returns / n,
        }
        variance = self.squared_returns / n - (self.returns / n) ** 2
        if variance > 1e-12 * max(self.squared_returns / n, 1e-12):
            residual = self.squared_error / n - (self.error / n) ** 2
            found["value/explained_variance"] = 1.0 - residual / variance
        return found


class Critic:
    """Model chunks and optimizer of this rank."""

    def __init__(
        self,
        config: ResolvedConfig,
        shape: ModelShape,
        topology: Topology,
        runtime: Runtime,
        dtype: torch.dtype | None = None,
    ):
        """dtype overrides the recipe's params_dtype (tests use fp64)."""
        self.config, self.topology, self.runtime = config, topology, runtime
        sharded = config.parallel.use_distributed_optimizer
        chunks = model_builder.build(shape, config.model, topology, runtime, config.seed, sharded, dtype, ValueModel)
        self.network = Network(chunks, topology)
        self.guard = NonfiniteGuard(config.faults.max_skipped_updates, "critic")

    @property
    def models(self) -> list[PackedModel]:
        """The chunks without their wrappers."""
        return self.network.models

    @property
    def optimizer(self) -> MegatronOptimizer | None:
        """Megatron's optimizer; it is None until start_optimizer."""
        return self.network.optimizer

    @torch.no_grad()
    def start_from(self, policy: Policy) -> None:
        """Take the policy's weights as they are now, but for the head. Both have the same layout. This comes before
        start_optimizer, which copies weights to fp32."""
        for mine, theirs in zip(self.models, policy.models, strict=True):
            weights = dict(theirs.named_parameters())
            for name, parameter in mine.named_parameters():
                if not name.startswith("value_head."):
                    parameter.copy_(weights[name])
            for own, other in zip(*(parameters.router_biases(m, self.topology) for m in (mine, theirs)), strict=True):
                own.local.copy_(other.local)

    def start_optimizer(self) -> None:
        """Make a fresh Adam, as the recipe's optimizer but for the learning rate, constant after its own warm-up."""
        critic, network = self.config.algorithm.critic, self.network
        constant = dataclasses.replace(self.config.optimizer, lr_decay_style="constant", min_lr=0.0)
        own = dataclasses.replace(constant, lr=critic.lr, warmup_steps=critic.warmup_steps)
        network.optimizer = optimizers.build(own, network.chunks, self.topology, self.config.parallel)
        steps = self.config.steps * self.config.algorithm.num_minibatches
        network.schedule = optimizers.rl_schedule(network.optimizer, own, steps)

    @torch.no_grad()
    def fill_values(self, batches: Sequence[PackedBatch]) -> None:
        """Set values [T] fp32 of every batch: V_t is the value before token t is chosen. Only the last stage has them.

        The first token of a sequence has 0. Under context parallelism each rank has those of its own targets, and 0
        elsewhere.
        """

        def keep(micro: Microbatch, output: torch.Tensor, non_loss_data: bool = False) -> None:
            micro.batch.values = Targets.of(micro.batch, micro.plan).scatter(output)

        self.network.run(batches, keep, forward_only=True)

    def update(self, batches: Sequence[PackedBatch], counts: GlobalCounts) -> ValueStatistics | None:
        """Make one optimizer step on the returns of this replica's microbatches. A collective over all ranks.

        Args:
            batches: with values and returns [T] on the last stage; every replica gives the same number.
            counts: denominators of the whole step (microbatches.global_counts).

        None: the gradient is not finite, and nothing has changed.

        Raises:
            TrainingError: that happened more than faults.max_skipped_updates times in a row; on every rank.
        """
        sums: list[torch.Tensor] = []
        clip = self.config.algorithm.critic.clip_value

        def loss_fn(micro: Microbatch, output: torch.Tensor) -> torch.Tensor:
            batch, targets = micro.batch, Targets.of(micro.batch, micro.plan)
            values = targets.scatter(output)
            mask = batch.loss_mask if targets.own is None else batch.loss_mask * targets.own
            old, returns = given(batch.values, "values"), given(batch.returns, "returns")
            loss, clipped = value_loss(values, old, returns, mask, clip, counts.num_tokens)
            sums.append(_sums(loss.detach(), clipped, values.detach(), returns, mask))
            return loss

        step = self.network.step(batches, loss_fn)
        total = self._add_up(sums)
        if math.isfinite(step.grad_norm):
            self.guard.passed()
            return total
        self.guard.skipped(
            f"the critic's gradient norm is {step.grad_norm} at learning rate {step.learning_rate:g}: over "
            f"{total.tokens:.0f} tokens the mean value is {total.value / max(total.tokens, 1):g} and the mean "
            f"return {total.returns / max(total.tokens, 1):g}. The critic's weights are as before this step. If "
            "the return is finite, lower algorithm.critic.lr, else look at the rewards."
        )
        return None

    def _add_up(self, sums: list[torch.Tensor]) -> ValueStatistics:
        """The microbatches' sums, over all ranks, on every stage."""
        topology, size, message = self.topology, len(dataclasses.fields(ValueStatistics)) - 1, None
        if topology.is_last_stage:
            message = torch.stack(sums).sum(0)
            for group in (topology.dp_group, topology.cp_group):
                if dist.get_world_size(group) > 1:
                    dist.all_reduce(message, group=group)
        return ValueStatistics(1.0, *self.network.from_last_stage(message, size).tolist())


def networks(policy: Policy, critic: Critic | None) -> dict[str, Network]:
    """Return what learns, by the prefix of its tensors' names in a checkpoint."""
    return {"": policy.network} | ({"critic.": critic.network} if critic else {})


def _sums(
    loss: torch.Tensor, clipped: torch.Tensor, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The fields of ValueStatistics after `updates`, fp64."""
    trained = mask > 0
    value, wanted = (torch.where(trained, x.double(), 0.0) for x in (values, returns))
    error = wanted - value
    return torch.stack(
        [
            loss,
            clipped,
            trained.double().sum(),
            value.sum(),
            wanted.sum(),
            wanted.square().sum(),
            error.sum(),
            error.square().sum(),
        ]
    )
