"""What one rank of a replica does for all of it: rewards and environments are asked once, and everyone gets the answer.

The first rank of a replica in generation works; the others wait. So that nobody waits in one collective for as long as
that may take (faults.collective_timeout), all ranks meet now and then.
"""

import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel.collective_errors import raise_if_any
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.errors import GspoError

SECONDS_APART = 30.0  # between two meetings
T = TypeVar("T")


def on_first_rank(topology: Topology, device: torch.device, work: Callable[[Callable[[], None]], T]) -> T:
    """Return what `work` returns on the first rank of each replica, on all ranks of it. A collective over all ranks.

    Args:
        work: is given what it calls now and then, so that the others are met.

    Raises:
        GspoError: `work` raised it on some rank; on every rank alike.
    """
    error = None
    handed: list = [None]
    meetings = _Meetings(device)
    if topology.is_first_of_replica:
        try:
            handed = [work(meetings.keep)]
        except GspoError as problem:
            error = problem
    meetings.end()
    # Those that do not work would wait in the broadcast, and other replicas in the next collective.
    raise_if_any(error, device)
    ranks = dist.get_process_group_ranks(topology.model_parallel_group)
    if len(ranks) > 1:
        dist.broadcast_object_list(handed, src=ranks[0], group=topology.model_parallel_group, device=device)
    return handed[0]


class _Meetings:
    def __init__(self, device: torch.device):
        self._device, self._next = device, time.monotonic() + SECONDS_APART

    def keep(self) -> None:
        """Meet the others where it is time."""
        if time.monotonic() >= self._next:
            self._meet(is_done=False)

    def end(self) -> None:
        """Meet the others until everyone is done."""
        while not self._meet(is_done=True):
            pass

    def _meet(self, is_done: bool) -> bool:
        """Returns whether all are done."""
        flag = torch.tensor([int(is_done)], device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
        self._next = time.monotonic() + SECONDS_APART
        return bool(flag)
