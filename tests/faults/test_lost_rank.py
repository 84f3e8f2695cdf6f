"""A rank is killed, or Ctrl-C is pressed, in the middle of a real training: every process is gone within ten seconds.

How single ranks end is tested in test_lifecycle.py; here it is the example itself, with ranks inside Megatron's
schedule.
"""

import os
import signal

import psutil
import pytest

from tools.validation.launching import ROOT, TORCHRUN, gone, launched, wait_until

TRAINING = [
    *TORCHRUN, "--nproc-per-node", "4", str(ROOT / "examples/train_moe_gspo.sh"), "--steps", "100000",
    "--warm-start.steps", "0", "--data.num-eval-prompts", "8", "--rollout.num-prompts", "8", "--output-dir", "runs",
]  # fmt: skip


def in_training(launch) -> list[int]:
    """Pids of the four ranks, once RL has made steps."""
    assert wait_until(lambda: launch.stdout.count("left") >= 3 or launch.process.poll() is not None, 120), launch.stderr
    ranks = [p.pid for p in psutil.Process(launch.process.pid).children()]
    assert len(ranks) == 4, launch.stderr
    return ranks


@pytest.mark.slow
def test_kill_9_of_one_rank_in_training(tmp_path):
    with launched(TRAINING, tmp_path, CUDA_VISIBLE_DEVICES="") as launch:
        ranks = in_training(launch)
        os.kill(ranks[2], signal.SIGKILL)
        assert gone([*ranks, launch.process.pid])
        assert launch.wait() != 0


@pytest.mark.slow
def test_ctrl_c_in_training(tmp_path):
    """A terminal sends SIGINT to the launcher; the ranks have sessions of their own and hear of it from torchrun."""
    with launched(TRAINING, tmp_path, CUDA_VISIBLE_DEVICES="") as launch:
        ranks = in_training(launch)
        os.kill(launch.process.pid, signal.SIGINT)
        assert gone([*ranks, launch.process.pid])
        assert launch.wait() != 0
        assert (tmp_path / "runs/moe_gspo/metrics.jsonl").read_text().count("\n") >= 2  # what was logged is kept
