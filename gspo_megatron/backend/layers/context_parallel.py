"""Context parallelism of packed sequences: who feeds which tokens, and attention over all of them.

Every sequence is cut into 2 CP equal chunks, and rank r takes chunks r and 2 CP - 1 - r of each (zig-zag): a causal
query costs as much as it has tokens before it, and one early chunk plus one late chunk cost the same on every rank. It
is the order that Transformer Engine's packed attention expects. On the CPU each rank gathers all keys and values
(forward: one all-gather each; backward: the gradients go back and are added in rank order), and its queries attend to
them.

Left out: ring attention, which would hold the keys and values of one rank at a time. Transformer Engine does that on
CUDA; this way of using it has not been run by us.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_megatron.backend.layers.ragged import LengthGroup, Order, Ragged, permuted
from gspo_megatron.backend.layers.softmax import Softmax


@dataclass(frozen=True)
class ChunkGroup:
    """This rank's two chunks of each of s sequences of (nearly) one length, with n tokens a chunk (each sequence its
    own n, N the largest)."""

    group: LengthGroup  # of the whole sequences
    num_queries: int  # m, of this rank
    places: torch.Tensor  # [m] int64: chunk (0 or 1) * s * N + sequence * N + place in the chunk
    positions: tuple[torch.Tensor, torch.Tensor]  # a chunk each, [s, N] int64, of its queries
    visible: tuple[int, int]  # a chunk each: keys that its queries can see

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """Attend: query [m, n, d] of this rank, key and value [tokens, g, d] of all -> [m, n, d]. Early and late chunks
        go apart: an early one needs the keys of the first chunks only."""
        keys, values = (self.group.grid(x).transpose(1, 2) for x in (key, value))  # [s, g, L, d]
        number, biggest = self.positions[0].shape
        slots = query.new_zeros(2 * number * biggest, *query.shape[1:]).index_copy(0, self.places, query)
        padded = slots.view(2, number, biggest, *query.shape[1:]).transpose(2, 3)
        outs = [
            softmax.at(positions, queries, keys[:, :, :seen], values[:, :, :seen]).transpose(1, 2)
            for queries, positions, seen in zip(padded, self.positions, self.visible, strict=True)  # [s, n, N, d]
        ]
        return torch.stack(outs).reshape(-1, query.size(1), value.size(-1))[self.places]


@dataclass(frozen=True)
class ContextSplit:
    """This rank's part of T packed tokens."""

    group: dist.ProcessGroup
    rank: int
    size: int  # CP
    ragged: Ragged  # of all tokens
    rows: torch.Tensor  # [T/CP] int64, ascending: packed places of this rank's tokens
    gathered: torch.Tensor  # [T] int64: where each packed token is among the rows of all ranks, end to end
    chunks: tuple[ChunkGroup, ...]
    order: Order  # of this rank's tokens, in which each chunk group's are next to each other

    @classmethod
    def zig_zag(cls, cu_seqlens: torch.Tensor, ragged: Ragged, group: dist.ProcessGroup) -> "ContextSplit":
        """Cut at cu_seqlens [S+1]: each sequence (and the padding segment) a multiple of 2 CP tokens (data/packing.py).

        Raises:
            ValueError: a length is no such multiple.
        """
        size, rank, device = dist.get_world_size(group), dist.get_rank(group), cu_seqlens.device
        lengths = torch.diff(cu_seqlens.long())
        chunk = lengths // (2 * size)  # [S] n
        if bool((chunk * 2 * size != lengths).any()):
            raise ValueError(
                f"sequences of {lengths.tolist()} tokens: under context parallelism of {size} each must "
                f"be padded to a multiple of {2 * size}. Pack with sequence_multiple."
            )
        sequence = torch.repeat_interleave(lengths)  # [T]
        position = torch.arange(sequence.numel(), device=device) - cu_seqlens.long()[sequence]
        number = position // chunk[sequence]  # of the chunk, 0 to 2 CP - 1
        owner = torch.minimum(number, 2 * size - 1 - number)
        by_rank = torch.argsort(owner, stable=True)  # rows of rank 0, then of rank 1, ...
        rows = by_rank.view(size, -1)[rank]
        is_late = (number[rows] >= size).long()
        place = position[rows] % chunk[sequence[rows]]
        early, late = rank, 2 * size - 1 - rank  # numbers of this rank's chunks
        chunks, order = [], []
        for part in ragged.groups:
            row_of = torch.full_like(lengths, -1)
            row_of[part.sequences] = torch.arange(part.sequences.numel(), device=device)
            mine = (row_of[sequence[rows]] >= 0).nonzero().squeeze(1)
            sizes = chunk[part.sequences].unsqueeze(1)
            biggest = int(sizes.max())
            steps = torch.arange(biggest, device=device)
            row = is_late[mine] * part.sequences.numel() + row_of[sequence[rows[mine]]]
            # Padded queries have positions too, and see something: else their softmax is nan.
            positions = (early * sizes + steps, late * sizes + steps)
            visible = ((early + 1) * biggest, (late + 1) * biggest)
            order.append(mine)
            chunks.append(ChunkGroup(part, mine.numel(), row * biggest + place[mine], positions, visible))
        return cls(
            group=group,
            rank=rank,
            size=size,
            ragged=ragged,
            rows=rows,
            gathered=torch.argsort(by_rank),
            chunks=tuple(chunks),
            order=Order.of(torch.cat(order)),
        )

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Gather keys or values: of this rank's tokens [T/CP, g, d] -> of all tokens in packed order [T, g, d]."""
        return _AllGather.apply(x, self.group)[self.gathered]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """Attend: query [T/CP, n, d] against all keys and values [T, g, d] -> [T/CP, n, d]."""
        queries = permuted(query, self.order).split([part.num_queries for part in self.chunks])
        cut = zip(self.chunks, queries, self.ragged.parts(key), self.ragged.parts(value), strict=True)
        outs = [part.attend(mine, keys, values, softmax) for part, mine, keys, values in cut]
        return permuted(torch.cat(outs), self.order.flip())


class _AllGather(torch.autograd.Function):
    """[n, ...] of each rank -> [CP * n, ...] in rank order. Backward adds the ranks' gradients in rank order, so that
    the bits do not depend on who comes first (a reduce-scatter adds as its backend pleases)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        out = x.new_empty(dist.get_world_size(group) * x.size(0), *x.shape[1:])
        dist.all_gather_into_tensor(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        pieces = torch.empty_like(grad, memory_format=torch.contiguous_format)
        dist.all_to_all_single(pieces, grad.contiguous(), group=ctx.group)
        return pieces.view(dist.get_world_size(ctx.group), -1, *grad.shape[1:]).sum(0), None
