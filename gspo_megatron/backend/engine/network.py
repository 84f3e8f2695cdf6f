"""Model chunks of this rank with their optimizer, and one way to run them: Megatron's schedules are called here alone.

Scaling, in one place: `step` is given each microbatch's share of the step's loss. Megatron multiplies what it gets by
the context-parallel size and divides it by the number of microbatches, and DDP divides gradients by data-parallel times
context-parallel size; so `step` multiplies by the number of microbatches and the data-parallel size.

Left out: what is computed from the outputs (policy.py, critic.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from gspo_megatron.backend.engine import optimizer as optimizers
from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.model import builder as model_builder
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.parallel.pipeline_broadcast import from_last_stage
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch
from gspo_megatron.process import progress


@dataclass(frozen=True)
class Microbatch:
    """One microbatch on its way through the pipeline."""

    number: int  # from 0, its place among the batches that were given
    batch: PackedBatch
    plan: PackedPlan


BeforeForward = Callable[[list[Microbatch]], None]


def nothing(work: list[Microbatch]) -> None:
    pass


@dataclass(frozen=True)
class StepResult:
    """What Megatron's optimizer said; the same on every rank."""

    grad_norm: float  # before clipping, over all ranks; nan or inf: the weights were left alone
    learning_rate: float
    stepped: bool  # False where the gradient was zero or not finite


class Network:
    """Chunks (one a virtual stage), optimizer and learning-rate schedule."""

    def __init__(self, chunks: list[DistributedDataParallel], topology: Topology):
        self.chunks, self.topology = chunks, topology
        self.optimizer: MegatronOptimizer | None = None
        self.schedule: OptimizerParamScheduler | None = None

    @property
    def training(self) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
        """Optimizer and schedule, where they are needed. Raises RuntimeError if they have not been made."""
        if self.optimizer is None or self.schedule is None:
            raise RuntimeError("the network has no optimizer: call start_optimizer() first")
        return self.optimizer, self.schedule

    @property
    def models(self) -> list[PackedModel]:
        """The chunks without their wrappers."""
        return [model_builder.unwrap(chunk) for chunk in self.chunks]

    def plan(self, batch: PackedBatch) -> PackedPlan:
        """Plan how attention and context parallelism see the batch."""
        cp_group = self.topology.cp_group if self.topology.cp_size > 1 else None
        qkv_format = "thd" if self.models[0].uses_transformer_engine else "sbhd"
        return PackedPlan.from_cu_seqlens(batch.cu_seqlens, qkv_format, cp_group)

    def run(
        self,
        batches: Sequence[PackedBatch],
        on_output: Callable,
        forward_only: bool,
        before_forward: BeforeForward = nothing,
    ) -> None:
        """Make one pass of Megatron's schedule; on_output(microbatch, output) is called on the last stage.

        The output has one row a token that this rank feeds: all tokens, or `plan.rows` under context parallelism.
        before_forward is given all microbatches before the first of them runs.
        """
        work = [Microbatch(number, batch, self.plan(batch)) for number, batch in enumerate(batches)]
        before_forward(work)

        def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
            micro = next(iterator)
            progress.detail(f"microbatch {micro.number + 1} of {len(batches)}")
            plan, tokens, positions = micro.plan, micro.batch.tokens, micro.batch.position_ids
            if plan.rows is not None:
                tokens, positions = tokens[plan.rows], positions[plan.rows]
            out = model(tokens.unsqueeze(0), positions.unsqueeze(0), None, packed_seq_params=plan)
            return out, partial(on_output, micro)

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

    def step(
        self,
        batches: Sequence[PackedBatch],
        loss_fn: Callable[[Microbatch, torch.Tensor], torch.Tensor],
        after_backward: Callable[[], None] = lambda: None,
        before_forward: BeforeForward = nothing,
    ) -> StepResult:
        """Compute gradients of all microbatches and make one optimizer step. A collective over all ranks.

        A gradient of exactly zero, or one that is not finite, changes nothing: no weight, no moment, no learning rate.

        Args:
            batches: this replica's microbatches; every replica gives the same number.
            loss_fn: (microbatch, output) -> the microbatch's share of the step's loss [], differentiable.
            after_backward: called once all microbatches have been through the pipeline, before the optimizer begins.
            before_forward: see run.
        """
        optimizer, schedule = self.training
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        scale = len(batches) * self.topology.dp_size

        def scaled(micro: Microbatch, output: torch.Tensor) -> tuple[torch.Tensor, dict]:
            return loss_fn(micro, output) * scale, {}

        self.run(batches, scaled, forward_only=False, before_forward=before_forward)
        after_backward()
        progress.detail("optimizer")
        rate = optimizers.learning_rate(optimizer)
        # Asked before the step: Megatron would step first and tell afterwards.
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if grad_norm == 0.0 or not math.isfinite(grad_norm):
            return StepResult(grad_norm, rate, False)
        optimizers.step(optimizer, grad_norm)
        schedule.step(increment=1)
        return StepResult(grad_norm, rate, True)

    def from_last_stage(self, values: torch.Tensor | None, size: int) -> torch.Tensor:
        """Bring [size] fp64 of the last stage to every stage. Only where no schedule is running."""
        return from_last_stage(self.topology, values, size, next(self.models[0].parameters()).device).wait()
