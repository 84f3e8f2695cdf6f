"""kill -9 of random ranks at random moments of one training, which torchrun starts again each time."""

import contextlib
import json
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.validation.faults.scenarios import LONG, Whole, ranks_of, result, running, same
from tools.validation.launching import Launch, wait_until

ANYWHERE = 0.2  # the share of the kills that may hit the start itself too: imports, rendezvous, loading
START = 8.0  # seconds that such a kill may come after the ranks have started
STARTED = "RL: "  # the head of the table that a start prints when its training begins


@dataclass(frozen=True)
class Layout:
    name: str
    ranks: int
    options: tuple[str, ...]


def _sizes(tensor: int, pipeline: int, expert: int) -> tuple[str, ...]:
    words = []
    for name, size in (("tensor-model", tensor), ("pipeline-model", pipeline), ("expert-model", expert)):
        words += [f"--parallel.{name}-parallel-size", str(size)]
    return tuple(words)


LAYOUTS = [
    Layout("DP2, distributed optimizer", 2, (*_sizes(1, 1, 1), "--parallel.use-distributed-optimizer")),
    Layout("TP2 x PP2", 4, _sizes(2, 2, 1)),
    Layout("EP2 x PP2", 4, _sizes(1, 2, 2)),
]


@dataclass(frozen=True)
class Killed:
    """What one training went through. Its weights and record are checked already."""

    moments: list[str]
    """Of each kill: the rank, and the last step that was recorded before it."""
    seconds: float


def survive(folder: Path, layout: Layout, whole: Whole, kills: int, steps: int, seed: int, window: float) -> Killed:
    """Kill, `kills` times, most often within `window` seconds after a start has begun to train.

    Raises:
        AssertionError: weights or record are not those of `whole`, or the training was over before the last kill.
    """
    chance, moments, began = random.Random(seed), [], time.monotonic()
    with running(folder, extra=(*layout.options, "--steps", str(steps)), ranks=layout.ranks, restarts=kills) as launch:
        killed: set[int] = set()
        for number in range(kills):
            pids = _fresh_ranks(launch, layout.ranks, killed)
            _wait_a_while(launch, chance, window)
            assert launch.process.poll() is None, f"the training ended before kill {number + 1}: take more steps"
            rank = chance.randrange(layout.ranks)
            moments.append(f"rank {rank}, {_last_step(folder)}")
            os.kill(pids[rank], signal.SIGKILL)
            killed |= set(pids.values())
        assert launch.wait(LONG) == 0, launch.stderr[-3000:]
        assert launch.stderr.count("failed (exitcode: -9)") == kills, launch.stderr[-3000:]
    runs = sorted((folder / "runs").iterdir())
    same(result(folder, runs[-1].name, steps), whole)
    return Killed(moments, time.monotonic() - began)


def _fresh_ranks(launch: Launch, count: int, killed: set[int]) -> dict[int, int]:
    """rank -> pid of the next start, when all of it is there."""
    found: dict[int, int] = {}

    def all_there() -> bool:
        with contextlib.suppress(psutil.Error):  # one ended while it was looked at
            found.clear()
            found.update(ranks_of(launch))
        return len(found) == count and not killed & set(found.values())

    assert wait_until(all_there, LONG), launch.stderr[-3000:]
    return found


def _wait_a_while(launch: Launch, chance: random.Random, window: float) -> None:
    starts = launch.stdout.count(STARTED)
    if chance.random() < ANYWHERE:
        time.sleep(chance.uniform(0, START))
        return
    assert wait_until(lambda: launch.stdout.count(STARTED) > starts, LONG), launch.stderr[-3000:]
    time.sleep(chance.uniform(0, window))


def _last_step(folder: Path) -> str:
    paths = sorted(folder.glob("runs/*/metrics.jsonl"))
    lines = paths[-1].read_text().splitlines(keepends=True) if paths else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return f"after {whole[-1]['phase']} step {whole[-1]['step']}" if whole else "before the first step"


def undisturbed(folder: Path, layout: Layout, steps: int) -> Whole:
    with running(folder, extra=(*layout.options, "--steps", str(steps)), ranks=layout.ranks) as launch:
        assert launch.wait(LONG) == 0, launch.stderr[-3000:]
    return result(folder, steps=steps)
