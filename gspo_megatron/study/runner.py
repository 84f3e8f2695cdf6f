"""Runs a study's trainings, several at a time, each a process of its own, and keeps what they measured.

A finished run is one JSONL file in the study's data folder: a line about the run, then a line a step. It appears when
the run is over, so a study that is cut short goes on with what is missing. Runs that a report has packed (archive.py)
are not missing. Run folders (checkpoints, logs) are in a work folder and may be deleted.

Left out: runs on other machines. A Slurm array shares the folder instead, each job with its own part (command.py).
"""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics.tracker import read_metrics
from gspo_megatron.recipe.hf_config import read_json
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.study import archive
from gspo_megatron.study.plan import SETTINGS, RunSpec, StartSpec
from gspo_megatron.utils import plain_yaml

KEPT = (  # of each step
    "reward/mean", "eval/accuracy", "loss", "grad_norm", "update/skipped", "ratio/std", "ratio/noise_floor",
    "clip/seq_low", "clip/seq_high", "clip/token", "entropy", "response/length", "perf/tokens_per_second",
    "route/changed_tokens", "route/changed_experts", "route/changed_experts_one_update", "route/entropy",
    "route/load_imbalance", "route/changed_clipped", "route/changed_unclipped", "route/change_ratio_correlation",
    "route/by_layer/changed_experts", "ratio_parts/token_total", "ratio_parts/token_weights",
    "ratio_parts/token_routes", "ratio_parts/sequence_total", "ratio_parts/sequence_weights",
    "ratio_parts/sequence_routes", "time/update", "time/step", "time/eval",
)  # fmt: skip
NOT_FINITE = "faults.max_skipped_updates"  # in the last words of a run that found too many numbers not finite
DIGITS = 4  # significant


class StudyError(GspoError):
    """Raised for a study that cannot go on."""


@dataclass(frozen=True)
class Study:
    """Says where a study lives, and what its runs share."""

    recipe: Path
    folder: Path  # data, loose or packed, and the report
    work: Path  # run folders
    slots: int  # ranks that train at the same time
    extra: dict[str, Any] = field(default_factory=dict)  # overrides of every run

    def data_file(self, spec: RunSpec) -> Path:
        return self.folder / archive.LOOSE / f"{spec.name}.jsonl"

    @property
    def fingerprint(self) -> str:
        """Return a hash of the recipe's values and the common overrides: what all runs of a folder must share."""
        shared = [yaml.load(self.recipe.read_text(encoding="utf-8"), plain_yaml.Loader), self.extra]
        return hashlib.sha256(json.dumps(shared, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass
class _Running:
    spec: RunSpec | StartSpec
    process: subprocess.Popen
    slots: int
    began: float


def run_all(study: Study, specs: list[RunSpec]) -> list[str]:
    """Train what has no data yet. Returns a message for each run that failed.

    Raises:
        StudyError: the folder's data are of another recipe, or a start failed.
    """
    (study.folder / archive.LOOSE).mkdir(parents=True, exist_ok=True)
    kept = archive.read(study.folder)
    todo = [spec for spec in specs if not _is_done(study, spec, kept)]
    waiting: list[RunSpec | StartSpec] = []
    for spec in todo:
        if spec.start not in waiting and not _weights(study, spec.start).exists():
            waiting.append(spec.start)
        waiting.append(spec)
    failures: list[str] = []
    with _progress(len(specs), len(specs) - len(todo)) as advance:
        running: list[_Running] = []
        while waiting or running:
            _start_ready(study, waiting, running)
            time.sleep(0.5)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                failures += _finish(study, job)
                if isinstance(job.spec, RunSpec):
                    advance(job.spec.name)
    return failures


def _is_done(study: Study, spec: RunSpec, kept: dict[str, bytes]) -> bool:
    data = kept.get(study.data_file(spec).name)
    if data is None:
        return False
    about = json.loads(data.partition(b"\n")[0])
    if about["recipe"] != study.fingerprint:
        raise StudyError(
            f"{study.folder}: run {spec.name} had another recipe or other common overrides than this study "
            f"({about['recipe']} against {study.fingerprint}). Give --folder another folder, or remove "
            f"{archive.PACKED} and {archive.LOOSE}/ from it to run everything anew."
        )
    return True


def _weights(study: Study, start: StartSpec) -> Path:
    return study.work / start.name / "hf"


def _start_ready(study: Study, waiting: list, running: list[_Running]) -> None:
    """Start what has its weights and fits the free slots; a run that is larger than all slots runs alone."""
    for spec in list(waiting):
        free = study.slots - sum(job.slots for job in running)
        if free <= 0:
            return
        ranks = min(getattr(spec, "ranks", 1), study.slots)
        if isinstance(spec, RunSpec) and not _weights(study, spec.start).exists():
            continue
        if ranks > free:
            return  # larger runs would wait for ever behind smaller ones
        waiting.remove(spec)
        running.append(_Running(spec, _launch(study, spec), ranks, time.monotonic()))


def _launch(study: Study, spec: RunSpec | StartSpec) -> subprocess.Popen:
    study.work.mkdir(parents=True, exist_ok=True)
    words: dict[str, Any] = {"output-dir": study.work, "name": spec.name, "resume": "never", **study.extra}
    if isinstance(spec, StartSpec):
        words |= {"seed": spec.seed, "steps": 0, "routing.diagnostics-interval": 0}
        model = _model(study, spec)
        words |= {"model.hf-config": model} if model else {}
        flags = ["--save-hf"]
    else:
        words |= spec.overrides | {"model.load-hf": _weights(study, spec.start), "warm-start.steps": 0}
        flags = []
    for stale in (study.work / spec.name, study.work / f"{spec.name}.log"):  # of a study that was cut short
        _remove(stale)
    options = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "gspo_megatron.cli", "train", str(study.recipe), *options, *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {"NPROC": str(getattr(spec, "ranks", 1)), "OMP_NUM_THREADS": "1"}
    with (study.work / f"{spec.name}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """A study that is killed must not leave trainings behind."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _model(study: Study, start: StartSpec) -> Path | None:
    """The recipe's config.json with the setting's changes; None: as it is."""
    changes = SETTINGS[start.setting].model
    if not changes:
        return None
    path = study.work / f"{start.setting}.json"
    original = load_recipe([str(study.recipe)], quiet=True).model.hf_config
    path.write_text(json.dumps(read_json(original, "model.hf_config") | changes, indent=2))
    return path


def _finish(study: Study, job: _Running) -> list[str]:
    spec, status, log = job.spec, job.process.returncode, study.work / f"{job.spec.name}.log"
    text = log.read_text(encoding="utf-8", errors="replace")
    if isinstance(spec, StartSpec):
        if status != 0:
            raise StudyError(f"{log}: the start of seed {spec.seed} failed:\n{_last_words(text)}")
        return []
    collapsed = status != 0 and NOT_FINITE in text
    if status != 0 and not collapsed:
        return [f"{log}: run {spec.name} failed with status {status}:\n{_last_words(text)}"]
    _keep(study, spec, job.began, "not finite" if collapsed else "finished")
    _remove(study.work / spec.name)
    return []


def _last_words(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-12:])


def _keep(study: Study, spec: RunSpec, began: float, status: str) -> None:
    """Write the data file aside, then rename it."""
    run = study.work / spec.name
    about = {
        **asdict(spec),
        "overrides": {k: str(v) for k, v in spec.overrides.items()},
        "status": status,
        "recipe": study.fingerprint,
        "start": _digest(_weights(study, spec.start)),
        "seconds": round(time.monotonic() - began, 1),
    }
    rows = [row for row in read_metrics(run) if row["phase"] == "rl"]
    lines = [about, *(_measured(row) for row in rows)]
    target = study.data_file(spec)
    aside = target.with_suffix(".part")
    aside.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    aside.rename(target)


def _measured(row: dict) -> dict:
    """What is kept of a step; lists only where there is an evaluation, because they are long."""
    kept = {key: _short(row[key]) for key in KEPT if key in row}
    return {"step": row["step"]} | {k: v for k, v in kept.items() if not isinstance(v, list) or "eval/accuracy" in row}


def _digest(folder: Path) -> str:
    """Hash the starting weights' files, to tell whether two runs began alike."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


@contextmanager
def _progress(total: int, done: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr; in a log file a line a run."""
    console = Console(stderr=True)
    if not console.is_terminal:
        count = done

        def tell(name: str) -> None:
            nonlocal count
            count += 1
            print(f"{count} of {total}: {name}", file=sys.stderr, flush=True)

        yield tell
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("runs", total=total, completed=done)
        yield lambda name: bar.update(task, advance=1, description=name)
