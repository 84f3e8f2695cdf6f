"""Small Python objects go from every rank to every rank, pickled. Tensors have collectives of their own."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gather_objects(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return what each rank of `group` (None: all) has, by rank, on each of them. A collective."""
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone
