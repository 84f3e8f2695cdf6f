"""An error that one rank finds, raised on all: a rank that raises alone leaves the others in their next collective."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.errors import GspoError, LostRankError


def raise_together(error: GspoError | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the error of the lowest rank that has one, on every rank of `group` (None: all). A collective."""
    first = next((other for other in gather_objects(error, group) if other is not None), None)
    if first is not None:
        raise first


def raise_if_any(error: GspoError | None, device: torch.device) -> None:
    """Do as raise_together over all ranks, at the price of one number where there is no error. A collective."""
    failed = torch.tensor([error is not None], device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if failed:
        raise_together(error)


@contextmanager
def together() -> Iterator[None]:
    """Raise an error of the block on all ranks at its end. The block has no collective of its own inside.

    A defect keeps its trace on the rank that has it; the others raise LostRankError.
    """
    try:
        yield
    except GspoError as error:
        raise_together(error)
    except Exception as defect:
        with suppress(GspoError):
            raise_together(LostRankError(f"rank {dist.get_rank()} failed ({type(defect).__name__}: {defect})."))
        raise
    else:
        raise_together(None)
