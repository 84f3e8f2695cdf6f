"""How Megatron's tensors are made of Hugging Face's, and back: each operator is its own inverse's other half.

An operator works on one tensor-parallel rank's rows as it does on whole tensors: cutting every piece and merging the
cuts gives the cut of the merged tensor. So a rank reads nothing but its slices, and what it holds is split before it is
gathered. Imports no torch: tensors bring their methods.

Left out: quantised blocks (quantised.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from gspo_megatron.models.architecture import Architecture

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Piece:
    """A whole Hugging Face tensor, or one expert's place in a stacked one, or a share of its rows."""

    tensor: str
    expert: int | None = None  # index in the leading dimension; None: there is no such dimension
    part: int = 0  # the first of `count` shares, of the `parts` equal shares that the rows have
    parts: int = 1
    count: int = 1
    transposed: bool = False  # stored as [columns, rows]


@dataclass(frozen=True)
class Rename:
    """One tensor has the same numbers on both sides."""

    @property
    def shares(self) -> tuple[int, ...]:
        """Return the pieces' shares of the rows of a Hugging Face tensor that has all of them."""
        return (1,)

    def merge(self, pieces: "list[torch.Tensor]") -> "torch.Tensor":
        return pieces[0]

    def split(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        return [tensor]

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return shapes of the pieces, from the merged shape."""
        return [shape]

    def blocks(self, pieces: "list[torch.Tensor]") -> "list[torch.Tensor]":
        """Return tensors that make up the merged one along the rows, with as little copying as there can be."""
        return [self.merge(pieces)]

    def from_blocks(self, blocks: "list[torch.Tensor]") -> "list[torch.Tensor]":
        """Make the pieces from such blocks of any size."""
        import torch

        return self.split(blocks[0] if len(blocks) == 1 else torch.cat(blocks))

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        return cls()


@dataclass(frozen=True)
class MergeGateUp(Rename):
    """[gate; up] along the rows, of a gated feed-forward layer."""

    @property
    def shares(self) -> tuple[int, ...]:
        return (1, 1)

    def merge(self, pieces: "list[torch.Tensor]") -> "torch.Tensor":
        import torch

        return torch.cat(pieces)

    def split(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        return list(tensor.chunk(2))

    def blocks(self, pieces: "list[torch.Tensor]") -> "list[torch.Tensor]":
        return pieces

    def from_blocks(self, blocks: "list[torch.Tensor]") -> "list[torch.Tensor]":
        halves = len(blocks) == 2 and blocks[0].shape == blocks[1].shape
        return blocks if halves else super().from_blocks(blocks)

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(shape[0] // 2, *shape[1:])] * 2


@dataclass(frozen=True)
class Interleave(Rename):
    """[gate; up] of one tensor with rows gate 0, up 0, gate 1, up 1, ...; weights and biases alike."""

    def merge(self, pieces: "list[torch.Tensor]") -> "torch.Tensor":
        return pieces[0].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)

    def split(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        return [tensor.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)]


@dataclass(frozen=True)
class MergeQkv(Rename):
    """Rows by group of queries: the group's query heads, its key head, its value head; weights and biases alike."""

    queries: int  # rows of a group's query heads
    dim: int  # rows of one head

    def merge(self, pieces: "list[torch.Tensor]") -> "torch.Tensor":
        import torch

        q, k, v = pieces
        grouped = (q.unflatten(0, (-1, self.queries)), k.unflatten(0, (-1, self.dim)), v.unflatten(0, (-1, self.dim)))
        return torch.cat(grouped, 1).flatten(0, 1)

    def split(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        groups = tensor.unflatten(0, (-1, self.queries + 2 * self.dim))
        return [part.flatten(0, 1) for part in groups.split((self.queries, self.dim, self.dim), 1)]

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        groups = shape[0] // (self.queries + 2 * self.dim)
        return [(groups * rows, *shape[1:]) for rows in (self.queries, self.dim, self.dim)]

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        a = architecture
        return cls(a.num_attention_heads // a.num_key_value_heads * a.head_dim, a.head_dim)


@dataclass(frozen=True)
class MergeGatedQkv(MergeQkv):
    """As MergeQkv, where each query head is followed by its output gate: a group's query heads, then their gates, its
    key head, its value head."""

    def merge(self, pieces: "list[torch.Tensor]") -> "torch.Tensor":
        import torch

        q, k, v = pieces
        heads = q.unflatten(0, (-1, self.queries // self.dim, 2, self.dim))  # [groups, heads, query or gate, dim, ...]
        grouped = (heads.transpose(1, 2).flatten(1, 3), *(x.unflatten(0, (-1, self.dim)) for x in (k, v)))
        return torch.cat(grouped, 1).flatten(0, 1)

    def split(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        groups = tensor.unflatten(0, (-1, 2 * self.queries + 2 * self.dim))
        q, k, v = groups.split((2 * self.queries, self.dim, self.dim), 1)
        heads = q.unflatten(1, (2, self.queries // self.dim, self.dim)).transpose(1, 2)
        return [heads.flatten(0, 3), k.flatten(0, 1), v.flatten(0, 1)]

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        groups = shape[0] // (2 * self.queries + 2 * self.dim)
        return [(groups * rows, *shape[1:]) for rows in (2 * self.queries, self.dim, self.dim)]


@dataclass(frozen=True)
class MergeDeltaNet(Rename):
    """[query; key; value; z; beta; alpha] of linear attention, each of all heads, out of two tensors that have their
    rows by key head: query, key, value, z of the key head and its value heads, and beta, alpha."""

    qkvz: tuple[int, ...]  # rows of one key head
    ba: tuple[int, ...]

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        linear = architecture.linear
        assert linear is not None  # only hybrids have this operator
        heads = linear.num_value_heads // linear.num_key_heads
        values = heads * linear.value_head_dim
        return cls((linear.key_head_dim, linear.key_head_dim, values, values), (heads, heads))

    def merge(self, pieces: "list[torch.Tensor]") -> "torch.Tensor":
        import torch

        parts = [
            part
            for piece, rows in zip(pieces, (self.qkvz, self.ba), strict=True)
            for part in piece.unflatten(0, (-1, sum(rows))).split(rows, 1)
        ]
        return torch.cat([part.flatten(0, 1) for part in parts])

    def split(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        rows = (*self.qkvz, *self.ba)
        heads = tensor.size(0) // sum(rows)
        return self.from_blocks(list(tensor.split([heads * n for n in rows])))

    def from_blocks(self, blocks: "list[torch.Tensor]") -> "list[torch.Tensor]":
        import torch

        rows = (*self.qkvz, *self.ba)
        if len(blocks) != len(rows):
            return super().from_blocks(blocks)
        parts = [block.unflatten(0, (-1, n)) for block, n in zip(blocks, rows, strict=True)]
        return [torch.cat(some, 1).flatten(0, 1) for some in (parts[:4], parts[4:])]

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        heads = shape[0] // sum((*self.qkvz, *self.ba))
        return [(heads * sum(rows), *shape[1:]) for rows in (self.qkvz, self.ba)]


@dataclass(frozen=True)
class MergeConvolution(Rename):
    """[query; key; value] along the rows, in one tensor on both sides: three pieces, because tensor ranks cut each."""

    rows: tuple[int, ...]  # of query, key and value

    @property
    def shares(self) -> tuple[int, ...]:
        return self.rows

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        linear = architecture.linear
        assert linear is not None  # only hybrids have this operator
        keys = linear.num_key_heads * linear.key_head_dim
        return cls((keys, keys, linear.num_value_heads * linear.value_head_dim))

    def merge(self, pieces: "list[torch.Tensor]") -> "torch.Tensor":
        import torch

        return torch.cat(pieces)

    def split(self, tensor: "torch.Tensor") -> "list[torch.Tensor]":
        return list(tensor.split([rows[0] for rows in self.shapes(tuple(tensor.shape))]))

    def blocks(self, pieces: "list[torch.Tensor]") -> "list[torch.Tensor]":
        return pieces

    def from_blocks(self, blocks: "list[torch.Tensor]") -> "list[torch.Tensor]":
        return blocks if len(blocks) == len(self.rows) else super().from_blocks(blocks)

    def shapes(self, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(shape[0] * rows // sum(self.rows), *shape[1:]) for rows in self.rows]


@dataclass(frozen=True)
class Row:
    """One line of a family's table: Megatron's name, theirs, the operator. {layer} and {expert} stand for numbers."""

    ours: str
    theirs: tuple[str, ...]
    operator: type[Rename] = Rename
    stacked: bool = False  # theirs holds all experts in one tensor, and both halves of a merge
    transposed: bool = False  # theirs holds columns before rows
    when: str | None = None  # a field of Architecture: the row is there where it is true


def rename(ours: str, theirs: str, when: str | None = None) -> Row:
    return Row(ours, (theirs,), when=when)


def merge_qkv(ours: str, q: str, k: str, v: str, when: str | None = None) -> Row:
    return Row(ours, (q, k, v), MergeQkv, when=when)


def merge_gated_qkv(ours: str, q: str, k: str, v: str) -> Row:
    """`q` has the rows of an output gate beside those of the query."""
    return Row(ours, (q, k, v), MergeGatedQkv)


def merge_delta_net(ours: str, qkvz: str, ba: str) -> Row:
    return Row(ours, (qkvz, ba), MergeDeltaNet)


def convolution(ours: str, theirs: str) -> Row:
    return Row(ours, (theirs,), MergeConvolution)


def merge_gate_up(ours: str, gate: str, up: str, when: str | None = None) -> Row:
    return Row(ours, (gate, up), MergeGateUp, when=when)


def stacked(ours: str, theirs: str, transposed: bool = False) -> Row:
    """Say that one tensor has all experts of a layer: [experts, rows, columns] or [experts, columns, rows]."""
    return Row(ours, (theirs,), stacked=True, transposed=transposed)


def stacked_gate_up(ours: str, theirs: str) -> Row:
    """Say that one tensor has all experts of a layer: [experts, gate rows then up rows, columns]."""
    return Row(ours, (theirs,), MergeGateUp, stacked=True)


def stacked_interleaved(ours: str, theirs: str, transposed: bool = False) -> Row:
    """Say that one tensor has all experts of a layer, the rows of gate and up in turns."""
    return Row(ours, (theirs,), Interleave, stacked=True, transposed=transposed)
