"""A run goes on where it ended: here is what its folder holds of that, and what of the run's record to keep.

A run that was ended at any moment goes on from its newest intact checkpoint and repeats the steps after it. On the same
layout they are the same to the bit, because every draw is seeded by the run's seed and the step; so nothing of them
needs to be kept. A checkpoint carries the recipe and the record (metrics.jsonl) up to its step: the record is put back
to that, so each step is in it once, whatever has become of the file.

Which folder a start takes is folders.py. Left out: checkpoints in the middle of a rollout batch.
"""

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.errors import CheckpointError
from gspo_megatron.metrics.tracker import METRICS_FILE, SAMPLES_FILE
from gspo_megatron.rollout.record_files import ROLLOUTS, step_file
from gspo_megatron.utils import plain_json
from gspo_megatron.utils.small_files import replace, unwritten

CONFIG_FILE = "config.yaml"
FINISHED_FILE = "finished.json"
FOLDERS = {"warm_start": "warm_start_{:06d}", "rl": "step_{:06d}", "dpo": "step_{:06d}"}
HALVES = ("*.unfinished", "*.new", "*.replaced")  # names of what is being written, or removed
IS_CHECKPOINT = re.compile(r"(step|warm_start)_\d+")


@dataclass(frozen=True)
class Progress:
    """Says how far a checkpoint's run had come: the last step that it contains."""

    phase: str  # one of metrics.tracker.PHASES
    step: int
    prompts: int  # position of the prompt stream
    score: float | None  # eval/accuracy of that step, where it was evaluated

    @classmethod
    def of(cls, folder: Path) -> "Progress":
        """Read that of a checkpoint. Raises CheckpointError that names the file and what is wrong with it."""
        path = folder / "progress.json"
        try:
            found = plain_json.read_object(path).get("progress")
            if not isinstance(found, dict) or found.keys() != {"phase", "step", "prompts", "score"}:
                raise ValueError("says nothing of phase, step, prompts and score")
            phase, step, prompts, score = (found[name] for name in ("phase", "step", "prompts", "score"))
            if phase not in list(FOLDERS) or not all(type(number) is int and number >= 0 for number in (step, prompts)):
                raise ValueError(f"phase {phase!r}, step {step!r}, prompts {prompts!r} cannot be")
            if score is not None and type(score) not in (int, float):
                raise ValueError(f"score {score!r} is no number")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise CheckpointError(f"{path}: damaged ({why})") from None
        return cls(phase, step, prompts, score)

    @property
    def order(self) -> tuple[bool, int]:
        """Later in a run is larger."""
        return self.phase != "warm_start", self.step

    @property
    def folder(self) -> str:
        return FOLDERS[self.phase].format(self.step)


# ---- Checkpoints ----


def survey(run_dir: Path) -> tuple[dict[Path, Progress], list[str]]:
    """Return every complete checkpoint of a run, and a sentence about each one whose progress cannot be read."""
    found, damage = {}, []
    for path in sorted((run_dir / "checkpoints").glob("*")):
        if path.suffix == ".unfinished" or not path.is_dir():
            continue
        if IS_CHECKPOINT.fullmatch(path.name) or (path / "progress.json").exists():
            try:
                found[path] = Progress.of(path)
            except CheckpointError as error:
                damage.append(f"{error}. The checkpoint before it is tried.")
    return found, damage


def newest_first(found: Mapping[Path, Progress]) -> tuple[Path, ...]:
    """Return checkpoints in the order in which a start tries them."""
    return tuple(sorted(found, key=lambda path: found[path].order, reverse=True))


def prune(run_dir: Path, keep_last: int, keep_every: int, keep_best: bool) -> list[Path]:
    """Remove checkpoints that the recipe does not keep.

    Returns those removed. One that cannot be removed stays, and is tried again at the next call. A folder of another
    name than a run gives (a copy that somebody keeps) is left alone, and counts as none.
    """
    found = {path: at for path, at in survey(run_dir)[0].items() if IS_CHECKPOINT.fullmatch(path.name)}
    newest = newest_first(found)
    kept = set(newest[:keep_last])
    if keep_every:
        kept |= {path for path in found if found[path].step % keep_every == 0}
    scores = {path: score for path in newest if (score := found[path].score) is not None}
    if keep_best and scores:
        kept.add(max(scores, key=lambda path: scores[path]))  # the newest of equal ones
    return [path for path in newest if path not in kept and _remove(path)]


def _remove(path: Path) -> bool:
    # Out of sight first, so that an end in between leaves nothing that looks complete.
    aside = path.with_name(path.name + ".unfinished")
    clear(aside)
    try:
        path.rename(aside)
    except OSError:
        return False
    clear(aside)
    return True


def sweep(run_dir: Path) -> list[Path]:
    """Remove the halves of checkpoints and files that a kill has left; the folder must be held. Returns them."""
    places = (run_dir, run_dir / "checkpoints", run_dir / ROLLOUTS)
    halves = [path for place in places for end in HALVES for path in place.glob(end)]
    for path in halves:
        clear(path)
    return halves


def clear(path: Path) -> None:
    """Remove a folder or a file, if there is one. What cannot be removed stays, to be tried again at the next
    start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            pass


# ---- The end of a run ----


def mark_finished(run_dir: Path, step: int, has_hf: bool, epochs: int = 0) -> None:
    """Note that everything is done that follows this step, the last of so many epochs (0: of steps). Raises OSError."""
    replace(run_dir / FINISHED_FILE, json.dumps({"step": step, "hf": has_hf, "epochs": epochs}).encode())


def finished_step(run_dir: Path, wants_hf: bool) -> int | None:
    """Return the step at which the run ended in order, with a Hugging Face folder if one is wanted; else None."""
    mark = _mark(run_dir)
    step = mark.get("step")
    return step if type(step) is int and (mark.get("hf") is True or not wants_hf) else None


def finished_epochs(run_dir: Path) -> int:
    """Return how many epochs the run that ended in order was asked for; 0 where it was asked for steps."""
    epochs = _mark(run_dir).get("epochs")
    return epochs if type(epochs) is int else 0


def _mark(run_dir: Path) -> dict[str, Any]:
    try:
        return plain_json.read_object(run_dir / FINISHED_FILE)
    except (OSError, ValueError):  # none, or a damaged one: then the end is made once more
        return {}


# ---- The record ----


def carry(run_dir: Path, checkpoint: Path) -> None:
    """Copy recipe and record into a checkpoint that is being written. Raises OSError."""
    for name in (CONFIG_FILE, METRICS_FILE):
        shutil.copyfile(run_dir / name, checkpoint / name)


def restore_record(run_dir: Path, checkpoint: Path, progress: Progress) -> list[str]:
    """Put metrics.jsonl, samples.jsonl and rollouts/ back to what they were at a checkpoint; returns what to tell the
    user.

    TensorBoard's events are removed: the tracker makes them again from the record.

    Raises:
        CheckpointError: the files cannot be written.
    """
    try:
        notes = [*_restore_metrics(run_dir, checkpoint, progress), *_cut_samples(run_dir, progress)]
        _cut_rollouts(run_dir, progress)
    except OSError as error:
        remedy = "Make room or make it writable, then start the same command."
        raise CheckpointError(unwritten(error, run_dir, remedy)) from None
    _empty(run_dir / "tensorboard")
    return notes


def _empty(folder: Path) -> None:
    """Remove a folder, and what is in the one that it is a link to; the link stays."""
    for path in folder.iterdir() if folder.is_symlink() and folder.is_dir() else (folder,):
        clear(path)


def _restore_metrics(run_dir: Path, checkpoint: Path, progress: Progress) -> list[str]:
    path = run_dir / METRICS_FILE
    here = path.read_bytes() if path.is_file() else b""
    if not (checkpoint / METRICS_FILE).is_file():
        return _cut_metrics(path, here, progress)  # of a version whose checkpoints do not carry it
    carried = (checkpoint / METRICS_FILE).read_bytes()
    if here != carried:
        replace(path, carried)
    if here.startswith(carried):
        return []
    missing = "is missing or empty" if not here else "was damaged"
    return [f"{path} {missing}: its rows up to {progress.phase} step {progress.step} are those of {checkpoint}"]


def _cut_metrics(path: Path, here: bytes, progress: Progress) -> list[str]:
    lines, bad = _objects(here)
    rows = [row for row in lines if row.get("phase") in list(FOLDERS) and type(row.get("step")) is int]
    kept = [row for row in rows if (row["phase"] != "warm_start", row["step"]) <= progress.order]
    _write_rows(path, kept)
    bad += len(lines) - len(rows)
    notes = [f"{path}: damaged lines left out: {bad}"] if bad else []
    if not kept or (kept[-1]["phase"], kept[-1]["step"]) != (progress.phase, progress.step):
        notes.append(f"{path} was damaged: the row of {progress.phase} step {progress.step} is lost")
    return notes


def _cut_samples(run_dir: Path, progress: Progress) -> list[str]:
    path = run_dir / SAMPLES_FILE
    if not path.is_file():
        return []
    lines, bad = _objects(path.read_bytes())
    rows = [row for row in lines if type(row.get("step")) is int]
    # Rows of version 0.1.0 have no phase: they are all of RL.
    kept = [row for row in rows if (row.get("phase") != "warm_start", row["step"]) <= progress.order]
    _write_rows(path, kept)
    bad += len(lines) - len(rows)
    return [f"{path}: damaged lines left out: {bad}"] if bad else []


def _cut_rollouts(run_dir: Path, progress: Progress) -> None:
    """Remove the files of steps that are to be taken again, perhaps on another layout or without rollout.save."""
    last = step_file(run_dir, _rl_steps(progress))
    for path in last.parent.glob("step_*.jsonl"):
        if path.name > last.name:
            path.unlink()


def _rl_steps(progress: Progress) -> int:
    return progress.step if progress.phase != "warm_start" else 0


def _objects(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Return the JSON objects of all lines, and how many lines are none; half a line at the end, as a kill leaves it,
    is not counted."""
    *lines, tail = content.split(b"\n")
    rows = [row for line in lines if (row := _object(line)) is not None]
    last = _object(tail)
    return rows + ([last] if last is not None else []), len(lines) - len(rows)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = plain_json.parse(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace(path, text.encode("utf-8", errors="backslashreplace"))
