"""A run's charts are made here: which panels make a file, the look they share, and the overview for a README.

Drawn from metrics.jsonl and config.yaml alone, so a run can be redrawn at any time, also while it is training.
What a panel shows is in panels.py. Left out: comparisons of several runs.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot: no window, no global state, and savefig uses Agg

from gspo_megatron.metrics.panels import PANELS
from gspo_megatron.metrics.record import RunRecord, load_record
from gspo_megatron.utils.small_files import replace

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType  # of matplotlib 3.11 on

# File name -> panels from top to bottom; those without data are left out.
CHARTS: dict[str, tuple[str, ...]] = {
    "reward": ("reward",),
    "clip_fraction": ("clip_fraction",),
    "ratio": ("ratio",),
    "response_length": ("response_length", "truncated"),
    "step_time": ("step_time",),
    "preference": ("dpo_margin", "dpo_accuracy", "dpo_log_ratios"),
    "warm_start": ("warm_start_loss", "warm_start_accuracy"),
    "routing": ("routing_change", "routing_map", "load_imbalance", "dead_experts"),
}
# The first six that have data.
OVERVIEW = (
    "reward",
    "ratio",
    "clip_fraction",
    "response_length",
    "step_time",
    "load_imbalance",
    "dpo_margin",
    "dpo_accuracy",
    "dpo_log_ratios",
    "warm_start_loss",
    "warm_start_accuracy",
)
LOOK: "dict[RcKeyType, Any]" = {
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.6,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.12,
    "figure.constrained_layout.w_pad": 0.12,
    "savefig.dpi": 140,
}


def draw(run_dir: Path) -> list[Path]:
    """Draw every chart the run has data for as PNGs in run_dir/plots, over older ones, and return their paths.

    Raises MetricsError on missing or corrupt metrics, and OSError, which names the file, where one cannot be written.
    """
    record = load_record(run_dir)
    folder = run_dir / "plots"
    paths = []
    with matplotlib.rc_context(LOOK):
        for name, figure in figures(record).items():
            folder.mkdir(exist_ok=True)
            paths.append(folder / f"{name}.png")
            content = io.BytesIO()
            figure.savefig(content, format="png")
            replace(paths[-1], content.getvalue())
    return paths


def figures(record: RunRecord) -> dict[str, Figure]:
    """Make the charts by file name, the overview last; none for a run without a metric that is drawn."""
    charts = {}
    for name, panels in CHARTS.items():
        shown = [panel for panel in panels if PANELS[panel].has_data(record)]
        if shown:
            charts[name] = _stacked(record, shown)
    shown = [panel for panel in OVERVIEW if PANELS[panel].has_data(record)][:6]
    if shown:
        charts["overview"] = _overview(record, shown)
    return charts


def run_title(record: RunRecord) -> str:
    """Tell the run in one line, as far as config.yaml does: "moe_gspo: gspo, seed 1, 32 prompts × 8 responses ..."."""
    name = record.setting("name") or record.path.resolve().name
    prompts, group = record.setting("rollout.num_prompts"), record.setting("rollout.group_size")
    batch = None if prompts is None or group is None else f"{prompts} prompts × {group} responses a step"
    if record.setting("algorithm.name") == "dpo":
        batch = f"{record.setting('algorithm.preference.batch_size')} pairs a step"
    parts = [
        record.setting("algorithm.name"),
        "shuffled advantages (control)" if record.setting("algorithm.shuffle_advantages") else None,
        None if record.setting("seed") is None else f"seed {record.setting('seed')}",
        batch,
    ]
    told = ", ".join(str(part) for part in parts if part)
    return f"{name}: {told}" if told else str(name)


def _stacked(record: RunRecord, panels: Sequence[str]) -> Figure:
    heights = [PANELS[panel].height for panel in panels]
    figure = Figure(figsize=(7.2, 1.0 + 3.4 * sum(heights)))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, record, panel)
    return figure


def _overview(record: RunRecord, panels: Sequence[str]) -> Figure:
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.1 * columns, 0.5 + 3.9 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, record, panel)
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    figure.suptitle(run_title(record), x=0.008, ha="left", fontsize=13, color="#333333", parse_math=False)
    return figure


def _draw_panel(ax: Axes, record: RunRecord, panel: str) -> None:
    PANELS[panel].onto(ax, record)
    labels = ax.get_legend_handles_labels()[1]
    if labels:
        # Below the axis, so that nothing is covered wherever the curves go. In one row where it fits the axis' width:
        # a wider legend would make the layout shrink the axes.
        one_row = sum(len(label) + 6 for label in labels) <= 52
        columns = len(labels) if one_row else 2 if len(labels) <= 4 else 3
        ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.17), ncols=columns, columnspacing=1.4)
