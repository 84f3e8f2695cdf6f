"""The spawner that all multi-rank tests stand on: it must report what went wrong and never hang."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

import gspo_megatron
from tools.validation import ranks
from tools.validation.launching import PYTHON, ROOT, gone, wait_until
from tools.validation.ranks import RankError, spawn


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


def surroundings(rank, world_size):
    imported = [name for name in ranks.PRELOADED if name in sys.modules]
    leads = os.getpgid(0) == os.getsid(0) == os.getpid()
    return imported, leads, os.environ.get("OF_ONE_TEST"), os.environ["RANK"], os.getcwd(), gspo_megatron.__file__


def ranks_of(test: psutil.Process) -> list[int]:
    """Every process below the servers that a test process has started."""
    # A child that has ended and that nobody has waited for has no command line.
    alive = [child for child in test.children() if child.status() != psutil.STATUS_ZOMBIE]
    servers = [child for child in alive if "multiprocessing.forkserver" in " ".join(child.cmdline())]
    return [rank.pid for server in servers for rank in server.children(recursive=True)]


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
    assert gone(ranks_of(psutil.Process()), 2)


def test_ranks_lead_sessions_and_see_what_the_caller_sees(monkeypatch, tmp_path):
    """The server is older than the change, so its forks would see what was there before."""
    spawn(surroundings, 1)
    monkeypatch.setenv("OF_ONE_TEST", "1")
    monkeypatch.chdir(tmp_path)
    package = str(ROOT / "gspo_megatron/__init__.py")
    seen = [(list(ranks.PRELOADED), True, "1", str(rank), str(tmp_path), package) for rank in range(2)]
    assert spawn(surroundings, 2) == seen
    monkeypatch.delenv("OF_ONE_TEST")
    assert spawn(surroundings, 1)[0][2] is None


def test_a_server_without_an_import_is_an_error(monkeypatch):
    monkeypatch.setattr(ranks, "PRELOADED", ("no_such_module",))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        ranks._check_server()


def test_a_killed_test_process_takes_its_server_and_ranks_along():
    program = "from tests.validation import test_ranks\ntest_ranks.spawn(test_ranks.hang, 2)"
    with subprocess.Popen([PYTHON, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}) as process:
        test = psutil.Process(process.pid)
        try:
            assert wait_until(lambda: len(ranks_of(test)) == 2, 100)
        finally:
            below = [child.pid for child in test.children(recursive=True)]
            process.send_signal(signal.SIGKILL)
    assert gone(below, 10)
