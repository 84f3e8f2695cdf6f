"""The study of algorithms asks what each needs to reach the same held-out accuracy, at its own best learning rate.

Left out: DPO, which has no rollouts and so no reward by step.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gspo_megatron.metrics.axes import BLUE, GREEN, ORANGE, PURPLE, RED, SKY
from gspo_megatron.metrics.plots import LOOK
from gspo_megatron.metrics.record import series
from gspo_megatron.study import document, plan
from gspo_megatron.study.document import Document, Section
from gspo_megatron.study.inference import Interval, interval, paired, together
from gspo_megatron.study.results import RunResult, load, of
from gspo_megatron.study.wording import say

TITLE = "Seven algorithms, six of them with rollouts"
COLOURS = dict(zip(plan.ALGORITHM_ARMS, (BLUE, SKY, RED, ORANGE, GREEN, PURPLE), strict=True))


@dataclass(frozen=True)
class Reached:
    """Says what one run needed to reach plan.THRESHOLD; where it did not, None stands in its place."""

    steps: int
    tokens: float  # sampled and trained on, prompts included
    seconds: float


@dataclass(frozen=True)
class AlgorithmCell:
    """Describes one algorithm at one learning rate."""

    arm: str
    lr: float
    best: bool  # of the learning rates, by mean outcome
    outcome: Interval
    collapsed: int
    reached: int  # seeds
    steps: float | None  # medians over the seeds that reached it
    tokens: float | None
    seconds: float | None


@dataclass(frozen=True)
class AlgorithmFindings:
    cells: list[AlgorithmCell]
    against_gspo: dict[str, Interval]  # arm -> gspo's outcome minus its, each at its own best learning rate
    conclusion: list[str]


def write(folder: Path) -> str:
    """Write the report of what data there are. Returns a line for people."""
    results = load(folder)
    if not results:
        return f"{folder}: no finished run yet, so no report"
    findings = find(results)
    hours = sum(run.about["seconds"] for run in results) / 3600
    summary = say("algorithms", runs=len(results), hours=hours, threshold=plan.THRESHOLD)
    sections = [
        Section(
            "What each needed",
            [say("reached", threshold=plan.THRESHOLD)],
            COLUMNS,
            [_row(cell) for cell in findings.cells],
            ["accuracy"],
        ),
        Section(
            "Against GSPO",
            [say("against")],
            ["difference", "accuracy"],
            [[f"gspo − {arm}", str(found)] for arm, found in findings.against_gspo.items()],
        ),
        Section("What is not shown", [say("scale"), say("efficiency")]),
    ]
    with matplotlib.rc_context(LOOK):
        pictures = {"accuracy": _picture(results, findings)}
    document.write(Document(TITLE, summary, findings.conclusion, sections, pictures, findings), folder)
    return f"{folder / 'report.html'}: {len(results)} runs. {findings.conclusion[0]}"


COLUMNS = [
    "algorithm",
    "learning rate",
    "seeds",
    "accuracy after (95%)",
    "collapsed",
    "reached",
    "steps",
    "thousand tokens",
    "seconds",
]


def reached(run: RunResult) -> Reached | None:
    """Return what the first evaluation with an accuracy of plan.THRESHOLD or more took; None where there was none."""
    tokens = seconds = 0.0
    for row in run.rows:
        step_seconds = row.get("time/step") or 0.0
        seconds += step_seconds
        tokens += step_seconds * (row.get("perf/tokens_per_second") or 0.0)
        if row.get("eval/accuracy") is not None and row["eval/accuracy"] >= plan.THRESHOLD:
            return Reached(row["step"], tokens, seconds)
    return None


def find(results: list[RunResult]) -> AlgorithmFindings:
    arms = [arm for arm in plan.ALGORITHM_ARMS if any(run.spec.arm == arm for run in results)]
    best = {arm: _best_rate(results, arm) for arm in arms}
    cells = [
        _cell(results, arm, lr, lr == best[arm])
        for arm in arms
        for lr in sorted({run.spec.lr for run in results if run.spec.arm == arm})
    ]
    gspo = {seed: run.outcome for seed, run in of(results, "gspo", lr=best.get("gspo")).items()}
    against, confidence = {}, together(plan.CONFIDENCE, len(arms) - 1)
    for arm in arms:
        theirs = {seed: run.outcome for seed, run in of(results, arm, lr=best[arm]).items()}
        if arm != "gspo" and (found := paired(gspo, theirs, confidence)):
            against[arm] = found
    return AlgorithmFindings(cells, against, _conclude([cell for cell in cells if cell.best], against))


def _best_rate(results: list[RunResult], arm: str) -> float:
    """Choose by mean outcome, of the rates that have as many seeds as any."""
    outcomes: dict[float, list[float]] = {}
    for run in results:
        if run.spec.arm == arm:
            outcomes.setdefault(run.spec.lr, []).append(run.outcome)
    return max(outcomes, key=lambda lr: (len(outcomes[lr]), sum(outcomes[lr]) / len(outcomes[lr])))


def _cell(results: list[RunResult], arm: str, lr: float, best: bool) -> AlgorithmCell:
    runs = list(of(results, arm, lr=lr).values())
    found = [each for run in runs if (each := reached(run))]

    def median(name: str) -> float | None:
        return float(np.median([getattr(each, name) for each in found])) if found else None

    return AlgorithmCell(
        arm,
        lr,
        best,
        interval([run.outcome for run in runs], plan.CONFIDENCE),
        sum(run.collapsed for run in runs),
        len(found),
        median("steps"),
        median("tokens"),
        median("seconds"),
    )


def _conclude(best: list[AlgorithmCell], against: dict[str, Interval]) -> list[str]:
    """Only seeds that all reached count in the order: an algorithm that reached in some seeds alone is named apart."""
    whole = [
        (c.arm, c.steps, c.tokens)
        for c in best
        if c.reached == c.outcome.count and c.steps is not None and c.tokens is not None
    ]
    whole.sort(key=lambda each: each[2])
    told = ", ".join(f"{arm} {steps:.0f} steps and {tokens / 1e3:.0f} thousand tokens" for arm, steps, tokens in whole)
    partly = ", ".join(f"{c.arm} ({c.reached} of {c.outcome.count})" for c in best if c.reached < c.outcome.count)
    better = [arm for arm, found in against.items() if found.above_zero]
    worse = [arm for arm, found in against.items() if found.below_zero]
    sentences = [say("order", told=told or "none of them", threshold=plan.THRESHOLD)]
    if partly:
        sentences.append(say("partly", told=partly))
    return [*sentences, say("tests", better=", ".join(better) or "none", worse=", ".join(worse) or "none")]


def _row(cell: AlgorithmCell) -> list[str]:
    found = cell.outcome
    bounds = "" if math.isinf(found.low) else f" [{found.low:.3f}, {found.high:.3f}]"
    numbers = [(cell.steps, 1), (cell.tokens, 1e3), (cell.seconds, 1)]
    return [
        cell.arm,
        f"{cell.lr:g}" + (" *" if cell.best else ""),
        str(found.count),
        f"{found.mean:.3f}{bounds}",
        f"{cell.collapsed} of {found.count}",
        f"{cell.reached} of {found.count}",
        *("" if value is None else f"{value / unit:.0f}" for value, unit in numbers),
    ]


def _picture(results: list[RunResult], findings: AlgorithmFindings) -> Figure:
    """Draw mean held-out accuracy by step and by seconds, each algorithm at its best learning rate."""
    figure = Figure(figsize=(11.0, 4.2))
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for cell in (cell for cell in findings.cells if cell.best):
        runs = list(of(results, cell.arm, lr=cell.lr).values())
        found = [dict(zip(*series(run.rows, "eval/accuracy"), strict=True)) for run in runs]
        steps = sorted(set.intersection(*(set(each) for each in found)))
        means = [np.mean([each[step] for each in found]) for step in steps]
        clocks = [_clock(run) for run in runs]
        at = [np.mean([clock[step] for clock in clocks]) for step in steps]
        for ax, x in ((by_step, steps), (by_time, at)):
            ax.plot(x, means, color=COLOURS[cell.arm], marker="o", label=f"{cell.arm}, {cell.lr:g}")
    for ax, label in ((by_step, "RL step"), (by_time, "seconds of training")):
        ax.axhline(plan.THRESHOLD, color="#7F7F7F", linestyle="--", linewidth=1.2)
        ax.set_xlabel(label)
    by_step.set_ylabel("held-out accuracy, mean over seeds")
    by_step.legend(fontsize=8)
    return figure


def _clock(run: RunResult) -> dict[int, float]:
    """Return seconds of training, without evaluations, by step."""
    total = np.cumsum([row.get("time/step") or 0.0 for row in run.rows])
    return {row["step"]: seconds for row, seconds in zip(run.rows, total.tolist(), strict=True)}
