"""How ranks end: real processes, blocked where training blocks, ended in the ways that runs end."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tools.validation.launching import LIMIT, PRELUDE, PYTHON, TORCHRUN, gone, launched, wait_until

BLOCKED = """
with lifecycle.guard():
    dist = world()
    ready()
    if RANK == 0:
        time.sleep(1)  # the others wait in C++ by now
        dist.recv(__import__("torch").zeros(1), src=1)
    dist.barrier()
"""


def program(folder: Path, body: str) -> str:
    path = folder / "rank.py"
    path.write_text(PRELUDE + body)
    return str(path)


def torchrun(folder: Path, body: str, ranks: int = 2) -> list[str]:
    return [*TORCHRUN, "--nproc-per-node", str(ranks), program(folder, body)]


def alone(folder: Path, body: str, rank: int = 0, **env: str):
    return launched([PYTHON, program(folder, body)], folder, RANK=str(rank), **env)


def test_a_name_that_is_no_unicode_is_told_all_the_same(tmp_path):
    """A file's name need not be UTF-8; Python has a half of a surrogate pair for such a byte."""
    with alone(tmp_path, "with lifecycle.guard():\n    raise ConfigError('m\\udcff = 1: no')\n") as launch:
        assert launch.wait(60) == 2
        assert launch.stderr == "error: m\\udcff = 1: no\n"


def test_bad_input_is_one_message_and_status_2(tmp_path):
    with alone(tmp_path, "with lifecycle.guard():\n    raise ConfigError('steps = -1: no')\n") as launch:
        assert launch.wait() == 2
    assert launch.stderr == "error: steps = -1: no\n"


def test_bad_input_on_another_rank_names_it(tmp_path):
    with alone(tmp_path, "with lifecycle.guard():\n    raise ConfigError('steps = -1: no')\n", rank=3) as launch:
        assert launch.wait() == 2
    assert launch.stderr == "rank 3: error: steps = -1: no\n"


def test_a_defect_prints_its_trace_and_buffered_output(tmp_path):
    body = "with lifecycle.guard():\n    sys.stdout.write('half a line')\n    raise KeyError('lost')\n"
    with alone(tmp_path, body) as launch:
        assert launch.wait() == 1
    assert launch.stdout == "half a line"
    assert launch.stderr.startswith("rank 0 failed:\nTraceback")
    assert launch.stderr.count("KeyError: 'lost'") == 1


@pytest.mark.parametrize("status", [0, 2, 7])
def test_system_exit_keeps_its_status(tmp_path, status):
    with alone(tmp_path, f"with lifecycle.guard():\n    sys.exit({status})\n") as launch:
        assert launch.wait() == status
    assert launch.stderr == ""


def test_a_normal_end_restores_the_handlers(tmp_path):
    body = """
import signal
before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
with lifecycle.guard():
    pass
assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
assert signal.set_wakeup_fd(-1) == -1
"""
    with alone(tmp_path, body) as launch:
        assert launch.wait() == 0, launch.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_ranks_that_wait_in_gloo(tmp_path, number, status):
    with (
        launched([PYTHON, program(tmp_path, BLOCKED)], tmp_path, RANK="0", WORLD_SIZE="2") as first,
        launched([PYTHON, program(tmp_path, BLOCKED)], tmp_path, RANK="1", WORLD_SIZE="2") as second,
    ):
        pids = first.ranks(2)
        wait_until(lambda: False, 1.5)  # into the blocking calls
        for pid in pids.values():
            os.killpg(pid, number)
        assert (first.wait(3), second.wait(3)) == (status, status)
    assert first.stderr == f"rank 0: ended by {number.name}\n"
    assert second.stderr == ""


def test_ctrl_c_under_torchrun_ends_everything(tmp_path):
    with launched(torchrun(tmp_path, BLOCKED), tmp_path) as launch:
        pids = launch.ranks(2)
        wait_until(lambda: False, 1.5)
        os.killpg(launch.process.pid, signal.SIGINT)
        assert gone([launch.process.pid, *pids.values()])
    assert launch.process.returncode != 0
    assert launch.stderr.count("rank 0: ended by") == 1


def test_kill_9_of_one_rank_ends_everything(tmp_path):
    with launched(torchrun(tmp_path, BLOCKED), tmp_path) as launch:
        pids = launch.ranks(2)
        wait_until(lambda: False, 1.5)
        os.kill(pids[1], signal.SIGKILL)
        assert gone([launch.process.pid, *pids.values()])
    assert launch.process.returncode != 0
    assert "rank 0: ended by SIGTERM" in launch.stderr
    assert "connection" not in launch.stderr  # rank 0's broken connection is an echo, not the cause


def test_a_lost_peer_without_a_launcher_is_one_line(tmp_path):
    with (
        launched([PYTHON, program(tmp_path, BLOCKED)], tmp_path, RANK="0", WORLD_SIZE="2") as first,
        launched([PYTHON, program(tmp_path, BLOCKED)], tmp_path, RANK="1", WORLD_SIZE="2") as second,
    ):
        first.ranks(2)
        wait_until(lambda: False, 1.5)
        second.process.kill()
        assert first.wait(LIMIT) == 1
    assert first.stderr.startswith("rank 0: lost the connection to another rank")
    assert first.stderr.count("\n") == 1


def test_kill_9_of_torchrun_ends_its_ranks(tmp_path):
    with launched(torchrun(tmp_path, BLOCKED), tmp_path) as launch:
        pids = launch.ranks(2)
        os.kill(launch.process.pid, signal.SIGKILL)
        assert gone(list(pids.values()))
    assert "torchrun is gone" in launch.stderr


def test_one_failed_rank_ends_all_and_speaks_alone(tmp_path):
    body = """
with lifecycle.guard():
    dist = world()
    ready()
    if RANK == 1:
        raise ValueError("only here")
    dist.barrier()
"""
    with launched(torchrun(tmp_path, body), tmp_path) as launch:
        launch.ranks(2)
        assert launch.wait(LIMIT) == 1
    assert launch.stderr.count("ValueError: only here") == 1
    assert "rank 1 failed:\nTraceback" in launch.stderr
    assert "rank 0 failed" not in launch.stderr


def test_all_ranks_failing_alike_print_one_trace(tmp_path):
    body = "with lifecycle.guard():\n    raise ValueError('everywhere')\n"
    with launched(torchrun(tmp_path, body, ranks=4), tmp_path) as launch:
        assert launch.wait(30) == 1
    assert launch.stderr.count("ValueError: everywhere") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="forking with threads is safe enough on Linux alone")
def test_ending_a_forked_child_leaves_the_rank_alone(tmp_path):
    body = """
import signal
with lifecycle.guard():
    child = os.fork()
    if child == 0:
        time.sleep(30)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM
    time.sleep(0.5)
    print("still here")
"""
    with alone(tmp_path, body) as launch:
        assert launch.wait() == 0, launch.stderr
    assert launch.stdout == "still here\n"
