"""Panels share this: colours that keep their meaning, smoothing, bands, ticks and labels.

Colours are told apart in colour-blindness (Okabe and Ito's).
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gspo_megatron.metrics.recipe_event import Event

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#9467BD",
    "#56B4E9",
    "#7F7F7F",
)
NAMED = 3  # changes at one place; what is beside a mark must not cover the curves
FEW = 15  # up to this many points each gets a marker; a single one would be invisible as a line


def smooth(values: list[float], window: int | None = None) -> np.ndarray:
    """Fit a local line through the `window` values nearest to each (default: a tenth of them, at most 50).

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


def smoothed(ax: Axes, steps: list[int], values: list[float], colour: str, label: str, style: str = "-") -> None:
    """Draw each step lightly, and the smoothed curve over it."""
    ax.plot(steps, values, color=colour, alpha=0.3, linewidth=1)
    ax.plot(steps, smooth(values), color=colour, linestyle=style, marker=marker(steps), label=label)


def band(ax: Axes, steps: list[int], low: np.ndarray, high: np.ndarray, colour: str, alpha: float, label: str) -> None:
    if len(steps) == 1:  # a band over one step has no width
        ax.vlines(steps, low, high, color=colour, alpha=alpha, linewidth=8, label=label)
    else:
        ax.fill_between(steps, low, high, color=colour, alpha=alpha, linewidth=0, label=label)


def changed(ax: Axes, place: float, event: Event) -> None:
    """Mark the place behind which a run went on with other values, and name them."""
    ax.axvline(place, color="#333333", linestyle=":", linewidth=1.2)
    names = [f"{name.split('.', 1)[-1]} {change}" for name, change in event.told().items()]
    more = [f"and {len(names) - NAMED} more"] if len(names) > NAMED else []
    text = ax.text(
        place,
        0.98,
        "\n".join([*names[:NAMED], *more]),
        transform=ax.get_xaxis_transform(),
        rotation=90,
        ha="right",
        va="top",
        fontsize=7,
        color="#333333",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
        parse_math=False,
        clip_on=True,
    )
    text.set_in_layout(False)


def marker(steps: list[int]) -> str:
    return "o" if len(steps) <= FEW else ""


def share_limits(ax: Axes) -> None:
    """Let the axis run from 0 to little more than 1 at most, where all that is drawn lies between 0 and 1."""
    low, high = ax.dataLim.intervaly
    if low >= 0 and high <= 1:
        ax.set_ylim(0, min(1.02, ax.get_ylim()[1]))


def decade_ticks(ax: Axes, linear: float) -> None:
    """Put ticks at 0 and at powers of ten on both sides, for example +0.001."""
    largest = max(map(abs, ax.get_ylim()))
    first = int(np.ceil(np.log10(linear)))
    decades = [10.0**power for power in range(first, max(first, int(np.floor(np.log10(max(largest, linear))))) + 1)]
    ax.set_yticks([-decade for decade in reversed(decades)] + [0.0] + decades)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    ax.yaxis.set_minor_locator(MaxNLocator(1))


def titled(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
