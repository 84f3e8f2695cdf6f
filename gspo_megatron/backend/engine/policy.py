"""The policy network in Megatron: log-probs and optimizer steps on packed batches.

Left out: the weights of a Hugging Face folder (hf/load.py fills them in), generation (rollout/megatron_engine.py),
checkpoints, the critic (critic.py).
"""

from collections.abc import Callable, Sequence

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from gspo_megatron.algorithms.interface import GlobalCounts, Loss, LossOutputs
from gspo_megatron.backend.engine import microbatches as packing
from gspo_megatron.backend.engine import optimizer as optimizers
from gspo_megatron.backend.engine.logprob_head import LogProbHead
from gspo_megatron.backend.engine.network import BeforeForward, Microbatch, Network, nothing
from gspo_megatron.backend.engine.nonfinite_guard import NonfiniteGuard, describe_nonfinite
from gspo_megatron.backend.engine.routing_watch import RoutingWatch
from gspo_megatron.backend.engine.targets import Targets
from gspo_megatron.backend.model import builder as model_builder
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel.pipeline_broadcast import PendingStats, publish_results
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch, TrainSequence, UpdateResult
from gspo_megatron.config import ResolvedConfig
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids


class Policy:
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
        self.config, self.shape, self.topology, self.runtime = config, shape, topology, runtime
        sharded = config.parallel.use_distributed_optimizer
        seed = config.seed if config.model.load_hf is None else None  # hf/load.py fills in a folder's weights
        chunks = model_builder.build(shape, config.model, topology, runtime, seed, sharded, dtype)
        self.network = Network(chunks, topology)
        chunk_tokens = config.model.logprob_chunk_tokens
        self.head = LogProbHead(self.models[-1], topology, config.rollout.temperature, chunk_tokens)
        self.routing = RoutingWatch(config.routing, self.models, topology)
        self.guard = NonfiniteGuard(config.faults.max_skipped_updates, "policy")

    @property
    def models(self) -> list[PackedModel]:
        """The chunks without their wrappers."""
        return self.network.models

    @property
    def optimizer(self) -> MegatronOptimizer | None:
        """Megatron's optimizer; it is None until start_optimizer."""
        return self.network.optimizer

    def start_optimizer(self, warm_start: bool = False) -> None:
        """Make a fresh Adam with the warm start's or RL's learning-rate schedule."""
        config, network = self.config, self.network
        network.optimizer = network.schedule = None  # the old state must be gone before the new is made
        network.optimizer = optimizers.build(config.optimizer, network.chunks, self.topology, config.parallel)
        if warm_start:
            network.schedule = optimizers.warm_start_schedule(network.optimizer, config.warm_start)
        else:
            steps = config.steps * config.algorithm.num_minibatches
            network.schedule = optimizers.rl_schedule(network.optimizer, config.optimizer, steps)

    def microbatches(self, sequences: Sequence[TrainSequence], unit: int = 1) -> list[PackedBatch]:
        """Pack this replica's share of one optimizer step within the recipe's limit. A collective over data
        parallelism.

        Args:
            unit: so many neighbours stay in one microbatch (2 for pairs).
        """
        return packing.microbatches(sequences, self.config.max_tokens_per_microbatch, self.topology, self.device, unit)

    def fill_old_log_probs(self, batches: Sequence[PackedBatch]) -> None:
        """Set old_logprobs [T] fp32 of every batch, by this engine's own forward. Only the last stage has them.

        The batches keep their packing for the update that follows, so at unchanged weights the ratio is exactly 1 on a
        CPU. (On CUDA, Megatron adds expert outputs by atomics where a token has more than two experts: measure there.)
        Under context parallelism each rank has those of its own tokens, and 0 elsewhere.
        """
        for batch, logprobs in zip(batches, self.log_probs(batches, self.routing.before_old), strict=True):
            batch.old_logprobs = logprobs
        self.routing.after_old()

    def fill_ref_log_probs(self, batches: Sequence[PackedBatch]) -> None:
        """Set ref_logprobs [T] fp32 likewise, at the weights as they are now (see reference.FrozenReference)."""
        for batch, logprobs in zip(batches, self.log_probs(batches), strict=True):
            batch.ref_logprobs = logprobs

    def log_probs_along_old_routes(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor | None]:
        """Compute log_probs with every token sent to the experts of its batch's old_routes."""
        found = self.log_probs(batches, self.routing.before_fixed)
        self.routing.after_fixed()
        return found

    @torch.no_grad()
    def log_probs(
        self, batches: Sequence[PackedBatch], before_forward: BeforeForward = nothing
    ) -> list[torch.Tensor | None]:
        """Compute [T] fp32 (fp64 of an fp64 model) of every batch; None on all stages but the last."""
        found: list[torch.Tensor | None] = [None] * len(batches)

        def keep(micro: Microbatch, output: torch.Tensor, non_loss_data: bool = False) -> None:
            logprobs = self.head(micro, output).logprobs
            found[micro.number] = logprobs if logprobs.dtype is torch.float64 else logprobs.float()

        with self.head.hidden_states():
            self.network.run(batches, keep, forward_only=True, before_forward=before_forward)
        return found

    def update(
        self, batches: Sequence[PackedBatch], loss: Loss, counts: GlobalCounts, step: int = 0, minibatch: int = 0
    ) -> UpdateResult:
        """Make one optimizer step over the microbatches of this replica. A collective over all ranks.

        Where a log-prob, an advantage or the gradient is not finite, on any rank, nothing changes on all of them, and
        the result says so.

        Args:
            batches: this replica's microbatches; every replica gives the same number. A batch without old_logprobs
                gets the log-probs of this very forward, so its ratio is 1.
            loss: algorithms/interface.py.
            counts: denominators of the whole step (microbatches.global_counts).
            step, minibatch: the loop's numbers, which every rank must have alike; they come back in the result.

        Raises:
            TrainingError: that happened more than faults.max_skipped_updates times in a row; on every rank, with the
                first bad place. Also where another pipeline stage is at another step.
        """
        outputs: dict[int, LossOutputs] = {}
        seen: dict[int, torch.Tensor] = {}

        def loss_fn(micro: Microbatch, output: torch.Tensor) -> torch.Tensor:
            new = self.head(micro, output)
            out = loss(self.head.loss_inputs(micro.batch, new, counts))
            outputs[micro.number] = LossOutputs(out.loss.detach(), out.table, out.value)
            seen[micro.number] = new.logprobs.detach()
            # A log-prob of -inf makes a ratio of 0 and a finite loss; it must not pass for a gradient.
            finite = torch.isfinite(out.table.values).all()
            return out.loss * torch.where(finite, 1.0, torch.nan)

        pending: list[PendingStats] = []

        def after_backward() -> None:
            ordered = [outputs[number] for number in sorted(outputs)]
            rows = sum(batch.num_sequences for batch in batches)
            pending.append(publish_results(self.topology, ordered, rows, step, minibatch, self.device))

        with self.head.hidden_states():
            done = self.network.step(batches, loss_fn, after_backward, before_forward=self.routing.before_update)
        stats = pending[0].wait()
        self.routing.after_update(minibatch)
        if done.stepped or done.grad_norm == 0.0:
            self.guard.passed()
            return UpdateResult(stats, done.grad_norm, done.learning_rate, done.stepped)
        reason = describe_nonfinite(batches, seen, done.grad_norm, done.learning_rate, self.runtime)
        self.guard.skipped(reason)
        return UpdateResult(stats, done.grad_norm, done.learning_rate, done.stepped, reason)

    def from_last_stage(self, values: torch.Tensor | None, size: int) -> torch.Tensor:
        """See Network.from_last_stage."""
        return self.network.from_last_stage(values, size)

    def sums_by_sequence(self, batches: Sequence[PackedBatch], by_token: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """Sum m_t x_t over each sequence: [sequences of all batches] fp64 on every stage; no gradient. A collective.

        Args:
            by_token: x [T] of a batch by its number, asked on the last stage alone: only there are log-probs. Under
                context parallelism each rank's own targets are taken from it.
        """
        sums = None
        if self.topology.is_last_stage:
            sums = torch.cat([self._sums(batch, by_token(number)) for number, batch in enumerate(batches)])
        return self.from_last_stage(sums, sum(batch.num_sequences for batch in batches))

    def _sums(self, batch: PackedBatch, values: torch.Tensor) -> torch.Tensor:
        own = Targets.of(batch, self.network.plan(batch)).own if self.topology.cp_size > 1 else None
        trained = batch.loss_mask > 0 if own is None else (batch.loss_mask > 0) & own
        kept = torch.where(trained, values.detach().double(), 0.0)
        ids = sequence_ids(batch.cu_seqlens[: batch.num_sequences + 1], batch.num_tokens)
        sums = kept.new_zeros(batch.num_sequences + 1).index_add(0, ids, kept)[:-1]
        return self.head.reduce(sums.unsqueeze(1)).squeeze(1)

    @property
    def device(self) -> torch.device:
        return self.runtime.device
