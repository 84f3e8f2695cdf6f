"""Readers see a finished or running run like this: recipe and rows, split by phase and in order of steps.

Left out: any judgement (learning.py) and any drawing (panels.py).
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.metrics.tracker import BY_HAND, METRICS_FILE, PHASES, MetricsError, read_record
from gspo_megatron.utils import plain_yaml

Row = dict[str, Any]
# Of what criteria and intervals are computed from. No reward beyond 1e30 gets into a record (docs/faults.md).
RANGES = {"eval/accuracy": (0.0, 1.0), "eval/num": (1.0, 1e18), "reward/mean": (-1e30, 1e30)}


@dataclass(frozen=True)
class RunRecord:
    """This is one run folder, read."""

    path: Path
    config: dict[str, Any]  # config.yaml as written; empty where the folder has none
    warm_start: list[Row]  # by step, 1..n
    rl: list[Row]  # by step; row 0 holds only the evaluation before RL
    dpo: list[Row] = field(default_factory=list)  # likewise, of a run that has DPO in place of RL
    events: list[Event] = field(default_factory=list)  # in order

    def setting(self, dotted: str, default: Any = None) -> Any:
        """Return a value of config.yaml, for example setting("algorithm.clip_ratio_low")."""
        value: Any = self.config
        for part in dotted.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def number(self, dotted: str) -> float | None:
        """Return a number of config.yaml, None where there is none. Raises MetricsError for anything else."""
        value = self.setting(dotted)
        if not _is_number_or_none(value):
            raise MetricsError(f"{self.path / 'config.yaml'}: {dotted} is {value!r:.60}, not a number. Correct it.")
        return value

    def numbers(self, dotted: str, phase: str) -> list[tuple[float, float | None]]:
        """Return a number of the recipe as (place from which on it counted, value), in order: -inf for the start of the
        phase, and half a step behind the last step with the value before.

        Raises MetricsError for what is neither a number nor None.
        """
        events = [event for event in self.events if dotted in event.changes]
        for event in events:
            if not all(_is_number_or_none(value) for value in event.changes[dotted]):
                raise MetricsError(f"{self.path / METRICS_FILE}: {dotted} changed by {event}, no numbers. {BY_HAND}")
        found = [(-math.inf, events[0].changes[dotted][0] if events else self.number(dotted))]
        for event in events:
            new = event.changes[dotted][1]
            if event.phase == phase:
                found.append((event.step + 0.5, new))
            elif event.phase == "warm_start":  # which was before
                found = [(-math.inf, new)]
        return found

    def rows(self, phase: str) -> list[Row]:
        """Return the rows of one of tracker.PHASES."""
        return {"warm_start": self.warm_start, "rl": self.rl, "dpo": self.dpo}[phase]


def load_record(run_dir: Path) -> RunRecord:
    """Read config.yaml and metrics.jsonl. Where a resumed run went over a step again, its later row counts.

    Raises MetricsError on missing, empty or corrupt metrics, on one that is out of its range, and on a config.yaml that
    is not a YAML mapping.
    """
    rows, events = read_record(run_dir)
    if not rows:
        raise MetricsError(
            f"{run_dir / METRICS_FILE}: has no row. The run has made no step yet; or its record was lost, and is put "
            "back from the newest checkpoint where the run is started again."
        )
    for row in rows:
        _check_ranges(row, run_dir / METRICS_FILE)
    by_step = {(row["phase"], row["step"]): row for row in rows}
    ordered = [by_step[key] for key in sorted(by_step, key=lambda key: key[1])]
    by_phase = {phase: [row for row in ordered if row["phase"] == phase] for phase in PHASES}
    return RunRecord(run_dir, _read_config(run_dir / "config.yaml"), **by_phase, events=events)


def series(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric; rows where it is absent or null (it was not finite) are left out."""
    kept = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and abs(value) <= sys.float_info.max)


def _check_ranges(row: Row, path: Path) -> None:
    for key, (low, high) in RANGES.items():
        value = row.get(key)
        if value is not None and not low <= value <= high:
            raise MetricsError(
                f"{path}: {key} is {value!r:.60} at {row['phase']} step {row['step']}, not between {low:g} and "
                f"{high:g}. {BY_HAND}"
            )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=plain_yaml.Loader)
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise MetricsError(f"{path}: not readable as YAML ({error}).") from error
    if not isinstance(config, dict):
        raise MetricsError(f"{path}: not a mapping of settings.")
    return config
