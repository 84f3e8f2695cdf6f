"""One panel of a chart each: draws one question's answer from a run's rows on one Axes.

`PANELS` says what a panel needs; a panel is drawn when at least one of its metrics was logged and copes with the
others missing. Colours keep their meaning over all panels and are told apart in colour-blindness (Okabe and Ito's).
Left out: entropy and KL, which TensorBoard shows; files and layout, which plots.py owns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gspo_megatron.metrics.learning import ACCURACY, wilson_interval
from gspo_megatron.metrics.record import RunRecord, series

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#9467BD", "#56B4E9", "#7F7F7F",
)  # fmt: skip
TIME_PARTS = (
    ("time/rollout", "rollout", BLUE),
    ("time/reward", "reward", GREEN),
    ("time/old_logprobs", "old log-probs", ORANGE),
    ("time/update", "update", RED),
    ("time/other", "other", "#BBBBBB"),
)
FEW = 15  # up to this many points each gets a marker; a single one would be invisible as a line


@dataclass(frozen=True)
class Panel:
    """How to draw, whose rows, and the metrics of which at least one must be there."""

    draw: Callable[[Axes, RunRecord], None]
    phase: str
    keys: tuple[str, ...]
    height: float = 1.0  # relative to the other panels of its chart

    def onto(self, ax: Axes, record: RunRecord) -> None:
        """Draw, over all steps of the phase, so that panels can be compared step by step."""
        self.draw(ax, record)
        rows = record.rows(self.phase)
        first, last = rows[0]["step"], rows[-1]["step"]
        margin = max(0.5, 0.02 * (last - first))  # half a step is what a bar of step_time needs
        ax.set_xlim(first - margin, last + margin)

    def has_data(self, record: RunRecord) -> bool:
        return any(series(record.rows(self.phase), key)[0] for key in self.keys)


def smooth(values: list[float], window: int | None = None) -> np.ndarray:
    """Local line through the `window` values nearest to each (default: a tenth of them, at most 50).

    Inside the run this is the moving mean. At the ends, where one side is missing, a mean would flatten a steep start
    and a narrower window would end on noise.
    """
    data = np.asarray(values, dtype=np.float64)
    half = min((min(50, len(data) // 10) if window is None else window) // 2, (len(data) - 1) // 2)
    result = np.empty_like(data)
    for index in range(len(data)):
        first = min(max(index - half, 0), len(data) - 2 * half - 1)
        near = np.arange(first, first + 2 * half + 1)
        offset = near - near.mean()
        slope = offset @ data[near] / ((offset @ offset) or 1.0)  # a single value has no slope
        result[index] = data[near].mean() + slope * (index - near.mean())
    return result


def reward(ax: Axes, record: RunRecord) -> None:
    """Training reward, held-out accuracy with its 95% interval, and the accuracy that the warm start reached."""
    steps, values = series(record.rl, "reward/mean")
    if steps:
        _smoothed(ax, steps, values, BLUE, "training reward, smoothed")
    start = [row[ACCURACY] for row in record.rl if row["step"] == 0 and row.get(ACCURACY) is not None]
    if start:
        ax.axhline(start[0], color=GREY, linestyle="--", linewidth=1.2, label="accuracy after warm start")
    _accuracy_points(ax, record, "rl")
    _label(ax, "Reward and held-out accuracy", "RL step", "mean reward, accuracy (share)")
    _share_limits(ax)


def clip_fraction(ax: Axes, record: RunRecord) -> None:
    """What share of responses (in some token, where tokens have ratios) and of tokens lost gradient to the clip."""
    for key, label, colour in (
        ("clip/seq_low", "responses, ratio too low", BLUE),
        ("clip/seq_high", "responses, ratio too high", RED),
        ("clip/token", "tokens, both", GREY),
    ):
        steps, values = series(record.rl, key)
        if steps:
            style = ":" if key == "clip/token" else "-"
            _smoothed(ax, steps, [100 * value for value in values], colour, label, style)
    _label(ax, "Clipped by the ratio", "RL step", "clipped (%)")
    ax.set_ylim(bottom=0)


def ratio(ax: Axes, record: RunRecord) -> None:
    """Spread of the sequence ratio around 1 against the clip range, which is a thousand times narrower than GRPO's."""
    rows = record.rl
    low_steps, low = series(rows, "ratio/min")
    high_steps, high = series(rows, "ratio/max")
    if low_steps and low_steps == high_steps:
        _band(ax, low_steps, np.array(low) - 1, np.array(high) - 1, SKY, 0.3, "smallest to largest")
    steps, means = series([row for row in rows if row.get("ratio/std") is not None], "ratio/mean")
    _, spreads = series([row for row in rows if row.get("ratio/mean") is not None], "ratio/std")
    if steps:
        mean, spread = np.array(means) - 1, np.array(spreads)
        _band(ax, steps, mean - spread, mean + spread, BLUE, 0.35, "mean ± std. deviation")
        ax.plot(steps, mean, color=BLUE, label="mean", marker=_marker(steps))
    bounds = [("low", -1.0), ("high", 1.0)]
    edges = [sign * record.setting(f"algorithm.clip_ratio_{name}") for name, sign in bounds
             if record.setting(f"algorithm.clip_ratio_{name}") is not None]  # fmt: skip
    for number, edge in enumerate(edges):
        ax.axhline(edge, color=RED, linestyle="--", linewidth=1.2, label=None if number else "clip range")
    # The clip range is 1e-4 wide and outliers reach 1e-1: linear around 1, logarithmic beyond.
    linear = min(map(abs, edges), default=1e-4)
    ax.set_yscale("symlog", linthresh=linear, linscale=0.7)
    _decade_ticks(ax, linear)
    _label(ax, "Sequence ratio", "RL step", "ratio − 1 (log scale away from 0)")


def response_length(ax: Axes, record: RunRecord) -> None:
    """Mean and longest response of each step, and the mean on held-out prompts."""
    for key, label, colour, width in (
        ("response/length_max", "longest", SKY, 1.0),
        ("response/length", "mean", BLUE, 1.8),
    ):
        steps, values = series(record.rl, key)
        if steps:
            ax.plot(steps, values, color=colour, linewidth=width, label=label, marker=_marker(steps))
    steps, values = series(record.rl, "eval/response_length")
    if steps:
        ax.plot(steps, values, color=ORANGE, linestyle="", marker="o", markersize=5, label="held-out mean", zorder=4)
    _label(ax, "Response length", "RL step", "tokens")
    ax.set_ylim(bottom=0)


def truncated(ax: Axes, record: RunRecord) -> None:
    """Responses cut at the length limit."""
    steps, values = series(record.rl, "response/truncated")
    ax.plot(steps, [100 * value for value in values], color=RED, marker=_marker(steps))
    _label(ax, "Cut at the length limit", "RL step", "responses (%)")
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))


def step_time(ax: Axes, record: RunRecord) -> None:
    """Where the seconds of a step go, stacked."""
    parts = [(series(record.rl, key), label, colour) for key, label, colour in TIME_PARTS]
    logged = sorted({step for (steps, _), _, _ in parts for step in steps})
    edges = np.arange(logged[0], logged[-1] + 2) - 0.5
    base = np.zeros(len(edges) - 1)
    for (steps, values), label, colour in parts:
        if steps:
            top = base.copy()
            top[np.array(steps) - logged[0]] += values
            ax.stairs(top, edges, baseline=base, fill=True, color=colour, linewidth=0, label=label)
            base = top
    _label(ax, "Time of a step", "RL step", "seconds")
    ax.set_ylim(bottom=0)


def load_imbalance(ax: Axes, record: RunRecord) -> None:
    """Tokens of the busiest expert over the mean of a layer's experts."""
    for key, label, colour in (
        ("route/load_imbalance_max", "worst layer", ORANGE),
        ("route/load_imbalance", "mean over layers", BLUE),
    ):
        steps, values = series(record.rl, key)
        if steps:
            ax.plot(steps, values, color=colour, label=label, marker=_marker(steps))
    ax.axhline(1.0, color=GREY, linestyle="--", linewidth=1.2, label="even load")
    _label(ax, "Load of the busiest expert", "RL step", "times the mean load")
    ax.set_ylim(bottom=0.9)


def dead_experts(ax: Axes, record: RunRecord) -> None:
    """Experts that no token of the step was sent to."""
    steps, values = series(record.rl, "route/dead_experts")
    ax.plot(steps, values, color=RED, marker=_marker(steps))
    _label(ax, "Experts without a token", "RL step", "experts")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))


def warm_start_loss(ax: Axes, record: RunRecord) -> None:
    """Supervised loss on the gold answers."""
    steps, values = series(record.warm_start, "loss")
    _smoothed(ax, steps, values, BLUE, "loss, smoothed")
    _label(ax, "Warm start: loss", "warm-start step", "nats a token")
    ax.set_ylim(bottom=0)


def warm_start_accuracy(ax: Axes, record: RunRecord) -> None:
    """Held-out accuracy on the way; it should have levelled off before RL begins."""
    _accuracy_points(ax, record, "warm_start")
    _label(ax, "Warm start: held-out accuracy", "warm-start step", "accuracy (share)")
    _share_limits(ax)


def dpo_margin(ax: Axes, record: RunRecord) -> None:
    """How much more than the reference the policy prefers the chosen answers."""
    _trained_and_held_out(ax, record, "margin")
    ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1.2, label="reference")
    _label(ax, "DPO: margin", "DPO step", "β h, mean over pairs (nats)")


def dpo_accuracy(ax: Axes, record: RunRecord) -> None:
    """Share of pairs whose margin is above 0; half of them by chance."""
    _trained_and_held_out(ax, record, "accuracy")
    ax.axhline(0.5, color=GREY, linestyle="--", linewidth=1.2, label="chance")
    _label(ax, "DPO: pairs told apart", "DPO step", "share of pairs")
    ax.set_ylim(0, 1.02)


def dpo_log_ratios(ax: Axes, record: RunRecord) -> None:
    """Both answers' log-ratio to the reference. The margin may also grow while both fall."""
    for name, colour in (("chosen", GREEN), ("rejected", RED)):  # always logged together
        _smoothed(ax, *series(record.dpo, f"dpo/{name}"), colour, name)
    _label(ax, "DPO: log-ratio to the reference", "DPO step", "nats an answer")


PANELS: dict[str, Panel] = {
    "reward": Panel(reward, "rl", ("reward/mean", ACCURACY)),
    "clip_fraction": Panel(clip_fraction, "rl", ("clip/seq_low", "clip/seq_high", "clip/token")),
    "ratio": Panel(ratio, "rl", ("ratio/mean", "ratio/min")),
    "response_length": Panel(response_length, "rl", ("response/length", "response/length_max")),
    "truncated": Panel(truncated, "rl", ("response/truncated",), height=0.45),
    "step_time": Panel(step_time, "rl", tuple(key for key, _, _ in TIME_PARTS)),
    "load_imbalance": Panel(load_imbalance, "rl", ("route/load_imbalance", "route/load_imbalance_max")),
    "dead_experts": Panel(dead_experts, "rl", ("route/dead_experts",), height=0.45),
    "dpo_margin": Panel(dpo_margin, "dpo", ("dpo/margin", "dpo/eval_margin")),
    "dpo_accuracy": Panel(dpo_accuracy, "dpo", ("dpo/accuracy", "dpo/eval_accuracy")),
    "dpo_log_ratios": Panel(dpo_log_ratios, "dpo", ("dpo/chosen", "dpo/rejected")),
    "warm_start_loss": Panel(warm_start_loss, "warm_start", ("loss",)),
    "warm_start_accuracy": Panel(warm_start_accuracy, "warm_start", (ACCURACY,)),
}


def _trained_and_held_out(ax: Axes, record: RunRecord, name: str) -> None:
    trained, held_out = (series(record.dpo, f"dpo/{kind}{name}") for kind in ("", "eval_"))
    if trained[0]:
        _smoothed(ax, *trained, BLUE, "training pairs, smoothed")
    if held_out[0]:
        ax.plot(*held_out, color=ORANGE, marker="o", linewidth=1.2, label="held-out pairs", zorder=4)


def _accuracy_points(ax: Axes, record: RunRecord, phase: str) -> None:
    rows = [row for row in record.rows(phase) if row.get(ACCURACY) is not None]
    steps, values = series(rows, ACCURACY)
    counted = [row for row in rows if row.get("eval/num")]
    for row in counted:
        low, high = wilson_interval(row[ACCURACY], row["eval/num"])
        ax.plot([row["step"]] * 2, [low, high], color=ORANGE, linewidth=1.5, solid_capstyle="butt", zorder=3)
    if steps:
        label = "held-out accuracy" + (" (95%)" if counted else "")
        size = 5 if len(steps) < 25 else 3
        ax.plot(steps, values, color=ORANGE, marker="o", markersize=size, linewidth=1.2, label=label, zorder=4)


def _smoothed(ax: Axes, steps: list[int], values: list[float], colour: str, label: str, style: str = "-") -> None:
    """Each step lightly, and the smoothed curve over it."""
    ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    ax.plot(steps, smooth(values), color=colour, linestyle=style, marker=_marker(steps), label=label)


def _band(ax: Axes, steps: list[int], low: np.ndarray, high: np.ndarray, colour: str, alpha: float, label: str) -> None:
    if len(steps) == 1:  # a band over one step has no width
        ax.vlines(steps, low, high, color=colour, alpha=alpha, linewidth=8, label=label)
    else:
        ax.fill_between(steps, low, high, color=colour, alpha=alpha, linewidth=0, label=label)


def _marker(steps: list[int]) -> str:
    return "o" if len(steps) <= FEW else ""


def _share_limits(ax: Axes) -> None:
    """From 0, and to little more than 1 at most, where all that is drawn lies between 0 and 1."""
    low, high = ax.dataLim.intervaly
    if low >= 0 and high <= 1:
        ax.set_ylim(0, min(1.02, ax.get_ylim()[1]))


def _decade_ticks(ax: Axes, linear: float) -> None:
    """Ticks at 0 and at powers of ten on both sides, for example +0.001."""
    largest = max(map(abs, ax.get_ylim()))
    first = int(np.ceil(np.log10(linear)))
    decades = [10.0**power for power in range(first, max(first, int(np.floor(np.log10(max(largest, linear))))) + 1)]
    ax.set_yticks([-decade for decade in reversed(decades)] + [0.0] + decades)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    ax.yaxis.set_minor_locator(MaxNLocator(1))


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
