"""The policy network in Megatron: log-probs and optimizer steps. The only caller of Megatron's schedules.

Scaling, in one place: a loss function returns its microbatch's share of the step's loss. Megatron divides what it
gets by the number of microbatches and DDP divides gradients by the data-parallel size, so `update` multiplies by both.

Left out: generation (rollout/megatron_engine.py), checkpoints, context parallelism.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from gspo_megatron.algorithms.contract import GlobalCounts, Loss, LossInputs, LossOutputs
from gspo_megatron.backend import model as model_builder
from gspo_megatron.backend import optimizer as optimizers
from gspo_megatron.backend.attention import PackedPlan
from gspo_megatron.backend.router_hooks import ExpertLoad
from gspo_megatron.backend.runtime import Runtime
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import TrainConfig
from gspo_megatron.data.packing import microbatches_needed, pack
from gspo_megatron.errors import TrainingError
from gspo_megatron.ops.vocab_logprobs import vocab_logprobs
from gspo_megatron.types import PackedBatch, SequenceTable, TrainSequence


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step. Loss and table are those of this data-parallel replica, on every pipeline stage."""

    loss: float  # this replica's share; the step's loss is the sum over data-parallel ranks
    table: SequenceTable  # rows in the order of the batches given to update()
    grad_norm: float  # before clipping, over all ranks
    learning_rate: float


class Policy:
    """Model chunks and optimizer of this rank."""

    def __init__(self, config: TrainConfig, shape: model_builder.ModelShape, topology: Topology, runtime: Runtime,
                 dtype: torch.dtype | None = None):  # fmt: skip
        """dtype overrides the recipe's params_dtype (tests use fp64)."""
        self.config, self.topology, self.runtime = config, topology, runtime
        self.temperature = config.rollout.temperature
        sharded = config.parallel.use_distributed_optimizer
        self.chunks = model_builder.build(shape, config.model, topology, runtime, config.seed, sharded, dtype)
        self.expert_load = ExpertLoad(self.models)
        self.optimizer = self.schedule = None  # until start_optimizer

    @property
    def models(self) -> list[model_builder.PolicyModel]:
        """The chunks without their wrappers."""
        return [model_builder.unwrap(chunk) for chunk in self.chunks]

    def start_optimizer(self, warm_start: bool = False) -> None:
        """A fresh Adam with the warm start's or RL's learning-rate schedule."""
        config = self.config
        self.optimizer = self.schedule = None  # the old state must be gone before the new is made
        self.optimizer = optimizers.build(config.optimizer, self.chunks, self.topology, config.parallel)
        if warm_start:
            self.schedule = optimizers.warm_start_schedule(self.optimizer, config.warm_start)
        else:
            steps = config.steps * config.algorithm.num_minibatches
            self.schedule = optimizers.rl_schedule(self.optimizer, config.optimizer, steps)

    def microbatches(self, sequences: Sequence[TrainSequence]) -> list[PackedBatch]:
        """This replica's share of one optimizer step, packed; as many microbatches on every replica. A collective."""
        limit, topology = self.config.max_tokens_per_microbatch, self.topology
        needed = torch.tensor([microbatches_needed(sequences, limit)], device=self.runtime.device)
        dist.all_reduce(needed, op=dist.ReduceOp.MAX, group=topology.dp_group)
        count = int(needed)
        if topology.vp_size > 1:
            count = -(-count // topology.pp_size) * topology.pp_size  # the interleaved schedule wants a multiple
        return [batch.to(self.runtime.device) for batch in pack(sequences, limit, topology.tp_size, count)]

    @torch.no_grad()
    def fill_old_log_probs(self, batches: Sequence[PackedBatch]) -> None:
        """Set old_logprobs [T] fp32 of every batch, by this engine's own forward. Only the last stage has them.

        The batches keep their packing for the update that follows, so at unchanged weights the ratio is exactly 1 on a
        CPU. (On CUDA, Megatron adds expert outputs by atomics where a token has more than two experts: measure there.)
        """

        def keep(batch: PackedBatch, logits: torch.Tensor, non_loss_data: bool = False) -> None:
            batch.old_logprobs, _ = self._target_log_probs(batch, logits)

        with self.expert_load.counting():
            self._run(batches, keep, forward_only=True)

    def update(self, batches: Sequence[PackedBatch], loss: Loss, counts: GlobalCounts) -> UpdateResult:
        """One optimizer step over the microbatches of this replica.

        Args:
            batches: this replica's microbatches; every replica gives the same number.
            loss: algorithms/contract.py.
            counts: denominators of the whole step (global_counts).

        Raises:
            TrainingError: the gradient is not finite. Megatron has stepped by then, so the weights are lost.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scale = len(batches) * self.topology.dp_size
        outputs: dict[int, LossOutputs] = {}
        order = {id(batch): index for index, batch in enumerate(batches)}

        def share(batch: PackedBatch, logits: torch.Tensor) -> tuple[torch.Tensor, dict]:
            logprobs, entropy = self._target_log_probs(batch, logits)
            out = loss(
                LossInputs(
                    logprobs, entropy, batch.old_logprobs if batch.old_logprobs is not None else logprobs.detach(),
                    batch.loss_mask, batch.cu_seqlens, batch.num_sequences, batch.advantages, counts,
                )
            )  # fmt: skip
            outputs[order[id(batch)]] = LossOutputs(out.loss.detach(), out.table)
            return out.loss * scale, {}

        self._run(batches, share, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        rate = optimizers.learning_rate(self.optimizer)
        if not math.isfinite(grad_norm):
            raise TrainingError(
                f"the gradient's norm is {float(grad_norm)} at learning rate {rate:g}. Lower optimizer.lr "
                "(warm_start.lr in the warm start), or look at loss and ratio/* in the run's metrics.jsonl."
            )
        self.schedule.step(increment=1)
        value, table = self._publish(batches, outputs)
        return UpdateResult(value, table, float(grad_norm), rate)

    def global_counts(self, batches: Sequence[PackedBatch]) -> GlobalCounts:
        """Sequences and tokens that one optimizer step trains on, over all data-parallel ranks. A collective."""
        sequences = tokens = 0
        for batch in batches:
            trained = torch.cumsum(batch.loss_mask > 0, 0)
            ends = trained[batch.cu_seqlens[1 : batch.num_sequences + 1].long() - 1]
            per_sequence = torch.diff(ends, prepend=ends.new_zeros(1))
            sequences += int((per_sequence > 0).sum())
            tokens += int(per_sequence.sum())
        counts = torch.tensor([sequences, tokens], dtype=torch.float64, device=self.runtime.device)
        dist.all_reduce(counts, group=self.topology.dp_group)
        return GlobalCounts(int(counts[0]), int(counts[1]))

    def _target_log_probs(self, batch: PackedBatch, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """logits [T, V/TP] -> (logprobs [T], entropy [T]) indexed by the target token."""
        group = self.topology.tp_group if self.topology.tp_size > 1 else None
        logprobs, entropy = vocab_logprobs(logits[:-1], batch.tokens[1:], self.temperature, group)
        # Row t-1 predicts token t; the first token of a sequence has no row of its own sequence before it.
        inside = batch.position_ids[1:] > 0
        zero = logprobs.new_zeros(1)
        return torch.cat([zero, torch.where(inside, logprobs, 0.0)]), torch.cat(
            [zero, torch.where(inside, entropy, 0.0)]
        )

    def _run(self, batches: Sequence[PackedBatch], on_logits, forward_only: bool) -> None:
        """One pass of Megatron's schedule; on_logits(batch, logits) is called on the last stage."""
        thd = "sbhd" if self.models[0].rotary_by_token else "thd"
        work = [(batch, PackedPlan.from_cu_seqlens(batch.cu_seqlens, thd)) for batch in batches]

        def forward_step(iterator: Iterator, model: torch.nn.Module):
            batch, plan = next(iterator)
            out = model(batch.tokens.unsqueeze(0), batch.position_ids.unsqueeze(0), None, packed_seq_params=plan)
            return out, partial(on_logits, batch)

        for chunk in self.chunks:
            chunk.train()
        schedule = get_forward_backward_func()
        schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(work) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=max(batch.num_tokens for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _publish(self, batches: Sequence[PackedBatch], outputs: dict[int, LossOutputs]) -> tuple[float, SequenceTable]:
        """Send the last stage's table to all stages, once the schedule has drained: inside it, a collective could
        deadlock against the schedule's own point-to-point traffic."""
        columns = len(SequenceTable.COLUMNS)
        rows = sum(batch.num_sequences for batch in batches)
        if self.topology.is_last_stage:
            ordered = [outputs[index] for index in range(len(batches))]
            values = torch.cat([out.table.values for out in ordered]).flatten()
            message = torch.cat([values, torch.stack([out.loss for out in ordered]).sum().double().view(1)])
        else:
            message = torch.empty(rows * columns + 1, dtype=torch.float64, device=self.runtime.device)
        if self.topology.pp_size > 1:
            dist.broadcast(message, src=self.topology.stage_ranks[-1], group=self.topology.feedback_group)
        return float(message[-1]), SequenceTable(message[:-1].view(rows, columns))
