"""The policy network in Megatron: log-probs and optimizer steps on packed batches.

Left out: generation (rollout/megatron_engine.py), checkpoints, the critic (critic.py).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_megatron.algorithms.contract import GlobalCounts, Loss, LossInputs, LossOutputs, alone
from gspo_megatron.backend import model as model_builder
from gspo_megatron.backend import optimizer as optimizers
from gspo_megatron.backend import publication
from gspo_megatron.backend.attention import PackedPlan
from gspo_megatron.backend.network import Network, Prepare, nothing
from gspo_megatron.backend.publication import PendingStats
from gspo_megatron.backend.routing_watch import RoutingWatch
from gspo_megatron.backend.runtime import Runtime
from gspo_megatron.backend.skipped import SkippedUpdates
from gspo_megatron.backend.targets import Targets
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import TrainConfig
from gspo_megatron.data.validate import first_not_finite
from gspo_megatron.hf import load
from gspo_megatron.ops.collectives import reduce_tables
from gspo_megatron.ops.linear_logprobs import linear_logprobs
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids
from gspo_megatron.ops.vocab_logprobs import vocab_logprobs
from gspo_megatron.types import PackedBatch, SequenceStats


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step, on every pipeline stage."""

    stats: SequenceStats  # of this data-parallel replica
    grad_norm: float  # before clipping, over all ranks
    learning_rate: float
    stepped: bool  # False: nothing changed, because the gradient was exactly 0 or not finite
    not_finite: str | None = None  # what of it was not, in words, the same on every rank


class Policy:
    """Model chunks and optimizer of this rank."""

    def __init__(self, config: TrainConfig, shape: model_builder.ModelShape, topology: Topology, runtime: Runtime,
                 dtype: torch.dtype | None = None):  # fmt: skip
        """dtype overrides the recipe's params_dtype (tests use fp64)."""
        self.config, self.shape, self.topology, self.runtime = config, shape, topology, runtime
        self.temperature = config.rollout.temperature
        sharded = config.parallel.use_distributed_optimizer
        source = config.model.load_hf
        seed = config.seed if source is None else None
        chunks = model_builder.build(shape, config.model, topology, runtime, seed, sharded, dtype)
        self.network = Network(chunks, topology)
        if source is not None:
            load.load(self.models, topology, source, shape.architecture, config.model.load_hf_drop_mtp)
        self.routing = RoutingWatch(config.routing, self.models, topology)
        self.skipped = SkippedUpdates(config.faults.max_skipped_updates, "policy")

    @property
    def models(self) -> list[torch.nn.Module]:
        """The chunks without their wrappers."""
        return self.network.models

    @property
    def optimizer(self):
        """Megatron's, None until start_optimizer."""
        return self.network.optimizer

    def start_optimizer(self, warm_start: bool = False) -> None:
        """A fresh Adam with the warm start's or RL's learning-rate schedule."""
        config, network = self.config, self.network
        network.optimizer = network.schedule = None  # the old state must be gone before the new is made
        network.optimizer = optimizers.build(config.optimizer, network.chunks, self.topology, config.parallel)
        if warm_start:
            network.schedule = optimizers.warm_start_schedule(network.optimizer, config.warm_start)
        else:
            steps = config.steps * config.algorithm.num_minibatches
            network.schedule = optimizers.rl_schedule(network.optimizer, config.optimizer, steps)

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
        """log_probs with every token sent to the experts of its batch's old_routes."""
        found = self.log_probs(batches, self.routing.before_fixed)
        self.routing.after_fixed()
        return found

    @torch.no_grad()
    def log_probs(self, batches: Sequence[PackedBatch], prepare: Prepare = nothing) -> list[torch.Tensor | None]:
        """[T] fp32 (fp64 of an fp64 model) of every batch, None on all stages but the last."""
        found: dict[int, torch.Tensor] = {}

        def keep(batch: PackedBatch, plan: PackedPlan, output: torch.Tensor, non_loss_data: bool = False) -> None:
            logprobs, _, _ = self._target_log_probs(batch, plan, output)
            found[id(batch)] = logprobs.float() if logprobs.dtype is not torch.float64 else logprobs

        with self._hidden_states():
            self.network.run(batches, keep, forward_only=True, prepare=prepare)
        return [found.get(id(batch)) for batch in batches]

    def update(
        self, batches: Sequence[PackedBatch], loss: Loss, counts: GlobalCounts, step: int = 0, minibatch: int = 0
    ) -> UpdateResult:
        """One optimizer step over the microbatches of this replica. A collective over all ranks.

        Where a log-prob, an advantage or the gradient is not finite, on any rank, nothing changes on all of them, and
        the result says so.

        Args:
            batches: this replica's microbatches; every replica gives the same number. A batch without old_logprobs
                gets the log-probs of this very forward, so its ratio is 1.
            loss: algorithms/contract.py.
            counts: denominators of the whole step (batches.global_counts).
            step, minibatch: the loop's numbers, which every rank must have alike; they come back in the result.

        Raises:
            TrainingError: that happened more than faults.max_skipped_updates times in a row; on every rank, with the
                first bad place. Also where another pipeline stage is at another step.
        """
        outputs: dict[int, LossOutputs] = {}
        seen: dict[int, torch.Tensor] = {}
        order = {id(batch): index for index, batch in enumerate(batches)}

        def share(batch: PackedBatch, plan: PackedPlan, output: torch.Tensor) -> torch.Tensor:
            logprobs, entropy, own = self._target_log_probs(batch, plan, output)
            out = loss(self._loss_inputs(batch, logprobs, entropy, own, counts))
            outputs[order[id(batch)]] = LossOutputs(out.loss.detach(), out.table, out.value)
            seen[order[id(batch)]] = logprobs.detach()
            # A log-prob of -inf makes a ratio of 0 and a finite loss; it must not pass for a gradient.
            finite = torch.isfinite(out.table.values).all()
            return out.loss * torch.where(finite, 1.0, torch.nan)

        published: list[PendingStats] = []

        def publish() -> None:
            ordered = [outputs[index] for index in sorted(outputs)]
            rows = sum(batch.num_sequences for batch in batches)
            published.append(publication.start(self.topology, ordered, rows, step, minibatch, self.device))

        with self._hidden_states():
            done = self.network.step(batches, share, drained=publish, prepare=self.routing.before_update)
        stats = published[0].wait()
        self.routing.after_update(minibatch)
        if done.stepped or done.grad_norm == 0.0:
            self.skipped.passed()
            return UpdateResult(stats, done.grad_norm, done.learning_rate, done.stepped)
        reason = self._what_is_not_finite(batches, seen, done.grad_norm, done.learning_rate)
        self.skipped.skipped(reason)
        return UpdateResult(stats, done.grad_norm, done.learning_rate, done.stepped, reason)

    def publish(self, values: torch.Tensor | None, size: int) -> torch.Tensor:
        """See Network.publish."""
        return self.network.publish(values, size)

    def sums_by_sequence(
        self, batches: Sequence[PackedBatch], by_token: Callable[[PackedBatch], torch.Tensor]
    ) -> torch.Tensor:
        """sum_t m_t x_t of every sequence, [sequences of all batches] fp64 on every stage; no gradient. A collective.

        Args:
            by_token: x [T] of a batch, asked on the last stage alone: only there are log-probs. Under context
                parallelism each rank's own targets are taken from it.
        """
        sums = None
        if self.topology.is_last_stage:
            sums = torch.cat([self._sums(batch, by_token(batch)) for batch in batches])
        return self.publish(sums, sum(batch.num_sequences for batch in batches))

    def _sums(self, batch: PackedBatch, values: torch.Tensor) -> torch.Tensor:
        own = Targets.of(batch, self.network.plan(batch)).own if self.topology.cp_size > 1 else True
        kept = torch.where((batch.loss_mask > 0) & own, values.detach().double(), 0.0)
        ids = sequence_ids(batch.cu_seqlens[: batch.num_sequences + 1], batch.num_tokens)
        sums = kept.new_zeros(batch.num_sequences + 1).index_add(0, ids, kept)[:-1]
        return self.reducer()(sums.unsqueeze(1)).squeeze(1)

    @property
    def device(self) -> torch.device:
        return self.runtime.device

    def reducer(self) -> Callable[..., torch.Tensor]:
        """LossInputs.reduce of this rank's context-parallel group."""
        topology = self.topology
        if topology.cp_size == 1:
            return alone
        return lambda table, maximum=None: reduce_tables(table, topology.cp_group, maximum).wait()

    def _loss_inputs(self, batch: PackedBatch, logprobs, entropy, own, counts: GlobalCounts) -> LossInputs:
        """own: [T] bool, the targets of this context-parallel rank; None: all."""
        mask, lengths = batch.loss_mask, None
        if own is not None:
            ids = torch.repeat_interleave(torch.diff(batch.cu_seqlens[: batch.num_sequences + 1]).long())
            trained = (mask > 0).double()[: ids.numel()]
            lengths = trained.new_zeros(batch.num_sequences).index_add(0, ids, trained)
            mask = mask * own
        return LossInputs(
            logprobs=logprobs, entropy=entropy,
            old_logprobs=batch.old_logprobs if batch.old_logprobs is not None else logprobs.detach(),
            loss_mask=mask, cu_seqlens=batch.cu_seqlens, num_sequences=batch.num_sequences,
            advantages=batch.advantages, counts=counts, lengths=lengths, ref_logprobs=batch.ref_logprobs,
            rollout_logprobs=batch.rollout_logprobs, reduce=self.reducer(),
        )  # fmt: skip

    @contextmanager
    def _hidden_states(self) -> Iterator[None]:
        """Inside, the last stage returns hidden states where the recipe wants log-probs made from them in chunks."""
        last = self.models[-1]
        last.returns_hidden = bool(self.config.model.logprob_chunk_tokens)
        try:
            yield
        finally:
            last.returns_hidden = False

    def _target_log_probs(
        self, batch: PackedBatch, plan: PackedPlan, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """output [rows, V/TP] logits, or [rows, H] hidden states -> (logprobs [T], entropy [T], own [T] bool or None),
        see targets.py."""
        targets = Targets.of(batch, plan)
        group = self.topology.tp_group if self.topology.tp_size > 1 else None
        tokens, chunk = batch.tokens[targets.index], self.config.model.logprob_chunk_tokens
        if chunk:
            weight = self.models[-1].head_weight()
            # Megatron's Float16Module gives the last stage's bf16 output as fp32; going back is exact.
            hidden = output.to(weight.dtype)
            logprobs, entropy = linear_logprobs(hidden, weight, tokens, self.temperature, group, chunk)
        else:
            logprobs, entropy = vocab_logprobs(output, tokens, self.temperature, group)
        return targets.scatter(logprobs), targets.scatter(entropy), targets.own

    def _what_is_not_finite(self, batches: Sequence[PackedBatch], seen: dict, grad_norm: float, rate: float) -> str:
        """The first such number of any rank's batches, in words; the same on every rank. A collective."""
        mine = None
        for index, logprobs in sorted(seen.items()):
            where = first_not_finite(batches[index], logprobs)
            if where and mine is None:
                mine = f"rank {self.runtime.rank}, microbatch {index} of {len(batches)}: {where}"
        found: list[str | None] = [None] * self.runtime.world_size
        dist.all_gather_object(found, mine)
        return next(filter(None, found), None) or (
            f"the gradient's norm is {grad_norm} at learning rate {rate:g}, though every log-prob and advantage is "
            "finite. The weights are as before this step. Lower optimizer.lr (warm_start.lr in the warm start), or "
            "look at loss and ratio/* in the run's metrics.jsonl."
        )
