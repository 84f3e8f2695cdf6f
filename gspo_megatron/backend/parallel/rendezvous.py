"""A store that holds nothing of an earlier start, for ranks that torchrun has started again.

torchrun keeps one store over its restarts (torch 2.13: `DynamicRendezvousHandler` makes its shared TCPStore once), and
init_process_group puts the ranks' addresses there under the same keys each time. A rank that is early then reads where
another one was before the restart, and both wait for the time-out. So the ranks agree here on a prefix that is new:
each writes down a number of its own, rank 0 proposes the numbers that it finds, and a proposal is taken once every rank
has found its own number in it. Old numbers and old proposals can delay that, but never pass for new ones.

Left out: TORCHELASTIC_RESTART_COUNT as the prefix, which differs between machines once one of them was replaced.
"""

import hashlib
import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from gspo_megatron.errors import LostRankError

PAUSE = 0.05  # seconds between two looks


def fresh_store(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return the launcher's store behind a prefix that no earlier start has used.

    Raises:
        LostRankError: some ranks did not come in time.
    """
    store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world_size == 1:
        return store  # made by rank 0 just now
    return dist.PrefixStore(agree(store, rank, world_size, timeout), store)


def agree(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree on a prefix that is the same on all ranks which call this now."""
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    store.set(_key(rank), mine)
    accepted = None
    while time.monotonic() < deadline:
        if rank == 0:
            _propose(store, world_size)
        numbers = json.loads(store.get("start/proposal")) if store.check(["start/proposal"]) else []
        if len(numbers) == world_size and numbers[rank] == mine:
            prefix = "start/" + hashlib.blake2b("".join(numbers).encode(), digest_size=8).hexdigest()
            if prefix != accepted:
                store.add(f"{prefix}/accepted", 1)
                accepted = prefix
            if store.add(f"{prefix}/accepted", 0) == world_size:
                return prefix
        time.sleep(PAUSE)
    raise LostRankError(f"not all of the {world_size} ranks came within {timeout.total_seconds():.0f} s.")


def _propose(store: dist.Store, world_size: int) -> None:
    keys = [_key(rank) for rank in range(world_size)]
    if store.check(keys):
        store.set("start/proposal", json.dumps([number.decode() for number in store.multi_get(keys)]))


def _key(rank: int) -> str:
    return f"start/number/{rank}"
