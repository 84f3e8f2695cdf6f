"""The two collectives of the sequence ratio: add tables over context parallelism, and publish them to all stages.

Both start at once and return a handle, so that other work can go on meanwhile; `wait()` gives the result. They run in
C++ on the ProcessGroup, without the GIL, where that was built (csrc/bindings/collectives.cpp), and through
torch.distributed elsewhere, with the same bits.

A rank that ends breaks the wait of the others at once (Gloo sees the closed connection; on NCCL this was not run), one
that hangs breaks it when the group's own timeout is over. Both are a LostRankError there; a table that was not received
whole is never returned.

Left out: sums over tensor parallelism (each of its ranks holds whole log-probs already) and over pipeline stages (only
the last one has logits).
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from gspo_megatron.errors import LostRankError
from gspo_megatron.ops import library


class Pending(Protocol):
    """A result on its way."""

    def wait(self) -> torch.Tensor:
        """Blocks until it is there; the same tensor each time."""


def reduce_tables(table: torch.Tensor, group: dist.ProcessGroup, maximum: int | None = None) -> Pending:
    """Adds per-sequence tables over the ranks of a group: one all-gather, added in rank order.

    So every rank gets the same bits whatever arrives first. 8 bytes a number go out; nothing of the size of a log-prob
    vector.

    Args:
        table: [S, k] fp64, the same S and k on every rank; a rank without a token of a sequence gives zeros.
        maximum: a column whose largest value is taken in place of its sum.

    Returns:
        A handle; wait() -> [S, k] fp64.

    Raises:
        ValueError: not fp64, or not [S, k], or no such column.
        LostRankError: from wait(), if a rank of the group has ended or hangs.
    """
    if table.dim() != 2 or table.dtype is not torch.float64:
        raise ValueError(f"table is {table.dtype} {list(table.shape)}; expected fp64 [S, k]")
    if maximum is not None and not 0 <= maximum < table.size(1):
        raise ValueError(f"maximum = {maximum} is no column of a table with {table.size(1)}")
    table = table.detach()
    start = native.reduce_tables if native else _PythonTable
    return _Named(start(group, table, maximum), "adding the tables of sequences", group)


def publish(message: torch.Tensor, group: dist.ProcessGroup, root: int) -> Pending:
    """Brings the message of the group's rank `root` to all its ranks.

    Only where no pipeline schedule is running: inside one, it could deadlock against point-to-point traffic.

    Args:
        message: contiguous, the same shape and dtype on every rank; only the root's values matter.

    Returns:
        A handle; wait() -> `message` itself, filled. Before that it must not be read or written.

    Raises:
        ValueError: not contiguous, or no such rank.
        LostRankError: from wait(), if a rank of the group has ended or hangs.
    """
    if not message.is_contiguous():
        raise ValueError("message must be contiguous")
    if not 0 <= root < group.size():
        raise ValueError(f"root = {root} is no rank of a group of {group.size()}")
    start = native.publish if native else _PythonMessage
    return _Named(start(group, message, root), "publishing the last stage's results", group)


@dataclass(frozen=True)
class Ready:
    """A result that needed no collective."""

    value: torch.Tensor

    def wait(self) -> torch.Tensor:
        return self.value


@dataclass(frozen=True)
class _Named:
    """Names the collective and its ranks where it breaks."""

    pending: Pending
    what: str
    group: dist.ProcessGroup

    def wait(self) -> torch.Tensor:
        try:
            return self.pending.wait()
        except RuntimeError as error:
            ranks = dist.get_process_group_ranks(self.group)
            reason = str(error).strip().splitlines()[0]
            raise LostRankError(
                f"{self.what} over ranks {ranks} did not finish ({reason}). One of these ranks has ended or hangs: "
                "look at its log."
            ) from error


class _PythonTable:
    """reduce_tables without the C++ module."""

    def __init__(self, group: dist.ProcessGroup, table: torch.Tensor, maximum: int | None):
        self.shape, self.maximum = (group.size(), *table.shape), maximum
        self.table = table.contiguous()
        self.total: torch.Tensor | None = None
        self.gathered = table.new_empty(group.size() * table.size(0), table.size(1))
        self.work = dist.all_gather_single(self.gathered, self.table, group=group, async_op=True)

    def wait(self) -> torch.Tensor:
        if self.total is None:
            self.work.wait()
            first, *others = self.gathered.view(self.shape)
            total = first.clone()
            for other in others:
                total += other
            if self.maximum is not None:
                total[:, self.maximum] = self.gathered.view(self.shape)[:, :, self.maximum].amax(0)
            self.total = total
        return self.total


class _PythonMessage:
    """publish without the C++ module."""

    def __init__(self, group: dist.ProcessGroup, message: torch.Tensor, root: int):
        self.message = message
        self.work = dist.broadcast(message, group=group, group_src=root, async_op=True)

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.message


native = library.load_collectives()[0]
