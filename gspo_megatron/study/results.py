"""A study's data are read here as its finished runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gspo_megatron.metrics.record import Row, series
from gspo_megatron.study import archive
from gspo_megatron.study.plan import COLLAPSE, OUTCOME_FROM, RunSpec


@dataclass(frozen=True)
class RunResult:
    """This is one run."""

    spec: RunSpec
    about: dict[str, Any]  # the first line of its file
    rows: list[Row]  # by step; row 0 is the evaluation before RL

    @property
    def start(self) -> float:
        """Return held-out accuracy before RL."""
        return series(self.rows, "eval/accuracy")[1][0]

    @property
    def outcome(self) -> float:
        """Return held-out accuracy, mean over the evaluations after OUTCOME_FROM of the steps; 0 where the run did not
        reach them because its numbers were no longer finite."""
        steps, values = series(self.rows, "eval/accuracy")
        last = int(self.about.get("steps") or steps[-1])
        late = [value for step, value in zip(steps, values, strict=True) if step > OUTCOME_FROM * last]
        return 0.0 if self.about["status"] != "finished" else sum(late) / len(late)

    @property
    def collapsed(self) -> bool:
        return self.about["status"] != "finished" or self.outcome < COLLAPSE * self.start

    def mean(self, key: str) -> float | None:
        """Return the mean over the steps that have the metric."""
        values = series(self.rows, key)[1]
        return sum(values) / len(values) if values else None


def load(folder: Path) -> list[RunResult]:
    """Read all finished runs, by name."""
    return [_read(data) for data in archive.read(folder).values()]


def _read(data: bytes) -> RunResult:
    about, *rows = (json.loads(line) for line in data.decode("utf-8").splitlines())
    spec = RunSpec(*(about[name] for name in ("arm", "setting", "lr", "seed", "ranks")))
    return RunResult(spec, about, rows)


def of(
    results: list[RunResult], arm: str, setting: str = "main", lr: float | None = None, ranks: int = 1
) -> dict[int, RunResult]:
    """Return those of an arm in a setting, by seed."""
    return {
        r.spec.seed: r
        for r in results
        if (r.spec.arm, r.spec.setting, r.spec.ranks) == (arm, setting, ranks) and lr in (None, r.spec.lr)
    }
