"""Each function here draws one panel of a chart: one question's answer from a run's rows on one Axes.

`PANELS` says what a panel needs; a panel is drawn when at least one of its metrics was logged and copes with the
others missing. What they share is in axes.py; those about routing are in routing_panels.py.
Left out: entropy and KL, which TensorBoard shows; files and layout, which plots.py owns.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes

from gspo_megatron.metrics import routing_panels
from gspo_megatron.metrics.axes import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    band,
    changed,
    decade_ticks,
    marker,
    share_limits,
    smoothed,
    titled,
)
from gspo_megatron.metrics.learning import ACCURACY, wilson_interval
from gspo_megatron.metrics.record import RunRecord, series

TIME_PARTS = (
    ("time/rollout", "rollout", BLUE),
    ("time/reward", "reward", GREEN),
    ("time/old_logprobs", "old log-probs", ORANGE),
    ("time/update", "update", RED),
    ("time/other", "other", "#BBBBBB"),
)


@dataclass(frozen=True)
class Panel:
    """Says how to draw, whose rows, and the metrics of which at least one must be there."""

    draw: Callable[[Axes, RunRecord], None]
    phase: str
    keys: tuple[str, ...]
    height: float = 1.0  # relative to the other panels of its chart

    def onto(self, ax: Axes, record: RunRecord) -> None:
        """Draw, over all steps of the phase, so that panels can be compared step by step, with a mark where the run
        went on with other values."""
        self.draw(ax, record)
        for event in record.events:
            if event.phase == self.phase:
                changed(ax, event.step + 0.5, event)
        rows = record.rows(self.phase)
        first, last = rows[0]["step"], rows[-1]["step"]
        margin = max(0.5, 0.02 * (last - first))  # half a step is what a bar of step_time needs
        ax.set_xlim(first - margin, last + margin)

    def has_data(self, record: RunRecord) -> bool:
        return any(row.get(key) is not None for row in record.rows(self.phase) for key in self.keys)


def reward(ax: Axes, record: RunRecord) -> None:
    """Draw training reward, held-out accuracy with its 95% interval, and the accuracy that the warm start reached."""
    steps, values = series(record.rl, "reward/mean")
    if steps:
        smoothed(ax, steps, values, BLUE, "training reward, smoothed")
    start = [row[ACCURACY] for row in record.rl if row["step"] == 0 and row.get(ACCURACY) is not None]
    if start:
        ax.axhline(start[0], color=GREY, linestyle="--", linewidth=1.2, label="accuracy after warm start")
    _accuracy_points(ax, record, "rl")
    titled(ax, "Reward and held-out accuracy", "RL step", "mean reward, accuracy (share)")
    share_limits(ax)


def clip_fraction(ax: Axes, record: RunRecord) -> None:
    """Draw what share of responses (in some token, where tokens have ratios) and of tokens lost gradient to the
    clip."""
    for key, label, colour in (
        ("clip/seq_low", "responses, ratio too low", BLUE),
        ("clip/seq_high", "responses, ratio too high", RED),
        ("clip/token", "tokens, both", GREY),
    ):
        steps, values = series(record.rl, key)
        if steps:
            style = ":" if key == "clip/token" else "-"
            smoothed(ax, steps, [100 * value for value in values], colour, label, style)
    titled(ax, "Clipped by the ratio", "RL step", "clipped (%)")
    ax.set_ylim(bottom=0)


def ratio(ax: Axes, record: RunRecord) -> None:
    """Draw the sequence ratio's spread around 1 against the clip range, which is a thousand times narrower than
    GRPO's."""
    rows = record.rl
    low_steps, low = series(rows, "ratio/min")
    high_steps, high = series(rows, "ratio/max")
    if low_steps and low_steps == high_steps:
        band(ax, low_steps, np.array(low) - 1, np.array(high) - 1, SKY, 0.3, "smallest to largest")
    steps, means = series([row for row in rows if row.get("ratio/std") is not None], "ratio/mean")
    _, spreads = series([row for row in rows if row.get("ratio/mean") is not None], "ratio/std")
    if steps:
        mean, spread = np.array(means) - 1, np.array(spreads)
        band(ax, steps, mean - spread, mean + spread, BLUE, 0.35, "mean ± std. deviation")
        ax.plot(steps, mean, color=BLUE, label="mean", marker=marker(steps))
    edges = _clip_range(ax, record)
    # The clip range is 1e-4 wide and outliers reach 1e-1: linear around 1, logarithmic beyond.
    linear = min(map(abs, edges), default=1e-4)
    ax.set_yscale("symlog", linthresh=linear, linscale=0.7)
    decade_ticks(ax, linear)
    titled(ax, "Sequence ratio", "RL step", "ratio − 1 (log scale away from 0)")


def response_length(ax: Axes, record: RunRecord) -> None:
    """Draw mean and longest response of each step, and the mean on held-out prompts."""
    for key, label, colour, width in (
        ("response/length_max", "longest", SKY, 1.0),
        ("response/length", "mean", BLUE, 1.8),
    ):
        steps, values = series(record.rl, key)
        if steps:
            ax.plot(steps, values, color=colour, linewidth=width, label=label, marker=marker(steps))
    steps, values = series(record.rl, "eval/response_length")
    if steps:
        ax.plot(steps, values, color=ORANGE, linestyle="", marker="o", markersize=5, label="held-out mean", zorder=4)
    titled(ax, "Response length", "RL step", "tokens")
    ax.set_ylim(bottom=0)


def truncated(ax: Axes, record: RunRecord) -> None:
    """Draw the share of responses cut at the length limit."""
    steps, values = series(record.rl, "response/truncated")
    ax.plot(steps, [100 * value for value in values], color=RED, marker=marker(steps))
    titled(ax, "Cut at the length limit", "RL step", "responses (%)")
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))


def step_time(ax: Axes, record: RunRecord) -> None:
    """Draw where the seconds of a step go, stacked."""
    parts = [(series(record.rl, key), label, colour) for key, label, colour in TIME_PARTS]
    logged = sorted({step for (steps, _), _, _ in parts for step in steps})
    edges = np.unique([step + side for step in logged for side in (-0.5, 0.5)])  # what is between two is a gap
    base = np.zeros(len(edges) - 1)
    for (steps, values), label, colour in parts:
        if steps:
            top = base.copy()
            top[np.searchsorted(edges, np.array(steps) - 0.5)] += values
            ax.stairs(top, edges, baseline=base, fill=True, color=colour, linewidth=0, label=label)
            base = top
    titled(ax, "Time of a step", "RL step", "seconds")
    ax.set_ylim(bottom=0)


def warm_start_loss(ax: Axes, record: RunRecord) -> None:
    """Draw the supervised loss on the gold answers."""
    steps, values = series(record.warm_start, "loss")
    smoothed(ax, steps, values, BLUE, "loss, smoothed")
    titled(ax, "Warm start: loss", "warm-start step", "nats a token")
    ax.set_ylim(bottom=0)


def warm_start_accuracy(ax: Axes, record: RunRecord) -> None:
    """Draw held-out accuracy on the way; it should have levelled off before RL begins."""
    _accuracy_points(ax, record, "warm_start")
    titled(ax, "Warm start: held-out accuracy", "warm-start step", "accuracy (share)")
    share_limits(ax)


def dpo_margin(ax: Axes, record: RunRecord) -> None:
    """Draw how much more than the reference the policy prefers the chosen answers."""
    _trained_and_held_out(ax, record, "margin")
    ax.axhline(0.0, color=GREY, linestyle="--", linewidth=1.2, label="reference")
    titled(ax, "DPO: margin", "DPO step", "β h, mean over pairs (nats)")


def dpo_accuracy(ax: Axes, record: RunRecord) -> None:
    """Draw the share of pairs whose margin is above 0; half of them by chance."""
    _trained_and_held_out(ax, record, "accuracy")
    ax.axhline(0.5, color=GREY, linestyle="--", linewidth=1.2, label="chance")
    titled(ax, "DPO: pairs told apart", "DPO step", "share of pairs")
    ax.set_ylim(0, 1.02)


def dpo_log_ratios(ax: Axes, record: RunRecord) -> None:
    """Draw both answers' log-ratio to the reference. The margin may also grow while both fall."""
    for name, colour in (("chosen", GREEN), ("rejected", RED)):  # always logged together
        smoothed(ax, *series(record.dpo, f"dpo/{name}"), colour, name)
    each = "a token" if record.setting("algorithm.preference.length_normalised", False) else "an answer"
    titled(ax, "DPO: log-ratio to the reference", "DPO step", f"nats {each}")


PANELS: dict[str, Panel] = {
    "reward": Panel(reward, "rl", ("reward/mean", ACCURACY)),
    "clip_fraction": Panel(clip_fraction, "rl", ("clip/seq_low", "clip/seq_high", "clip/token")),
    "ratio": Panel(ratio, "rl", ("ratio/mean", "ratio/min")),
    "response_length": Panel(response_length, "rl", ("response/length", "response/length_max")),
    "truncated": Panel(truncated, "rl", ("response/truncated",), height=0.45),
    "step_time": Panel(step_time, "rl", tuple(key for key, _, _ in TIME_PARTS)),
    "load_imbalance": Panel(routing_panels.load_imbalance, "rl", ("route/load_imbalance", "route/load_imbalance_max")),
    "routing_change": Panel(
        routing_panels.routing_change, "rl", ("route/changed_experts", "route/changed_experts_one_update")
    ),
    "routing_map": Panel(routing_panels.routing_map, "rl", ("route/by_layer/changed_experts",), height=0.8),
    "dead_experts": Panel(routing_panels.dead_experts, "rl", ("route/dead_experts",), height=0.45),
    "dpo_margin": Panel(dpo_margin, "dpo", ("dpo/margin", "dpo/eval_margin")),
    "dpo_accuracy": Panel(dpo_accuracy, "dpo", ("dpo/accuracy", "dpo/eval_accuracy")),
    "dpo_log_ratios": Panel(dpo_log_ratios, "dpo", ("dpo/chosen", "dpo/rejected")),
    "warm_start_loss": Panel(warm_start_loss, "warm_start", ("loss",)),
    "warm_start_accuracy": Panel(warm_start_accuracy, "warm_start", (ACCURACY,)),
}


def _trained_and_held_out(ax: Axes, record: RunRecord, name: str) -> None:
    trained, held_out = (series(record.dpo, f"dpo/{kind}{name}") for kind in ("", "eval_"))
    if trained[0]:
        smoothed(ax, *trained, BLUE, "training pairs, smoothed")
    if held_out[0]:
        ax.plot(*held_out, color=ORANGE, marker="o", linewidth=1.2, label="held-out pairs", zorder=4)


def _clip_range(ax: Axes, record: RunRecord) -> list[float]:
    """Draw both bounds of the ratio, each as far as it held, and return them."""
    edges: list[float] = []
    last = record.rl[-1]["step"] + 1.0
    for name, sign in (("algorithm.clip_ratio_low", -1.0), ("algorithm.clip_ratio_high", 1.0)):
        pieces = record.numbers(name, "rl")
        ends = [start for start, _ in pieces[1:]] + [last]
        for (start, bound), end in zip(pieces, ends, strict=True):
            if bound:
                label = "_" if edges else "clip range"  # those of "_" are in no legend
                steps, edge = [max(start, -1.0), end], [sign * bound] * 2
                ax.plot(steps, edge, color=RED, linestyle="--", linewidth=1.2, label=label)
                edges.append(sign * bound)
    return edges


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
