"""Which process converts which tensors, where several convert one model.

A published tensor is never divided: its hash is one pass over its bytes. So what is made of one tensor (all experts of
a layer, where they are stacked) stays together, and what stands together in the files does, as far as shares allow.
"""

from collections.abc import Mapping

from gspo_megatron.models.table import Entry


def share(entries: Mapping[str, Entry], sizes: Mapping[str, int], rank: int, world_size: int) -> set[str]:
    """Return the names of this process's entries. Every entry is in one share and no other.

    Args:
        sizes: bytes of each entry; shares are about even by them.
    """
    total, before, found = sum(sizes.values()), 0, set()
    for group in _groups(entries):
        size = sum(sizes[name] for name in group)
        if (2 * before + size) * world_size // (2 * total) == rank:  # where the group's middle is
            found.update(group)
        before += size
    return found


def _groups(entries: Mapping[str, Entry]) -> list[list[str]]:
    """Runs of the table that share no published tensor with what stands before or behind them."""
    groups: list[list[str]] = []
    place: dict[str, int] = {}  # of a published tensor's group
    for entry in entries.values():
        first = min([place[piece.tensor] for piece in entry.pieces if piece.tensor in place], default=len(groups))
        groups[first:] = [[*(name for group in groups[first:] for name in group), entry.name]]
        place.update({piece.tensor: first for name in groups[first] for piece in entries[name].pieces})
    return groups
