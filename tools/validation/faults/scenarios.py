"""Faults in real trainings, one function each: what happens, what the user reads, and that nothing is lost.

Every scenario starts a short training of the example (pipeline over two ranks) under torchrun, in which one thing
breaks, and raises AssertionError unless all went as docs/faults.md promises. `tools/validation/fault_matrix.py` runs
all of them and prints a row each; test_scenarios.py runs some of them in CI.
"""

import json
import math
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from gspo_megatron.metrics.tracker import read_metrics
from tools.validation.launching import ROOT, TORCHRUN, Launch, alive, gone, launched, wait_until

STEPS = 5
# The entropy bonus makes every gradient differ from 0, so that a lost or repeated step shows in the weights.
RECIPE = [
    str(ROOT / "examples/recipes/moe_gspo.yaml"), "--parallel.pipeline-model-parallel-size", "2",
    "--parallel.tensor-model-parallel-size", "1", "--parallel.expert-model-parallel-size", "1",
    "--steps", str(STEPS), "--eval-interval", "99", "--warm-start.steps", "1", "--warm-start.num-examples", "32",
    "--warm-start.batch-size", "16", "--data.num-eval-prompts", "4", "--data.eval-samples", "1",
    "--rollout.num-prompts", "4", "--rollout.group-size", "4", "--rollout.max-response-length", "8",
    "--algorithm.num-minibatches", "2", "--algorithm.entropy-coef", "0.01", "--checkpoint.interval", "1",
    "--checkpoint.no-keep-best", "--output-dir", "runs", "--device", "cpu",
]  # fmt: skip
WORKER = str(ROOT / "tools/validation/faults/injected.py")
# Then all minibatches have old log-probs that a fault can spoil: the first one's own forward gives them else.
WHOLE_PASS = ("--routing.diagnostics-interval", "99")
LONG = 250.0  # seconds that a whole training may take on a busy machine


def running(folder: Path, *faults: tuple, extra: tuple[str, ...] = (), ranks: int = 2, restarts: int = 0):
    """A launch with these faults: (name, rank, phase, step, start)."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*TORCHRUN, "--nproc-per-node", str(ranks), "--max-restarts", str(restarts), WORKER, *RECIPE, *extra]
    return launched(command, folder, CUDA_VISIBLE_DEVICES="", FAULTS=json.dumps(faults))


@dataclass(frozen=True)
class Whole:
    """What an undisturbed training left."""

    rows: list[tuple]
    digests: dict[str, str]


def result(folder: Path, run: str = "moe_gspo", steps: int = STEPS) -> Whole:
    """Its metric rows without clocks, and the SHA-256 of each file of tensors in the last checkpoint."""
    rows = [tuple((k, v) for k, v in row.items() if not k.startswith(("time/", "perf/")))
            for row in read_metrics(folder / "runs" / run)]  # fmt: skip
    manifest = json.loads((folder / "runs" / run / f"checkpoints/step_{steps:06d}/manifest.json").read_text())["files"]
    return Whole(rows, {name: entry[1] for name, entry in manifest.items() if name.endswith(".distcp")})


def undisturbed(folder: Path) -> Whole:
    with running(folder) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    whole = result(folder)
    assert len(whole.rows) == 1 + 1 + STEPS and whole.digests
    assert all(dict(row)["grad_norm"] > 0 for row in whole.rows if "grad_norm" in dict(row))
    return whole


def same(found: Whole, wanted: Whole) -> None:
    """Weights and Adam's state to the bit; each step once, with the same numbers."""
    assert found.digests == wanted.digests, "the last checkpoint has other bits"
    assert found.rows == wanted.rows, "the record differs"


def ranks_of(launch: Launch) -> dict[int, int]:
    """rank -> pid of the processes that torchrun started."""
    children = psutil.Process(launch.process.pid).children()
    return {int(child.environ()["RANK"]): child.pid for child in children if "RANK" in child.environ()}


def at_step(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(f'"rl", "step": {step},' in path.read_text() for path in folder.glob("runs/*/metrics.jsonl"))


def line_with(text: str, part: str) -> str:
    """The line that a user reads."""
    found = [line.strip() for line in text.splitlines() if part in line]
    assert found, f"nothing says {part!r}:\n{text[-3000:]}"
    return found[0]


# ---- Killed, and restarted by torchrun ----


def killed(folder: Path, whole: Whole, *moments: str) -> str:
    """kill -9 of one rank at each of these moments, one a start; torchrun goes on by itself."""
    faults = [(moment, start % 2, "rl", 1 + start, start) for start, moment in enumerate(moments)]
    with running(folder, *faults, restarts=len(moments)) as launch:
        assert launch.wait(LONG * len(moments)) == 0, launch.stderr
        assert launch.stderr.count("failed (exitcode: -9)") == len(moments), launch.stderr
        text = launch.stdout
    runs = sorted((folder / "runs").iterdir())
    same(result(folder, runs[-1].name), whole)
    assert not list(folder.rglob("*.unfinished"))
    return line_with(text, "goes on after")


def killed_launcher(folder: Path, whole: Whole) -> str:
    """kill -9 of torchrun: its ranks end too, and the same command goes on."""
    with running(folder) as launch:
        assert wait_until(at_step(folder, 2), LONG), launch.stderr
        everyone = [p.pid for p in psutil.Process(launch.process.pid).children(recursive=True)]
        os.kill(launch.process.pid, signal.SIGKILL)
        assert gone([launch.process.pid, *everyone]), [p for p in everyone if alive(p)]
        told = line_with(launch.stderr, "ended because torchrun is gone")
    again(folder, whole)
    return told


def told_to_stop(folder: Path, whole: Whole, number: signal.Signals, to_launcher: bool) -> str:
    """A checkpoint within the grace time, and the same command goes on from it."""
    with running(folder) as launch:
        assert wait_until(at_step(folder, 2), LONG), launch.stderr
        everyone = [p.pid for p in psutil.Process(launch.process.pid).children(recursive=True)]
        started = time.monotonic()
        os.kill(launch.process.pid if to_launcher else ranks_of(launch)[0], number)
        assert gone([launch.process.pid, *everyone], 30)
        assert launch.process.returncode != 0 and time.monotonic() - started < 30
        told = line_with(launch.stderr, "stopped as asked, after rl step")
    again(folder, whole)
    return told


def again(folder: Path, whole: Whole) -> None:
    """The same command once more ends the run as if nothing had been."""
    with running(folder) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        line_with(launch.stdout, "goes on after")
    same(result(folder), whole)


# ---- Hanging ----


def stopped(folder: Path, whole: Whole) -> str:
    """SIGSTOP of rank 1: rank 0 names it and tells its own stack within the time-out; torchrun starts both anew."""
    extra = ("--faults.heartbeat-timeout", "4")
    with running(folder, ("hang", 1, "rl", 2, 0), extra=extra, restarts=1) as launch:
        assert wait_until(lambda: "is silent" in launch.stderr, LONG), launch.stderr
        assert wait_until(lambda: "rank 0 (PP0) waits in " in launch.stderr, 5), launch.stderr
        assert launch.wait(LONG + 40) == 0, launch.stderr  # torchrun waits 30 s before SIGKILL
        text = launch.stderr
    line_with(text, "rl step 2, update, microbatch 1 of")
    same(result(folder), whole)
    return line_with(text, "is silent").replace(socket.gethostname(), "HOST")


def absent(folder: Path, whole: Whole) -> str:
    """Rank 1 lives but takes no part: rank 0's wait is too long, and rank 1 tells where it is."""
    extra = ("--faults.collective-timeout", "8")
    with running(folder, ("absent", 1, "rl", 2, 0), extra=extra, restarts=1) as launch:
        assert launch.wait(2 * LONG) == 0, launch.stderr
        text = launch.stderr
    line_with(text, "rank 1 (PP1) is in no collective, rl step 2, update, microbatch 1 of")
    same(result(folder), whole)
    return line_with(text, "faults.collective_timeout")


# ---- Numbers ----


def skipped(folder: Path, fault: str, rank: int, reason: str) -> str:
    """Both updates of one step are skipped on both ranks alike and counted; the run goes on to its end."""
    with running(folder, (fault, rank, "rl", 2, 0), extra=WHOLE_PASS) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        text = " ".join(launch.stdout.split())
    rows = {row["step"]: row for row in read_metrics(folder / "runs/moe_gspo") if row["phase"] == "rl"}
    expected = {step: 2 if step == 2 else 0 for step in range(1, STEPS + 1)}
    assert {step: row["update/not_finite"] for step, row in rows.items() if step} == expected
    assert "was skipped on all ranks" in text and reason in text, text[-3000:]
    return text[text.index("update 1 of 2 was skipped on all ranks") :]


def too_many_skipped(folder: Path) -> str:
    """More in a row than the recipe lets pass: one message, status 1 of torchrun, the last good checkpoint is there."""
    extra = ("--faults.max-skipped-updates", "1")
    with running(folder, ("nan gradient", 1, "rl", 3, 0), extra=extra) as launch:
        assert launch.wait(LONG) == 1
        told = line_with(launch.stderr, "updates of the policy in a row were skipped")
    assert (folder / "runs/moe_gspo/checkpoints/step_000002/manifest.json").is_file()
    assert not (folder / "runs/moe_gspo/checkpoints/step_000003").exists()
    return told


def exploding(folder: Path) -> str:
    """A finite but absurd ratio: warned about with the number, and training goes on."""
    with running(folder, ("exploding ratio", 1, "rl", 2, 0), extra=WHOLE_PASS) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
        text = " ".join(launch.stdout.split())
    found = re.search(r"ratio/max is (\S+), above faults.max_ratio = 100: .{60}", text)
    assert found and abs(math.log(float(found[1])) - 20) < 0.1, text[-3000:]
    return found[0]


# ---- Rewards ----


def scorer(folder: Path, kind: str, says: str, status: int) -> str:
    """Raises, hangs or gives nan at some responses; or always."""
    extra = ("--faults.reward-timeout", "1")
    with running(folder, (kind, 0, "rl", 0, 0), extra=extra) as launch:
        assert launch.wait(2 * LONG) == status, launch.stderr
        text = " ".join((launch.stdout + launch.stderr).split())
    assert says in text, text[-3000:]
    return text[text.rindex("tasks.", 0, text.index(says)) :]
