"""The pictures of a routing-replay report are drawn from the runs' rows. Colours mean arms, in all of them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gspo_megatron.metrics.axes import BLUE, GREY, ORANGE, RED, SKY
from gspo_megatron.metrics.plots import LOOK
from gspo_megatron.metrics.record import series
from gspo_megatron.study import plan
from gspo_megatron.study.findings import Comparison, Findings
from gspo_megatron.study.inference import interval
from gspo_megatron.study.results import RunResult, of

STYLE = {"gspo": (BLUE, "-"), "gspo_R2": (SKY, "--"), "grpo": (RED, "-"), "grpo_R2": (ORANGE, "--")}
LABEL = {"gspo": "GSPO, routing free", "gspo_R2": "GSPO, R2", "grpo": "GRPO, routing free", "grpo_R2": "GRPO, R2"}

WIDEST = 0.6  # difference of accuracy in a picture; intervals beyond it go off the edge


def draw(results: list[RunResult], findings: Findings) -> dict[str, Figure]:
    """Draw all pictures, by file name. Arms or learning rates without data are left out."""
    rates = sorted({r.spec.lr for r in results if r.spec.setting == "main" and r.spec.arm in plan.MAIN_ARMS})
    with matplotlib.rc_context(LOOK):
        return {
            "edge": _edge(results, rates),
            "accuracy_by_step": _grid(results, rates, "eval/accuracy", "held-out accuracy", by_time=False),
            "accuracy_by_time": _grid(results, rates, "eval/accuracy", "held-out accuracy", by_time=True),
            "reward_by_step": _grid(results, rates, "reward/mean", "mean reward", by_time=False),
            "gspo_without_replay": _forest(findings.equivalence, "GSPO: routing free minus R2"),
            "grpo_with_replay": _forest(findings.assay, "GRPO: R2 minus routing free"),
            "routing_change": _routing(results, rates),
            "ratio_spread": _spread(results, rates),
            "clipping": _clipping(results, rates),
        }


def _edge(results: list[RunResult], rates: list[float]) -> Figure:
    """Outcome by learning rate: a dot a seed, the mean with its interval; crosses for seeds that collapsed."""
    figure = Figure(figsize=(7.6, 4.2))
    ax = figure.subplots()
    for number, arm in enumerate(plan.MAIN_ARMS):
        colour, style = STYLE[arm]
        shift = 1.0 + 0.035 * (number - 1.5)
        means = []
        for lr in rates:
            runs = list(of(results, arm, "main", lr).values())
            for marker, chosen in (
                ("o", [r for r in runs if not r.collapsed]),
                ("x", [r for r in runs if r.collapsed]),
            ):
                ax.plot(
                    [lr * shift] * len(chosen),
                    [r.outcome for r in chosen],
                    marker,
                    color=colour,
                    alpha=0.45,
                    markersize=5,
                    linestyle="",
                )
            if runs:
                found = interval([r.outcome for r in runs], plan.CONFIDENCE).cut(0, 1)
                means.append((lr * shift, found.mean))
                if found.count > 1:
                    ax.plot([lr * shift] * 2, [found.low, found.high], color=colour, linewidth=1.4)
        if means:
            ax.plot(*zip(*means, strict=True), color=colour, linestyle=style, marker="D", label=LABEL[arm])
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
    ax.minorticks_off()
    _finish(ax, "Held-out accuracy at the end, by learning rate", "learning rate (crosses: collapsed)", "accuracy")
    return figure


def _grid(results: list[RunResult], rates: list[float], key: str, label: str, by_time: bool) -> Figure:
    figure = Figure(figsize=(3.4 * len(rates), 3.6))
    axes = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for ax, lr in zip(axes, rates, strict=True):
        for arm in plan.MAIN_ARMS:
            runs = list(of(results, arm, "main", lr).values())
            if runs:
                _band(ax, runs, key, by_time, *STYLE[arm], LABEL[arm])
        _finish(ax, f"learning rate {lr:g}", "seconds of training" if by_time else "RL step", label, legend=False)
    axes[0].legend(loc="lower left", fontsize=8)
    return figure


def _band(ax: Axes, runs: list[RunResult], key: str, by_time: bool, colour: str, style: str, label: str) -> None:
    """Mean over seeds and its 95% interval, at the steps that all runs have; against the median of their clocks."""
    found = [dict(zip(*series(run.rows, key), strict=True)) for run in runs]
    steps = sorted(set.intersection(*(set(each) for each in found)))
    values = np.array([[each[step] for step in steps] for each in found])
    if not steps:
        return
    x = np.array(steps, dtype=float)
    if by_time:
        seconds = [{row["step"]: total for row, total in zip(run.rows, _seconds(run), strict=True)} for run in runs]
        x = np.median([[each[step] for step in steps] for each in seconds], axis=0)
    bounds = [interval(column, plan.CONFIDENCE) for column in values.T.tolist()]
    if key == "eval/accuracy":
        bounds = [each.cut(0, 1) for each in bounds]
    ax.plot(x, [each.mean for each in bounds], color=colour, linestyle=style, label=label)
    if len(runs) > 1:
        ax.fill_between(
            x, [each.low for each in bounds], [each.high for each in bounds], color=colour, alpha=0.13, linewidth=0
        )


def _seconds(run: RunResult) -> np.ndarray:
    """Return the seconds of training at the end of each row's step, without evaluations."""
    return np.cumsum([row.get("time/step") or 0.0 for row in run.rows])


def _routing(results: list[RunResult], rates: list[float]) -> Figure:
    """Changed experts after one update by step at one learning rate, and by depth over the whole run."""
    lr = plan.OTHER_LEARNING_RATE if plan.OTHER_LEARNING_RATE in rates else rates[0]
    figure = Figure(figsize=(11.0, 3.8))
    left, right = figure.subplots(1, 2)
    for arm in plan.MAIN_ARMS:
        runs = list(of(results, arm, "main", lr).values())
        if not runs:
            continue
        colour, style = STYLE[arm]
        key = "route/changed_experts_one_update"
        found = [dict(zip(*series(run.rows, key), strict=True)) for run in runs]
        steps = sorted(set.intersection(*(set(each) for each in found)))
        left.plot(
            steps,
            [100 * np.mean([each[s] for each in found]) for s in steps],
            color=colour,
            linestyle=style,
            label=LABEL[arm],
        )
        depth = [
            row["route/by_layer/changed_experts"]
            for run in runs
            for row in run.rows
            if row.get("route/by_layer/changed_experts")
        ]
        if depth:
            share = 100 * np.nanmean(np.array(depth, dtype=float), axis=0)
            right.set_xticks(range(1, len(share) + 1))
            right.plot(range(1, len(share) + 1), share, color=colour, linestyle=style, marker="o", label=LABEL[arm])
    _finish(left, f"Changed by one update (learning rate {lr:g})", "RL step", "of activated experts (%)")
    _finish(right, "By depth, all updates after a batch's first", "layer", "of activated experts (%)")
    return figure


def _spread(results: list[RunResult], rates: list[float]) -> Figure:
    """Standard deviation of log s over sequences, by what it comes from."""
    figure = Figure(figsize=(11.0, 3.8))
    width = 0.8 / len(plan.MAIN_ARMS)
    for ax, part, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("weights", "routes"),
        ("from changed weights", "from changed routes"),
        strict=True,
    ):
        for number, arm in enumerate(plan.MAIN_ARMS):
            bars = {}
            for place, lr in enumerate(rates):
                runs = of(results, arm, "main", lr).values()
                found = [m for run in runs if (m := run.mean(f"ratio_parts/sequence_{part}")) is not None]
                if found:
                    bars[place + (number - 1.5) * width] = np.mean(found) ** 0.5
            if bars:
                ax.bar(bars.keys(), bars.values(), width * 0.92, color=STYLE[arm][0], label=LABEL[arm])
        ax.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        _finish(
            ax, f"Spread of log s {title}", "learning rate", "std. deviation over sequences", legend=bool(ax.containers)
        )
    return figure


def _forest(comparisons: Sequence[Comparison], title: str) -> Figure:
    """A row a comparison: its mean, its 90% interval (thick), its 95% one (thin), and the margin as a band. Rows in
    which everything collapsed are pale: they show nothing."""
    figure = Figure(figsize=(8.6, 1.5 + 0.34 * len(comparisons)))
    ax = figure.subplots()
    ax.axvspan(-plan.EQUIVALENCE_MARGIN, plan.EQUIVALENCE_MARGIN, color=GREY, alpha=0.18, linewidth=0)
    ax.axvline(0, color=GREY, linewidth=1)
    for row, each in enumerate(comparisons):
        look: dict[str, Any] = {
            "color": BLUE,
            "alpha": 0.25 if each.reading == "floor" else 1.0,
            "solid_capstyle": "butt",
        }
        ax.plot([each.difference.low, each.difference.high], [row, row], linewidth=1.2, **look)
        ax.plot([each.equivalence.low, each.equivalence.high], [row, row], linewidth=4.5, **look)
        ax.plot([each.equivalence.mean], [row], marker="D", markersize=6, markeredgecolor="white", **look)
    names = [f"{c.setting}, {c.lr:g}, {c.equivalence.count} seeds" + (" *" if c.decides else "") for c in comparisons]
    ax.set_yticks(range(len(names)), names)
    label = "difference of accuracy (thick: 90%, thin: 95%; grey: the margin; pale: all collapsed)"
    _finish(ax, title, label, "", legend=False)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlim(-WIDEST, WIDEST)
    return figure


def _clipping(results: list[RunResult], rates: list[float]) -> Figure:
    figure = Figure(figsize=(11.0, 3.6))
    for ax, keys, title in zip(
        figure.subplots(1, 2),
        (("clip/seq_low", "clip/seq_high"), ("clip/token",)),
        ("Responses", "Tokens"),
        strict=True,
    ):
        _by_rate(ax, results, rates, partial(_clipped, keys))
        _finish(ax, f"{title} that lost gradient to the clip", "learning rate", "clipped (%)")
    return figure


def _clipped(keys: Sequence[str], run: RunResult) -> float:
    return sum(100 * (run.mean(key) or 0.0) for key in keys)


def _by_rate(ax: Axes, results: list[RunResult], rates: Sequence[float], value: Callable[[RunResult], float]) -> None:
    for arm in plan.MAIN_ARMS:
        points = [
            (lr, np.mean([value(run) for run in of(results, arm, "main", lr).values()]))
            for lr in rates
            if of(results, arm, "main", lr)
        ]
        if points:
            colour, style = STYLE[arm]
            ax.plot(*zip(*points, strict=True), color=colour, linestyle=style, marker="o", label=LABEL[arm])
    ax.set_xscale("log")
    ax.set_xticks(rates, [f"{lr:g}" for lr in rates])
    ax.minorticks_off()


def _finish(ax: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    ax.set_title(title)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.grid(color=GREY, alpha=0.15)
    if ax.get_ylim()[0] > 0 and ax.get_yscale() == "linear":
        ax.set_ylim(bottom=0)
    if legend:
        ax.legend(fontsize=8)
