"""Did a run learn? The numbers that answer it, read from metrics.jsonl, and the criteria they are held to.

The claim under test: RL on fresh prompts raised held-out accuracy (pass@1) by at least `min_rise` and the training
reward from its first quarter to its last, while a control run with shuffled advantages rose by at most
`max_control_rise`. Greedy accuracy and the gain over the warm start's last third are shown for the reader to judge: a
rise of pass@1 without one of greedy accuracy means that RL made the policy surer, not abler.

Left out: statistics over seeds (each run is judged alone) and the pairing of evaluations on the same prompts, so
the standard errors here are an upper bound for differences within a run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from gspo_megatron.metrics.record import RunRecord, load_record, series
from gspo_megatron.metrics.tracker import MetricsError

ACCURACY = "eval/accuracy"
TOLERANCE = 1e-9  # 0.7 - 0.5 is 0.19999999999999996 in binary and must pass for 0.2


@dataclass(frozen=True)
class LearningReport:
    """This is one run's row of the table. Accuracies and rewards are shares or means, not percent."""

    run: str
    control: bool  # advantages were shuffled
    seed: int | None
    start: float  # held-out accuracy before RL
    start_error: float | None  # its standard error; None where eval/num was not logged
    warm_gain: float | None  # last warm-start evaluation minus the one at two thirds; None with fewer than two
    final: float  # the last evaluation of the run
    best: float  # over all evaluations from step 0 on
    greedy: tuple[float, float] | None  # greedy accuracy before RL and at the end
    reward_first: float | None  # mean training reward of the first quarter of RL steps
    reward_last: float | None
    warm_minutes: float
    rl_minutes: float
    steps_done: int
    steps_planned: float | None  # of the recipe; None without config.yaml

    @property
    def rise(self) -> float:
        return self.final - self.start


def standard_error(share: float, count: float) -> float:
    """Return that of a share of `count` independent yes/no outcomes (binomial)."""
    return math.sqrt(share * (1 - share) / count)


def wilson_interval(share: float, count: float, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval of a binomial share, 95% by default; unlike share +- 2 s.e. it stays inside [0,
    1]."""
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(run_dir: Path) -> LearningReport:
    """Read one run. Raises MetricsError where it has no evaluation at RL step 0 or none after it."""
    record = load_record(run_dir)
    if record.dpo:
        raise MetricsError(f"{run_dir}: a DPO run, which has no RL steps to judge. See dpo/eval_accuracy in its rows.")
    steps, accuracies = series(record.rl, ACCURACY)
    if not steps or steps[0] != 0:
        raise MetricsError(f"{run_dir}: no {ACCURACY} at RL step 0, so there is no start to compare with.")
    if len(steps) < 2:
        raise MetricsError(f"{run_dir}: no {ACCURACY} after RL step 0. Let the run reach its next evaluation.")
    count = record.rl[0].get("eval/num")
    _, greedy = series(record.rl, "eval/accuracy_greedy")
    _, rewards = series([row for row in record.rl if row["step"] > 0], "reward/mean")
    quarter = max(1, len(rewards) // 4)
    return LearningReport(
        run=str(run_dir),
        control=bool(record.setting("algorithm.shuffle_advantages", False)),
        seed=record.setting("seed"),
        start=accuracies[0],
        start_error=standard_error(accuracies[0], count) if count else None,
        warm_gain=_gain_over_last_third(record),
        final=accuracies[-1],
        best=max(accuracies),
        greedy=(greedy[0], greedy[-1]) if greedy else None,
        reward_first=fmean(rewards[:quarter]) if rewards else None,
        reward_last=fmean(rewards[-quarter:]) if rewards else None,
        warm_minutes=_minutes(record, "warm_start"),
        rl_minutes=_minutes(record, "rl"),
        steps_done=record.rl[-1]["step"],
        steps_planned=record.number("steps"),
    )


def failures(report: LearningReport, min_rise: float = 0.20, max_control_rise: float = 0.05) -> list[str]:
    """Return each criterion this run does not meet as a sentence with both numbers; nothing where it passes.

    A run that stopped before its recipe's last step fails too: the step it stopped at must not be a free choice.
    """
    found = []
    span = f"({report.start:.3f} to {report.final:.3f})"
    if report.steps_planned is not None and report.steps_done < report.steps_planned:
        found.append(f"{report.run}: stopped at RL step {report.steps_done} of {report.steps_planned}")
    if report.control and report.rise > max_control_rise + TOLERANCE:
        found.append(f"{report.run}: control rose by {report.rise:.3f} {span}, more than {max_control_rise:.3f}")
    if not report.control and report.rise < min_rise - TOLERANCE:
        found.append(f"{report.run}: rise {report.rise:.3f} {span} is below {min_rise:.3f}")
    first, last = report.reward_first, report.reward_last
    if not report.control and first is not None and last is not None and last <= first:
        found.append(f"{report.run}: mean reward fell from {first:.3f} in the first quarter to {last:.3f} in the last")
    return found


def summarise_all(runs: Sequence[Path], controls: Sequence[Path] = ()) -> list[LearningReport]:
    """Read the runs, then the controls. Raises MetricsError where a run is given in the other's place."""
    reports = [summarise(path) for path in [*runs, *controls]]
    for position, report in enumerate(reports):
        expected = position >= len(runs)
        if report.control != expected:
            raise MetricsError(
                f"{report.run}: algorithm.shuffle_advantages = {report.control} in its config.yaml. "
                f"Give {'only control runs' if expected else 'a control run'} with --control."
            )
    return reports


def markdown_table(reports: Sequence[LearningReport], verdicts: Sequence[str]) -> str:
    """Make a Markdown table with aligned columns, one row a run; `verdicts` fills the last column."""
    titles = [
        "run",
        "seed",
        "warm start",
        "s.e.",
        "last-third gain",
        "final",
        "best",
        "rise",
        "greedy",
        "reward, first quarter",
        "last quarter",
        "minutes (warm start + RL)",
        "verdict",
    ]
    cells = [titles] + [_cells(report) + [verdict] for report, verdict in zip(reports, verdicts, strict=True)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    rule = "|".join(
        f" {'-' * width} " if column == 0 else f" {'-' * (width - 1)}: " for column, width in enumerate(widths)
    )
    lines = [
        "|".join(
            f" {cell:<{width}} " if column == 0 else f" {cell:>{width}} "
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(f"|{line}|" for line in [lines[0], rule, *lines[1:]])


def _cells(report: LearningReport) -> list[str]:
    total = report.warm_minutes + report.rl_minutes
    return [
        report.run + (" (control)" if report.control else ""),
        "-" if report.seed is None else str(report.seed),
        f"{report.start:.3f}",
        _optional(report.start_error),
        _optional(report.warm_gain, "+.3f"),
        f"{report.final:.3f}",
        f"{report.best:.3f}",
        f"{report.rise:+.3f}",
        "-" if report.greedy is None else f"{report.greedy[0]:.3f} to {report.greedy[1]:.3f}",
        _optional(report.reward_first),
        _optional(report.reward_last),
        f"{total:.1f} ({report.warm_minutes:.1f} + {report.rl_minutes:.1f})",
    ]


def _optional(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _gain_over_last_third(record: RunRecord) -> float | None:
    """Return the last evaluation minus the last one at or before two thirds of its step (or the first, where all are
    later)."""
    steps, accuracies = series(record.warm_start, ACCURACY)
    if len(steps) < 2:
        return None
    earlier = [accuracy for step, accuracy in zip(steps, accuracies, strict=True) if 3 * step <= 2 * steps[-1]]
    return accuracies[-1] - (earlier[-1] if earlier else accuracies[0])


def _minutes(record: RunRecord, phase: str) -> float:
    """Add up steps and evaluations; time/step does not contain time/eval."""
    return sum(sum(series(record.rows(phase), key)[1]) for key in ("time/step", "time/eval")) / 60
