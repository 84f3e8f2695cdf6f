"""Brings to every pipeline stage what the last one alone knows, once an optimizer step and asynchronously.

The results of all microbatches travel in one message on a process group of its own, after the pipeline schedule has
drained and while the optimizer works. The message says of which step and minibatch it is, and a stage that expects
another one stops instead of joining a stale table with its own statistics.

Left out: sums over data-parallel ranks; decisions that all ranks must share are taken from those (network.py's gradient
norm, collective_errors.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_megatron.algorithms.interface import LossOutputs
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import SequenceStats, SequenceTable
from gspo_megatron.errors import TrainingError
from gspo_megatron.ops.collectives import Pending, Ready, publish

HEADER = 4  # numbers before the table: step, minibatch, sequences, loss


def from_last_stage(topology: Topology, values: torch.Tensor | None, size: int, device: torch.device) -> Pending:
    """Starts to bring `values` [size] fp64 of the last stage to every stage; see ops.collectives.publish."""
    if topology.is_last_stage:
        assert values is not None
        message = values.contiguous()
    else:
        message = torch.empty(size, dtype=torch.float64, device=device)
    if topology.pp_size == 1:
        return Ready(message)
    root = dist.get_group_rank(topology.publish_group, topology.stage_ranks[-1])
    return publish(message, topology.publish_group, root)


@dataclass(frozen=True)
class PendingStats:
    """SequenceStats on their way to this rank."""

    message: Pending
    expected: tuple[int, int, int]  # step, minibatch, sequences
    stage: int

    def wait(self) -> SequenceStats:
        """Blocks until they are there.

        Raises:
            TrainingError: they are not of this step, minibatch and size.
            LostRankError: a stage has ended or hangs.
        """
        message = self.message.wait()
        step, minibatch, rows = found = tuple(int(x) for x in message[: HEADER - 1])
        if found != self.expected:
            wanted = "step {}, minibatch {} ({} sequences)".format(*self.expected)
            raise TrainingError(
                f"pipeline stage {self.stage} waits for the results of {wanted} and got those of step {step}, "
                f"minibatch {minibatch} ({rows} sequences): the stages no longer run the same loop. Every rank must "
                "make the same calls of update() with the same numbers."
            )
        table = message[HEADER:].view(rows, len(SequenceTable.COLUMNS))
        return SequenceStats(step, minibatch, float(message[HEADER - 1]), SequenceTable(table))


def publish_results(
    topology: Topology, outputs: Sequence[LossOutputs], rows: int, step: int, minibatch: int, device: torch.device
) -> PendingStats:
    """Starts to publish one optimizer step's results. A collective over the stages, called once the schedule is done.

    Args:
        outputs: of all microbatches, in their order; empty on all stages but the last.
        rows: sequences of all microbatches.
    """
    message = None
    if topology.is_last_stage:
        loss = torch.stack([out.value for out in outputs]).sum().double().view(1)
        numbers = torch.tensor([step, minibatch, rows], dtype=torch.float64, device=device)
        message = torch.cat([numbers, loss, *(out.table.values.flatten() for out in outputs)])
    size = HEADER + rows * len(SequenceTable.COLUMNS)
    return PendingStats(from_last_stage(topology, message, size, device), (step, minibatch, rows), topology.pp_rank)
