"""Every fault that docs/faults.md promises to survive, in one table: what breaks, what is expected, how it is tried."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.validation.faults import disks, scenarios
from tools.validation.faults.scenarios import Whole


@dataclass(frozen=True)
class Row:
    """One fault in one training. `run` raises where it does not go as expected, and returns what the user reads."""

    fault: str
    expected: str
    run: Callable[[Path, Whole], str]
    in_ci: bool = False


SAME = "the same command goes on; weights and record as if undisturbed"
RESTARTED = "torchrun restarts; weights and record as if undisturbed"
SKIPPED = "skipped on all ranks, counted; the run goes on"

ROWS = [
    Row("kill -9 of a rank in rollout", RESTARTED, lambda f, w: scenarios.killed(f, w, "rollout")),
    Row("kill -9 of a rank in forward", RESTARTED, lambda f, w: scenarios.killed(f, w, "forward")),
    Row("kill -9 of a rank in backward", RESTARTED, lambda f, w: scenarios.killed(f, w, "backward")),
    Row("kill -9 of a rank in the optimizer's step", RESTARTED, lambda f, w: scenarios.killed(f, w, "optimizer")),
    Row("kill -9 of a rank while a checkpoint is written", RESTARTED,
        lambda f, w: scenarios.killed(f, w, "checkpoint")),
    Row("all five, one after the other", RESTARTED,
        lambda f, w: scenarios.killed(f, w, "rollout", "forward", "backward", "optimizer", "checkpoint"), in_ci=True),
    Row("kill -9 of torchrun", "its ranks end; " + SAME, scenarios.killed_launcher),
    Row("SIGTERM to torchrun", "a checkpoint after the step, then " + SAME,
        lambda f, w: scenarios.told_to_stop(f, w, signal.SIGTERM, to_launcher=True), in_ci=True),
    Row("SIGUSR1 to a rank", "a checkpoint after the step, status 85 of the rank; " + SAME,
        lambda f, w: scenarios.told_to_stop(f, w, signal.SIGUSR1, to_launcher=False)),
    Row("a rank hangs (SIGSTOP)", "named with its last heartbeat, the others' stacks; " + RESTARTED,
        scenarios.stopped, in_ci=True),
    Row("a rank lives but takes no part", "named with its place, the others' stacks; " + RESTARTED, scenarios.absent),
    Row("no room for a checkpoint", "said before writing; with room " + SAME, disks.no_room),
    Row("the disk fills up during a save", "said on all ranks, the half one removed; " + SAME, disks.full_disk,
        in_ci=True),
    Row("a checkpoint with a flipped bit", "its file is named; the one before is taken",
        lambda f, w: disks.spoiled(f, w, disks.flip)),
    Row("a truncated checkpoint", "its file is named; the one before is taken",
        lambda f, w: disks.spoiled(f, w, disks.truncate)),
    Row("a half-deleted checkpoint", "its file is named; the one before is taken",
        lambda f, w: disks.spoiled(f, w, disks.half_delete)),
    Row("NaN in one rank's gradient", SKIPPED,
        lambda f, w: scenarios.skipped(f, "nan gradient", 0, "gradient's norm is nan"), in_ci=True),
    Row("infinity in one rank's gradient", SKIPPED,
        lambda f, w: scenarios.skipped(f, "inf gradient", 1, "gradient's norm is")),
    Row("NaN in one rank's loss", SKIPPED, lambda f, w: scenarios.skipped(f, "nan loss", 1, "old_logprobs[")),
    Row("a ratio that overflows", SKIPPED, lambda f, w: scenarios.skipped(f, "overflowing ratio", 1, "overflows")),
    Row("more of them in a row than allowed", "the run ends with one message; the last good checkpoint is kept",
        lambda f, w: scenarios.too_many_skipped(f)),
    Row("a ratio of e^20", "a warning with the number; the run goes on", lambda f, w: scenarios.exploding(f)),
    Row("a reward function that raises", "the response gets no reward, counted; the run goes on",
        lambda f, w: scenarios.scorer(f, "scorer raises", "the scorer raised KeyError: 'broken'", 0)),
    Row("a reward function that hangs", "ended after the time-out, the response gets no reward; the run goes on",
        lambda f, w: scenarios.scorer(f, "scorer hangs", "no reward after 1 s", 0), in_ci=True),
    Row("a reward function that returns NaN", "the run ends with one message",
        lambda f, w: scenarios.scorer(f, "scorer gives nan", "nan", 1)),
    Row("a reward function that always raises", "the run ends with one message",
        lambda f, w: scenarios.scorer(f, "scorer always raises", "gold answer too", 1)),
    Row("a corrupt line in a data file", "file and line are named before anything starts",
        lambda f, w: disks.corrupt_line(f)),
]  # fmt: skip
