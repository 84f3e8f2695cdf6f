"""Sequences of a packed batch in groups of (nearly) one length, so that what goes sequence by sequence pads nothing.

A call for every length that occurs would cost more than it computes where sequences are short. So sequences of
neighbouring lengths share a call as long as the query-key pairs that each is filled up with are SLACK at most: what a
call costs by itself, on a CPU some 0.1 ms, is about as much. Of 64 x 64 tokens all may be padding, of 1024 x 1024 two
rows of each; sequences of more than 2048 share a call where they are equal.

Left out: nested tensors (torch's have no grouped queries with a scale on a CPU) and flex attention (compiled anew for
each batch).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SLACK = 4096  # query-key pairs


@dataclass(frozen=True)
class LengthGroup:
    """s sequences next to each other in the order of a Ragged, filled up to L tokens each."""

    sequences: torch.Tensor  # [s] int64, their numbers in the packed batch
    lengths: torch.Tensor  # [s] int64, of each
    length: int  # L
    num_tokens: int
    places: torch.Tensor | None  # [num_tokens] int64: of each token among s * L; None: nothing is filled up

    @classmethod
    def of(cls, numbers: list[int], sizes: list[int], device: torch.device) -> "LengthGroup":
        """Make the group of sequences with these numbers and lengths."""
        longest, places = max(sizes), None
        if min(sizes) < longest:
            rows = range(0, longest * len(sizes), longest)
            places = torch.cat([torch.arange(row, row + n, device=device) for row, n in zip(rows, sizes, strict=True)])
        lengths = torch.tensor(sizes, device=device)
        return cls(torch.tensor(numbers, device=device), lengths, longest, sum(sizes), places)

    def grid(self, x: torch.Tensor) -> torch.Tensor:
        """Make one row a sequence, zeros at its end: [num_tokens, ...] -> [s, L, ...]."""
        shape = (self.sequences.numel(), self.length, *x.shape[1:])
        if self.places is None:
            return x.reshape(shape)
        return x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, self.places, x).view(shape)

    def flat(self, grid: torch.Tensor) -> torch.Tensor:
        """Undo `grid`."""
        whole = grid.flatten(0, 1)
        return whole if self.places is None else whole[self.places]


@dataclass(frozen=True)
class Order:
    """Another order of rows."""

    source: torch.Tensor  # [n] int64: where each comes from
    target: torch.Tensor  # [n] int64: where each goes

    @classmethod
    def of(cls, source: torch.Tensor) -> "Order":
        """Make it of a permutation."""
        return cls(source, torch.argsort(source))

    def flip(self) -> "Order":
        """Return the way back."""
        return Order(self.target, self.source)


@dataclass(frozen=True)
class Ragged:
    """S sequences packed into T tokens, and an order of the tokens in which each group's are next to each other."""

    groups: tuple[LengthGroup, ...]
    order: Order | None  # None: it is the packed one

    @classmethod
    def of(cls, lengths: torch.Tensor) -> "Ragged":
        """Group sequences of these lengths, [S] int64 of 1 or more, in the order in which they are packed."""
        device, sizes = lengths.device, lengths.tolist()
        starts = (lengths.cumsum(0) - lengths).tolist()
        groups, order = [], []
        for numbers in _alike(sizes):
            order += [torch.arange(starts[n], starts[n] + sizes[n], device=device) for n in numbers]
            groups.append(LengthGroup.of(numbers, [sizes[n] for n in numbers], device))
        if [n for group in groups for n in group.sequences.tolist()] == list(range(len(sizes))):
            return cls(tuple(groups), None)
        return cls(tuple(groups), Order.of(torch.cat(order)))

    def parts(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut [T, ...] into [num_tokens, ...] of each group."""
        ordered = x if self.order is None else permuted(x, self.order)
        return ordered.split([group.num_tokens for group in self.groups])

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Undo `parts`."""
        whole = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
        return whole if self.order is None else permuted(whole, self.order.flip())

    def by_group(self, function: Callable[..., torch.Tensor], *packed: torch.Tensor) -> torch.Tensor:
        """Apply a function of grids [s, L, ...] -> [s, L, ...] to each group of packed [T, ...] -> [T, ...]."""
        cut = zip(*(self.parts(x) for x in packed), strict=True)
        return self.joined(
            [
                group.flat(function(*(group.grid(x) for x in parts)))
                for group, parts in zip(self.groups, cut, strict=True)
            ]
        )

    def by_sequence(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Put what each group has of its sequences, [s, ...], into the packed order, [S, ...]."""
        numbers = torch.cat([group.sequences for group in self.groups])
        return torch.cat(list(parts))[torch.argsort(numbers)]


def _alike(sizes: list[int]) -> list[list[int]]:
    """Numbers of the sequences by length, those that share a call together, each list from short to long."""
    groups: list[list[int]] = []
    for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], -n)):
        if groups and sizes[groups[-1][0]] ** 2 - sizes[number] ** 2 <= SLACK:
            groups[-1].append(number)
        else:
            groups.append([number])
    # From short to long, and equal ones as they are packed: then a batch of equal sequences is in order.
    return [sorted(group, key=lambda n: (sizes[n], n)) for group in reversed(groups)]


def permuted(x: torch.Tensor, order: Order) -> torch.Tensor:
    """Return the rows of x in another order."""
    return _Permute.apply(x, order.source, order.target)


class _Permute(torch.autograd.Function):
    """x[source], whose backward is a gather too: that of an index adds up one row after the other."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(target)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        (target,) = ctx.saved_tensors
        return grad.index_select(0, target), None, None
