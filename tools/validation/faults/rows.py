"""Every fault that docs/faults.md promises to survive, in one table: what breaks, what is expected, how it is tried."""

import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tools.validation.faults import disks, folders, scenarios
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
    Row("metrics.jsonl cut in its last line", "put back from the checkpoint; " + SAME,
        lambda f, w: folders.damaged(f, w, folders.cut_record, "metrics.jsonl was damaged:", 3)),
    Row("metrics.jsonl of 0 bytes", "put back from the checkpoint; " + SAME,
        lambda f, w: folders.damaged(f, w, folders.empty_record, "metrics.jsonl is missing or empty:", 3)),
    Row("zeros in samples.jsonl", "the line is left out; " + SAME,
        lambda f, w: folders.damaged(f, w, folders.spoil_samples, "samples.jsonl: damaged lines left out: 1", 3)),
    Row("a damaged progress.json", "named; the checkpoint before is taken",
        lambda f, w: folders.damaged(f, w, folders.write("checkpoints/step_000003/progress.json", b"[]"),
                                     "step_000003/progress.json: damaged", 2)),
    Row("a manifest.json that names nothing", "named; the checkpoint before is taken",
        lambda f, w: folders.damaged(f, w, folders.write("checkpoints/step_000003/manifest.json", b"{}"),
                                     "step_000003/manifest.json: damaged", 2)),
    Row("an empty config.yaml", "named; the checkpoint's copy is read; " + SAME,
        lambda f, w: folders.damaged(f, w, folders.write("config.yaml", b""), "config.yaml: cannot be read", 3)),
    Row("the disk is full when a metrics row is written", "one message, no half line; with room " + SAME,
        folders.full_disk),
    Row("kill -9 inside the removal of an old checkpoint", "its rest is removed; " + SAME, folders.killed_in_removal),
    Row("kill -9 between the last checkpoint and the end", "the same command makes what is missing, and no step",
        folders.killed_at_the_end, in_ci=True),
    Row("two unfinished folders of one name", "the one that got furthest goes on; the other is not touched",
        folders.two_folders),
    Row("a corrupt line in a data file", "file and line are named before anything starts",
        lambda f, w: disks.corrupt_line(f)),
]  # fmt: skip
