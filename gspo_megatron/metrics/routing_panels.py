"""These panels are about routing: how it changes, and how experts are loaded."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from gspo_megatron.metrics.axes import BLUE, GREY, ORANGE, RED, marker, smoothed, titled
from gspo_megatron.metrics.record import RunRecord, series


def load_imbalance(ax: Axes, record: RunRecord) -> None:
    """Draw the tokens of the busiest expert over the mean of a layer's experts."""
    for key, label, colour in (
        ("route/load_imbalance_max", "worst layer", ORANGE),
        ("route/load_imbalance", "mean over layers", BLUE),
    ):
        steps, values = series(record.rl, key)
        if steps:
            ax.plot(steps, values, color=colour, label=label, marker=marker(steps))
    ax.axhline(1.0, color=GREY, linestyle="--", linewidth=1.2, label="even load")
    titled(ax, "Load of the busiest expert", "RL step", "times the mean load")
    ax.set_ylim(bottom=0.9)


def dead_experts(ax: Axes, record: RunRecord) -> None:
    """Draw the number of experts that no token of the step was sent to."""
    steps, values = series(record.rl, "route/dead_experts")
    ax.plot(steps, values, color=RED, marker=marker(steps))
    titled(ax, "Experts without a token", "RL step", "experts")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=4))
    ax.set_ylim(0, max(1.0, ax.get_ylim()[1]))


def routing_change(ax: Axes, record: RunRecord) -> None:
    """Draw the activated experts that the policy in training no longer chooses as the sampling policy did."""
    for key, label, colour in (
        ("route/changed_experts", "all updates of a batch but the first", BLUE),
        ("route/changed_experts_one_update", "one update", ORANGE),
    ):
        steps, values = series(record.rl, key)
        if steps:
            smoothed(ax, steps, [100 * value for value in values], colour, label)
    titled(ax, "Routes that change within a batch", "RL step", "of activated experts (%)")
    ax.set_ylim(bottom=0)


def routing_map(ax: Axes, record: RunRecord) -> None:
    """Draw the same by layer and step; a dense layer's row is blank."""
    key = "route/by_layer/changed_experts"
    rows = [row for row in record.rl if row.get(key)]
    rows = [row for row in rows if len(row[key]) == len(rows[-1][key])]  # a damaged one may have other layers
    values = np.array([[np.nan if value is None else 100 * value for value in row[key]] for row in rows]).T
    steps = np.array([row["step"] for row in rows])
    edges = np.append(steps - 0.5, steps[-1] + 0.5)
    mesh = ax.pcolormesh(edges, np.arange(len(values) + 1) + 0.5, values, cmap="viridis", vmin=0, rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label="of activated experts (%)", pad=0.01)
    ax.grid(False)
    titled(ax, "Routes that change, by layer", "RL step", "layer")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
