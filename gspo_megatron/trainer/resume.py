"""A run goes on where it ended: here is which folder and checkpoint to take, and what of the run's record to keep.

A run that was ended at any moment goes on from its newest intact checkpoint and repeats the steps after it. On the same
layout they are the same to the bit, because every draw is seeded by the run's seed and the step; so nothing of them
needs to be kept. The record (metrics.jsonl, samples.jsonl, TensorBoard) is cut back to the checkpoint first: each step
is in it once.

Left out: checkpoints in the middle of a rollout batch, and going on with another recipe.
"""

import dataclasses
import fcntl
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml
from pydantic import TypeAdapter

from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import CheckpointError
from gspo_megatron.metrics.tracker import METRICS_FILE, SAMPLES_FILE, read_metrics

# A run may go on with other values of these: they say where, how long and how often, not what is learned. (The layout
# and the packing change rounding alone.)
FREE = (
    "name",
    "output_dir",
    "resume",
    "steps",
    "eval_interval",
    "max_tokens_per_microbatch",
    "device",
    "parallel",
    "checkpoint",
    "faults",
    "save_hf",
)
LOCK = ".lock"  # flock'ed by rank 0 of the process that trains there
FOLDERS = {"warm_start": "warm_start_{:06d}", "rl": "step_{:06d}", "dpo": "step_{:06d}"}


@dataclass(frozen=True)
class Progress:
    """Says how far a checkpoint's run had come: the last step that it contains."""

    phase: str  # one of metrics.tracker.PHASES
    step: int
    prompts: int  # position of the prompt stream
    score: float | None  # eval/accuracy of that step, where it was evaluated

    @property
    def order(self) -> tuple[bool, int]:
        """Later in a run is larger."""
        return self.phase != "warm_start", self.step

    @property
    def folder(self) -> str:
        return FOLDERS[self.phase].format(self.step)


@dataclass(frozen=True)
class Plan:
    """Says what a start will do. Made on rank 0 alone."""

    folder: Path
    checkpoints: tuple[Path, ...] = ()  # to be tried in this order, newest first; none: a new run
    notes: tuple[str, ...] = ()  # for the user


def plan(config: TrainConfig) -> Plan:
    """Choose the folder of this start: an unfinished run's, or the next free one (output_dir/name, name-2, name-3,
    ...).

    Raises:
        CheckpointError: the newest run's config.yaml cannot be read.
    """
    newest, free = _folders(config)
    if config.resume == "never" or newest is None:
        return Plan(free)
    if not _is_free(newest):
        return Plan(free, notes=(f"{newest} is being trained by another process: a new run starts in {free}",))
    found = checkpoints(newest)
    if not found:
        return Plan(free, notes=(f"{newest} has no checkpoint to go on from: a new run starts in {free}",))
    last = max(found, key=lambda path: found[path].order)
    if found[last].phase != "warm_start" and found[last].step >= config.steps:
        return Plan(free)
    other = _difference(config, newest / "config.yaml")
    if other:
        note = f"{newest} is unfinished and of another recipe ({other}): a new run starts in {free}"
        return Plan(free, notes=(note,))
    return Plan(newest, tuple(sorted(found, key=lambda path: found[path].order, reverse=True)))


def hold(run_dir: Path) -> TextIO:
    """Take a run folder for this process until it ends, however it ends. Returns the file that holds it.

    Raises BlockingIOError where another process has it. A file system without locks lets every process have it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    file = (run_dir / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise
    except OSError:
        pass
    return file


def checkpoints(run_dir: Path) -> dict[Path, Progress]:
    """Return every complete checkpoint of a run. One whose progress cannot be read is none."""
    found = {}
    for path in sorted((run_dir / "checkpoints").glob("*/progress.json")):
        if path.parent.suffix != ".unfinished":
            try:
                found[path.parent] = Progress(**json.loads(path.read_text())["progress"])
            except (OSError, ValueError, KeyError, TypeError):
                continue
    return found


def prune(run_dir: Path, keep_last: int, keep_every: int, keep_best: bool) -> list[Path]:
    """Remove checkpoints that the recipe does not keep. Returns those removed."""
    found = checkpoints(run_dir)
    newest = sorted(found, key=lambda path: found[path].order, reverse=True)
    kept = set(newest[:keep_last])
    if keep_every:
        kept |= {path for path in found if found[path].step % keep_every == 0}
    scores = {path: score for path in newest if (score := found[path].score) is not None}
    if keep_best and scores:
        kept.add(max(scores, key=lambda path: scores[path]))  # the newest of equal ones
    removed = [path for path in newest if path not in kept]
    for path in removed:
        # Out of sight first, so that a kill in between leaves nothing that looks complete.
        aside = path.with_name(path.name + ".unfinished")
        path.rename(aside)
        shutil.rmtree(aside)
    return removed


def cut_back(run_dir: Path, progress: Progress) -> None:
    """Take out of the record what came after a checkpoint. TensorBoard's events are made again from what is left."""
    rows = [row for row in read_metrics(run_dir) if (row["phase"] != "warm_start", row["step"]) <= progress.order]
    _replace(run_dir / METRICS_FILE, rows)
    samples = run_dir / SAMPLES_FILE
    if samples.is_file():
        past = progress.step if progress.phase != "warm_start" else 0
        lines = samples.read_bytes().split(b"\n")[:-1]  # behind the last newline there is nothing, or half a line
        _replace(samples, [row for row in map(json.loads, lines) if row["step"] <= past])
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)


def _replace(path: Path, rows: list[dict[str, Any]]) -> None:
    aside = path.with_name(path.name + ".new")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    aside.write_bytes(text.encode("utf-8", errors="backslashreplace"))
    aside.rename(path)


def _is_free(run_dir: Path) -> bool:
    try:
        hold(run_dir).close()
    except BlockingIOError:
        return False
    return True


def _folders(config: TrainConfig) -> tuple[Path | None, Path]:
    """Return (the newest folder of this name or None, the next free one)."""
    newest, folder, number = None, config.output_dir / config.name, 1
    while folder.exists():
        number += 1
        newest, folder = folder, config.output_dir / f"{config.name}-{number}"
    return newest, folder


def _difference(config: TrainConfig, path: Path) -> str | None:
    """Return the first value of the recipe that is another one there than here, in words."""
    try:
        there = _flat(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}), so it is unknown whether that run can go on. Give --resume never for a "
            "new one."
        ) from None
    plain = dataclasses.replace(config, algorithm=config.algorithm.resolved())
    here, defaults = (_flat(TypeAdapter(TrainConfig).dump_python(one, mode="json")) for one in (plain, TrainConfig()))
    # A run that an earlier version began does not know the fields that were added since: their defaults are its values.
    there = {name: value for name, value in defaults.items() if not name.startswith("tasks.")} | there
    for name in [*here, *(other for other in there if other not in here)]:
        if name.split(".")[0] not in FREE and here.get(name) != there.get(name):
            return f"{name} = {there.get(name)!r} there, {here.get(name)!r} here"
    return None


def _flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat
