"""A run's metric rows are written to metrics.jsonl and TensorBoard, and read back by everything that looks at a run.

metrics.jsonl is the record, one JSON object a step: {"phase": one of PHASES, "step": int, <metric>: number or null, or
a list of them (by_layer/, by_minibatch/)}. Between them stand events: {"phase", "step", "event": "change",
"prompts": int, "changes": {<field of the recipe>: {"old": value, "new": value}}} says that the steps behind this one,
and the prompts behind so many, were taken with other values.
A row is on the disk before the checkpoint that counts it is begun, and one
that cannot be written ends the run. TensorBoard and the trackers of other libraries (sink.py) are views of the same
rows, without the lists, and samples.jsonl holds a few prompts and responses for the eye: a run goes on without them.

Left out: reducing metrics over ranks (a row arrives final, on rank 0), rotation of files.
"""

import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.utils.small_files import append, unwritten

if TYPE_CHECKING:
    from gspo_megatron.metrics.sink import Opener, Row, Sink

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
REMEDY = "Make room or make it writable, then start the same command: it goes on from the newest checkpoint."
PHASES = ("warm_start", "rl", "dpo")
PATIENCE = 90.0  # seconds for what trackers have not sent at the end of a run
BY_HAND = "Repair or remove the line by hand."
MOST_STEPS = 1 << 31


class MetricsError(GspoError):
    """Raised where a run folder's metrics are missing, corrupt or do not answer the question that was asked."""


class Tracker:
    """Appends a run's rows as they come. Rank 0 only; a resumed run continues the same files.

    Args:
        warn: receives one line of text for each thing a user should know; it defaults to Python's warnings.
        sinks: where the numbers are shown beside TensorBoard, by name.

    Raises:
        MetricsError: the files cannot be written.
    """

    def __init__(
        self,
        run_dir: Path,
        warn: Callable[[str], None] = warnings.warn,
        sinks: "Mapping[str, Opener] | None" = None,
    ) -> None:
        self._warn = warn
        self._is_told: set[str] = set()  # of these views the user knows that they are not complete
        self._run_dir = run_dir
        self._sinks: dict[str, Sink] = {}
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._metrics = self._open(run_dir / METRICS_FILE)
            self._samples = self._open(run_dir / SAMPLES_FILE)
        except OSError as error:
            raise MetricsError(unwritten(error, run_dir, REMEDY)) from None
        self._open_sinks({"tensorboard": self._events, **(sinks or {})})

    def log(self, row: dict[str, Any]) -> None:
        """Append one step's row and see it to the disk, so that no end of the process or the machine loses it.

        A NaN or an infinity is written as null, because JSON has neither, and is warned about. Raises MetricsError
        where the row cannot be written, and ValueError on a row without a known phase and an integer step: that is a
        defect of the caller.
        """
        if row.get("phase") not in PHASES or not isinstance(row.get("step"), int):
            raise ValueError(f"a metric row needs a phase of {PHASES} and an integer step, got {row!r}")
        plain = {key: value if key in ("phase", "step") else _number(value) for key, value in row.items()}
        finite = {key: _finite(value) for key, value in plain.items()}
        lost = [f"{key} is {plain[key]}" for key in plain if _not_finite(plain[key])]
        if lost:
            self._warn(f"{row['phase']} step {row['step']}: {', '.join(lost)}; written as null")
        self._write(finite)
        self._show(finite)

    def event(self, event: Event) -> None:
        """Append an event, which is on the disk then as a row is. Views have none. Raises MetricsError."""
        self._write(event.row())

    def sample(self, row: dict[str, Any]) -> None:
        """Append one prompt, response, reward and step to samples.jsonl, for a person to read."""
        try:
            append(self._samples, _line({key: None if _not_finite(value) else value for key, value in row.items()}))
        except OSError as error:
            self._go_without(SAMPLES_FILE, error)

    def close(self, patience: float = PATIENCE) -> None:
        """Close the files; further calls of log() fail. Each tracker has so many seconds for what it has not sent."""
        for name, sink in self._sinks.items():
            try:
                sink.close(patience)
            except Exception as error:
                self._go_without(name, error)
        self._metrics.close()
        self._samples.close()

    def _write(self, row: dict[str, Any]) -> None:
        try:
            append(self._metrics, _line(row))
            os.fsync(self._metrics.fileno())
        except OSError as error:
            raise MetricsError(unwritten(error, self._run_dir / METRICS_FILE, REMEDY)) from None

    def _events(self, earlier: "list[Row]") -> "Sink":
        # Here and not at the top: it costs a second, and read_metrics serves tools that never write an event.
        from gspo_megatron.metrics.events import EventFile

        return EventFile(self._run_dir / "tensorboard", earlier)

    def _open_sinks(self, openers: "Mapping[str, Opener]") -> None:
        """Open each with the rows that the record has, which go to those that have nothing of this run."""
        earlier = [_shown(row) for row in read_metrics(self._run_dir)]
        for name, opener in openers.items():
            try:
                self._sinks[name] = opener(earlier)
            except Exception as error:
                self._go_without(name, error)

    def _show(self, row: dict[str, Any]) -> None:
        for name, sink in self._sinks.items():
            try:
                sink.log(*_shown(row))
            except Exception as error:  # of any library: none of them is worth a training
                self._go_without(name, error)

    def _go_without(self, view: str, error: Exception) -> None:
        """Say once that a view of the run is not complete."""
        if view in self._is_told:
            return
        self._is_told.add(view)
        place = view if view.startswith("tracking.") else self._run_dir / view
        reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_words(error)
        self._warn(f"{place}: cannot be written ({reason}); the run goes on without")

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> FileIO:
        """Open for append, first cutting off a last line that a kill left unfinished: the next row would join it."""
        kept = path.read_bytes() if path.exists() else b""
        tail = kept.rpartition(b"\n")[2]
        file = FileIO(path, "a")
        if tail and _is_object(tail):
            append(file, b"\n")
        elif tail:
            file.truncate(len(kept) - len(tail))
            self._warn(f"{path}: removed an unfinished last line ({len(tail)} bytes)")
        return file


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Read every row of a run's metrics.jsonl in file order; a step that a resumed run went over again is there twice.

    An unfinished last line (the run was killed, or is writing now) is left out with a warning. Raises MetricsError
    that names file and line for any other line that is neither a row nor an event, and where there is no file.
    """
    return read_record(run_dir)[0]


def read_record(run_dir: Path) -> tuple[list[dict[str, Any]], list[Event]]:
    """Read the rows, as read_metrics does, and the events between them."""
    lines = _read(run_dir)
    rows = [line for line in lines if isinstance(line, dict)]
    return rows, [line for line in lines if isinstance(line, Event)]


def _read(run_dir: Path) -> list[dict[str, Any] | Event]:
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise MetricsError(f"{path}: no such file. Give the folder of a run, for example runs/moe_gspo.")
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()  # empty where the last line is complete
    rows = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    if tail and _is_object(tail):
        rows.append(_parse(tail, f"{path}, line {len(lines) + 1}"))
    elif tail:
        warnings.warn(f"{path}, line {len(lines) + 1}: unfinished last line left out", stacklevel=2)
    return rows


def _shown(row: dict[str, Any]) -> "Row":
    """Return a row's step and scalars; those of the warm start have names of their own, and so their own steps."""
    prefix = "warm_start/" if row["phase"] == "warm_start" else ""
    return row["step"], {
        prefix + key: value
        for key, value in row.items()
        if key not in ("phase", "step") and value is not None and not isinstance(value, list)
    }


def _first_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _line(row: dict[str, Any]) -> bytes:
    text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    # A lone surrogate in a sampled text cannot be encoded; backslashreplace turns it into JSON's own escape.
    return text.encode("utf-8", errors="backslashreplace") + b"\n"


def _number(value: Any) -> int | float | list | None:
    """Return a JSON number of a Python, NumPy or one-element torch value, or a list of them; None stays None."""
    if isinstance(value, list):
        return [_number(each) for each in value]
    return value if value is None or isinstance(value, int) else float(value)


def _finite(value: Any) -> Any:
    """Put None in place of what JSON has no word for."""
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if _not_finite(value) else value


def _not_finite(value: Any) -> bool:
    if isinstance(value, list):
        return any(_not_finite(each) for each in value)
    return isinstance(value, float) and not math.isfinite(value)


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")  # Python's reader would accept it, others would not


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line, parse_constant=_reject), dict)
    except (ValueError, RecursionError):
        return False


def _parse(line: bytes, where: str) -> dict[str, Any] | Event:
    try:
        row = json.loads(line, parse_constant=_reject)
    except (ValueError, RecursionError) as error:
        raise MetricsError(f"{where}: not valid JSON ({error}). {BY_HAND}") from error
    step = row.get("step") if isinstance(row, dict) else None
    if type(step) is not int or not 0 <= step < MOST_STEPS or row.get("phase") not in PHASES:
        raise MetricsError(f"{where}: not a metric row, which has a phase of {PHASES} and an integer step.")
    if "event" in row:
        try:
            return Event.of(row)
        except ValueError as error:
            raise MetricsError(f"{where}: {error}. {BY_HAND}") from None
    for key, value in row.items():
        if key not in ("phase", "step") and not _is_metric(key, value):
            kind = "a list of numbers" if "/by_" in key else "a number"
            raise MetricsError(f"{where}: {key} is {value!r:.60}, not {kind}. {BY_HAND}")
    return row


def _is_metric(key: str, value: Any) -> bool:
    if value is None:
        return True
    if "/by_" in key:
        return isinstance(value, list) and all(each is None or _is_number(each) for each in value)
    return _is_number(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # JSON has 1e999, and 400 digits
