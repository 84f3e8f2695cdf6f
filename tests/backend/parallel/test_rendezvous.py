"""Ranks that were started again must not meet the ones before them."""

import random
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from gspo_megatron.backend.parallel.rendezvous import agree
from gspo_megatron.errors import LostRankError

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def server():
    return dist.TCPStore("127.0.0.1", 0, is_master=True)


def start(server: dist.TCPStore, ranks: list[int], world_size: int, timeout: timedelta = TIMEOUT) -> list:
    """agree() of these ranks at once, each a little later than another; prefixes, or what was raised."""
    found: list = [None] * world_size

    def one(rank: int) -> None:
        client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        time.sleep(random.random() * 0.2)
        try:
            found[rank] = agree(client, rank, world_size, timeout)
        except LostRankError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_every_start_agrees_on_a_prefix_of_its_own(server):
    """Six starts on one store, three of which lack a rank (it died before it came) and give up. A rank that came early
    in a later start sees all numbers and proposals of those before."""
    prefixes = []
    for absent in (None, 1, None, 0, 3, None):
        present = [rank for rank in range(4) if rank != absent]
        found = start(server, present, 4, TIMEOUT if absent is None else timedelta(seconds=0.6))
        if absent is None:
            assert len(set(found)) == 1
            prefixes.append(found[0])
        else:
            assert all("not all of the 4 ranks came within" in str(found[rank]) for rank in present)
    assert len(set(prefixes)) == 3
