"""An error that one rank finds, raised on all: a rank that raises alone leaves the others in their next collective."""

import torch.distributed as dist

from gspo_megatron.errors import GspoError


def raise_together(error: GspoError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the error of the lowest rank that has one, on every rank of `group` (None: all). A collective."""
    found: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, error, group=group)
    first = next((other for other in found if other is not None), None)
    if first is not None:
        raise first
