"""A rank that hangs is found in time and named, and every other rank tells where it is: real processes."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from gspo_megatron.process import progress
from gspo_megatron.process.watchdog import position, waits_in
from tools.validation.launching import PRELUDE, ROOT, TORCHRUN, gone, launched, wait_until

SETTINGS = """
from gspo_megatron.process import progress
from gspo_megatron.config import FaultsConfig
from gspo_megatron.process.watchdog import Watchdog
"""
WORK = """
with lifecycle.guard():
    dist = world()
    dog = Watchdog(f"PP{RANK}", FaultsConfig(heartbeat_timeout=HEARTBEAT, collective_timeout=COLLECTIVE))
    progress.step("rl", 7)
    ready()
    with progress.part("update"):
        progress.detail("microbatch 2 of 4")
        BODY
    dog.stop()
    dist.destroy_process_group()
"""


def program(folder: Path, body: str, heartbeat: float = 60.0, collective: float = 500.0) -> list[str]:
    """A command of three ranks under torchrun."""
    text = WORK.replace("HEARTBEAT", str(heartbeat)).replace("COLLECTIVE", str(collective)).replace("BODY", body)
    (folder / "rank.py").write_text(PRELUDE + SETTINGS + text)
    return [*TORCHRUN, "--nproc-per-node", "3", str(folder / "rank.py")]


def test_a_stopped_process_is_named_by_the_others(tmp_path):
    """Rank 1 gets SIGSTOP while 0 and 2 wait for it in a barrier. The limit is 2 s: within that, the looks around it
    and the printing, both others have said where they are and ended."""
    body = "dist.barrier() if RANK != 1 else time.sleep(600)"
    with launched(program(tmp_path, body, heartbeat=2.0), tmp_path) as launch:
        pids = launch.ranks(3)
        wait_until(lambda: False, 2.0)
        os.kill(pids[1], signal.SIGSTOP)
        started = time.monotonic()
        assert wait_until(lambda: not psutil.pid_exists(pids[0]) or not psutil.pid_exists(pids[2]), 12), launch.stderr
        assert 2.0 < time.monotonic() - started < 10
        os.kill(pids[1], signal.SIGKILL)  # torchrun would do so half a minute after its SIGTERM
        assert gone([*pids.values(), launch.process.pid])
        text = launch.stderr
    assert launch.process.returncode == 1
    assert text.count("watchdog: nothing was heard for 2 s (faults.heartbeat_timeout)") == 1
    assert f"pid {pids[1]}) is silent. Its last heartbeat, at " in text
    assert "rl step 7, update, microbatch 2 of 4, in no collective for" in text
    for rank in (0, 2):
        where = f"rank {rank} (PP{rank}) waits in barrier, rl step 7, update, microbatch 2 of 4:"
        assert text.count(where) == 1
        assert "rank.py" in text.partition(where)[2]
    assert "rank 1 (PP1) waits" not in text


def test_a_rank_that_stays_away_from_a_collective_is_named(tmp_path):
    """Rank 2 works on by itself; all processes are alive. Ranks 0 and 1 wait longer than 2 s in a sum."""
    body = "dist.all_reduce(__import__('torch').zeros(1)) if RANK != 2 else time.sleep(600)"
    with launched(program(tmp_path, body, collective=2.0), tmp_path) as launch:
        pids = launch.ranks(3)
        assert gone([*pids.values(), launch.process.pid], 20), launch.stderr
        text = launch.stderr
    assert "has waited in all_reduce for 2 s (faults.collective_timeout)" in text
    assert "rank 2 (PP2; " in text and "is in rl step 7, update, microbatch 2 of 4, in no collective" in text
    assert "rank 2 (PP2) is in no collective, rl step 7, update, microbatch 2 of 4:" in text  # its stack, too


def test_waiting_that_gets_on_is_no_hang(tmp_path):
    """Six seconds of collectives of 0.3 s each, with a limit of 2 s on both; then an end in order, rank after rank."""
    body = """
        for number in range(20):
            progress.detail(f"microbatch {number}")
            if RANK == 1:
                time.sleep(0.3)
            dist.barrier()
        time.sleep(RANK * 0.7)
"""
    with launched(program(tmp_path, body, 2.0, 2.0), tmp_path) as launch:
        assert launch.wait(40) == 0, launch.stderr
    assert "watchdog" not in launch.stderr


@pytest.mark.slow
def test_sigstop_in_training(tmp_path):
    """One of four ranks of the example is stopped in the middle of RL."""
    command = [
        *TORCHRUN,
        "--nproc-per-node",
        "4",
        str(ROOT / "examples/train_moe_gspo.sh"),
        "--steps",
        "100000",
        "--warm-start.steps",
        "0",
        "--data.num-eval-prompts",
        "8",
        "--rollout.num-prompts",
        "8",
        "--faults.heartbeat-timeout",
        "5",
        "--output-dir",
        "runs",
    ]
    with launched(command, tmp_path, CUDA_VISIBLE_DEVICES="") as launch:
        assert wait_until(lambda: launch.stdout.count("left") >= 3 or launch.process.poll() is not None, 120)
        ranks = {int(p.environ()["RANK"]): p.pid for p in psutil.Process(launch.process.pid).children()}
        os.kill(ranks[2], signal.SIGSTOP)
        assert gone([*ranks.values(), launch.process.pid], 60), launch.stderr
        text = launch.stderr
    assert f"pid {ranks[2]}) is silent. Its last heartbeat, at " in text
    for rank in (0, 1, 3):
        assert text.count(f"\nrank {rank} (TP") == 1
    assert " waits in " in text and "rl step " in text


def test_what_a_frame_tells():
    frame = sys._getframe()
    assert waits_in(frame) is None and waits_in(None) is None
    assert position(frame)[0][0] == id(frame.f_code) and len(position(frame)) > 3


def test_whereabouts():
    progress.step("rl", 3)
    before = progress.moves()
    with progress.part("update"):
        progress.detail("microbatch 1 of 2")
        assert str(progress.here()) == "rl step 3, update, microbatch 1 of 2"
    assert str(progress.here()) == "rl step 3" and progress.moves() == before + 3
    with pytest.raises(KeyError), progress.part("rollout"):
        raise KeyError
    assert str(progress.here()) == "rl step 3, rollout"
