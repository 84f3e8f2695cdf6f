"""From a replica's training sequences to microbatches on its device, and the counts of the whole step.

All replicas run as many microbatches, and an error that one replica finds in its data is raised on all. Each
context-parallel rank of a replica packs the same sequences into the same batches, whole; which tokens it feeds through
the model is decided there (attention.py), so collectives over data parallelism alone count everything once.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from gspo_megatron.algorithms.interface import GlobalCounts
from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch, TrainSequence
from gspo_megatron.data.packing import microbatches_needed, pack, padding_alone
from gspo_megatron.data.validate import check_batch
from gspo_megatron.errors import GspoError


def microbatches(
    sequences: Sequence[TrainSequence], max_tokens: int, topology: Topology, device: torch.device, unit: int = 1
) -> list[PackedBatch]:
    """Pack this replica's share of one optimizer step; every replica gets as many microbatches. A collective.

    With virtual stages their number is a multiple of the pipeline's stages. Where there are not as many sequences, the
    rest are microbatches of padding alone, which count nowhere: no sequence, no token, no gradient.

    Args:
        max_tokens: of one microbatch.
        unit: so many neighbours stay in one microbatch (2 for pairs).
    """
    error, needed, multiple = None, 0, topology.sequence_multiple
    try:
        needed = microbatches_needed(sequences, max_tokens, unit, multiple)
    except GspoError as problem:
        error = problem
    agreed = torch.tensor([needed, error is not None], device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=topology.dp_group)
    count, failed = agreed.tolist()
    if not failed:
        if topology.vp_size > 1:
            count = -(-count // topology.pp_size) * topology.pp_size  # the interleaved schedule wants a multiple
        try:
            filled = min(count, len(sequences) // unit)
            batches = pack(sequences, max_tokens, topology.microbatch_multiple, filled, unit, multiple)
            for batch in batches:
                check_batch(batch)
            batches += [padding_alone(batches[0], topology.microbatch_multiple) for _ in range(count - filled)]
        except GspoError as problem:
            error = problem
        failed = torch.tensor([error is not None], device=device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=topology.dp_group)
    if failed:
        raise_together(error, topology.dp_group)
    return [batch.to(device) for batch in batches]


def global_counts(batches: Sequence[PackedBatch], topology: Topology) -> GlobalCounts:
    """Count the sequences and tokens of one optimizer step, over all data-parallel ranks. A collective.

    A step without a trained token (all its responses were cut, and are masked) counts as one: its sums are 0, whatever
    divides them.
    """
    sequences = tokens = 0
    for batch in batches:
        trained = torch.cumsum(batch.loss_mask > 0, 0)
        ends = trained[batch.cu_seqlens[1 : batch.num_sequences + 1].long() - 1]
        per_sequence = torch.diff(ends, prepend=ends.new_zeros(1))
        sequences += int((per_sequence > 0).sum())
        tokens += int(per_sequence.sum())
    counts = torch.tensor([sequences, tokens], dtype=torch.float64, device=batches[0].tokens.device)
    dist.all_reduce(counts, group=topology.dp_group)
    return GlobalCounts(max(int(counts[0]), 1), max(int(counts[1]), 1))
