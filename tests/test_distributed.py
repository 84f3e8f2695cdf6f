"""The spawner that all multi-rank tests stand on: it must report what went wrong and never hang."""

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed import RankError, spawn
from tests.launching import gone


def add(rank, world_size, tensor):
    total = tensor + rank
    dist.all_reduce(total)
    return total, world_size, torch.get_num_threads()


def fail(rank, world_size):
    if rank == 1:
        raise ValueError("only here")
    dist.barrier()


def die(rank, world_size):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def hang(rank, world_size):
    time.sleep(60)


def test_results_come_back_by_rank():
    results = spawn(add, 2, torch.ones(1))
    assert [(float(total), size, threads) for total, size, threads in results] == [(3.0, 2, 1), (3.0, 2, 1)]


@pytest.mark.parametrize(
    ("fn", "timeout", "message"),
    [
        (fail, 60, "(?s)rank 1 of 2 failed.*only here"),
        (die, 60, "(?s)rank 1 of 2 failed.*exit code 7"),
        (hang, 5, "did not return"),
    ],
)
def test_failures_are_reported_and_leave_no_process(fn, timeout, message):
    before = time.monotonic()
    with pytest.raises(RankError, match=message):
        spawn(fn, 2, timeout=timeout)
    assert time.monotonic() - before < 20
    left = [p.pid for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
    assert gone(left, 2)
