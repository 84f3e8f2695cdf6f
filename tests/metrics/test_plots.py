"""Charts show the numbers of the run, cope with what is missing, and cover nothing with their legends."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics.axes import smooth
from gspo_megatron.metrics.learning import summarise, wilson_interval
from gspo_megatron.metrics.panels import PANELS
from gspo_megatron.metrics.plots import LOOK, draw, figures, run_title
from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.metrics.record import RunRecord
from gspo_megatron.metrics.tracker import MetricsError

REPOSITORY = Path(__file__).parents[2]
EVERY_CHART = ["clip_fraction", "overview", "ratio", "response_length", "reward", "routing", "step_time", "warm_start"]


def run_rows(steps: int = 30) -> list[dict]:
    warm: list[dict] = [{"phase": "warm_start", "step": step, "loss": 3.0 / step} for step in range(1, 21)]
    warm[9] |= {"eval/accuracy": 0.125}
    warm[19] |= {"eval/accuracy": 0.25}
    rl = [{"phase": "rl", "step": 0, "eval/accuracy": 0.25, "eval/num": 64, "eval/response_length": 9.0}]
    for step in range(1, steps + 1):
        rl.append(
            {
                "phase": "rl",
                "step": step,
                "reward/mean": 0.25 + 0.01 * step,
                "ratio/mean": 1.0,
                "ratio/std": 5e-4,
                "ratio/min": 0.99,
                "ratio/max": 1.02,
                "clip/seq_low": 0.1,
                "clip/seq_high": 0.05,
                "clip/token": 0.2,
                "response/length": 10.0,
                "response/length_max": 20.0,
                "response/truncated": 0.03,
                "time/rollout": 4.0,
                "time/reward": 0.5,
                "time/old_logprobs": 1.0,
                "time/update": 3.0,
                "time/other": 0.25,
                "route/load_imbalance": 1.5,
                "route/load_imbalance_max": 2.0,
                "route/dead_experts": 1.0,
            }
        )
    rl[-1] |= {"eval/accuracy": 0.5, "eval/num": 64}
    return warm + rl


def record_of(rows: list[dict], config: dict | None = None) -> RunRecord:
    by_phase = ([row for row in rows if row["phase"] == phase] for phase in ("warm_start", "rl", "dpo"))
    return RunRecord(Path("run"), config or {}, *by_phase)


def dpo_rows(steps: int = 20) -> list[dict]:
    rows: list[dict] = [{"phase": "dpo", "step": 0, "dpo/eval_margin": 0.0, "dpo/eval_accuracy": 0.5}]
    for step in range(1, steps + 1):
        rows.append(
            {
                "phase": "dpo",
                "step": step,
                "dpo/margin": 0.1 * step,
                "dpo/accuracy": 0.5 + 0.02 * step,
                "dpo/chosen": -0.5 * step,
                "dpo/rejected": -1.5 * step,
            }
        )
    rows[-1] |= {"dpo/eval_margin": 1.5, "dpo/eval_accuracy": 0.875}
    return rows


def panel(name: str, record: RunRecord) -> Axes:
    ax = Figure().subplots()
    PANELS[name].onto(ax, record)
    return ax


def line(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in ax.get_lines() if line.get_label() == label]
    return list(found.get_xdata()), list(found.get_ydata())


def test_files_of_a_whole_run(write_run) -> None:
    run = write_run(run_rows(), {"name": "demo"})
    paths = draw(run)
    assert sorted(path.stem for path in paths) == EVERY_CHART
    assert all(path.parent == run / "plots" and path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert sorted(path.name for path in (run / "plots").iterdir()) == [f"{name}.png" for name in EVERY_CHART]


def test_what_is_missing_is_left_out() -> None:
    warm_only = [row for row in run_rows() if row["phase"] == "warm_start"]
    charts = figures(record_of(warm_only))
    assert list(charts) == ["warm_start", "overview"] and len(charts["overview"].axes) == 2
    assert figures(record_of([])) == {}
    assert figures(record_of([{"phase": "rl", "step": 1, "entropy": 0.5, "reward/mean": None}])) == {}
    without_tail = [{k: v for k, v in row.items() if k != "response/truncated"} for row in run_rows()]
    assert len(figures(record_of(without_tail))["response_length"].axes) == 1


@pytest.mark.parametrize("steps", [0, 1])
def test_every_panel_draws_with_few_rows_and_with_any_one_of_its_metrics(steps: int) -> None:
    rows = run_rows(steps) + dpo_rows(steps)
    for figure in figures(record_of(rows)).values():
        figure.draw_without_rendering()
    for name, wanted in PANELS.items():
        for key in wanted.keys:
            alone = record_of([{k: v for k, v in row.items() if k in ("phase", "step", key)} for row in rows])
            if wanted.has_data(alone):
                panel(name, alone)


def test_reward_panel_values() -> None:
    ax = panel("reward", record_of(run_rows()))
    steps, smoothed = line(ax, "training reward, smoothed")
    assert steps == list(range(1, 31)) and smoothed == pytest.approx([0.25 + 0.01 * step for step in steps])
    assert line(ax, "held-out accuracy (95%)") == ([0, 30], [0.25, 0.5])
    assert line(ax, "accuracy after warm start")[1] == [0.25, 0.25]
    whiskers = [tuple(found.get_ydata()) for found in ax.get_lines() if list(found.get_xdata()) == [30, 30]]
    assert whiskers == [pytest.approx(wilson_interval(0.5, 64))]
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] <= 1.02


def test_rewards_outside_0_to_1_are_not_cut_off() -> None:
    ax = panel("reward", record_of([{"phase": "rl", "step": step, "reward/mean": step - 3.0} for step in range(1, 6)]))
    assert ax.get_ylim()[0] < -2 and ax.get_ylim()[1] > 2


def test_accuracy_without_counts_has_no_interval() -> None:
    rows = [{k: v for k, v in row.items() if k != "eval/num"} for row in run_rows()]
    ax = panel("reward", record_of(rows))
    assert line(ax, "held-out accuracy")[1] == [0.25, 0.5]
    assert not [found for found in ax.get_lines() if list(found.get_xdata()) == [30, 30]]


def test_ratio_panel_is_centred_on_one_with_the_clip_range_of_the_recipe() -> None:
    config = {"algorithm": {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}}
    ax = panel("ratio", record_of(run_rows(), config))
    dashed = [found.get_ydata()[0] for found in ax.get_lines() if found.get_linestyle() == "--"]
    assert dashed == [-3e-4, 4e-4]
    bands = [(band.get_datalim(ax.transData).y0, band.get_datalim(ax.transData).y1) for band in ax.collections]
    assert bands == [pytest.approx((-0.01, 0.02)), pytest.approx((-5e-4, 5e-4))]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["-0.01", "-0.001", "0", "+0.001", "+0.01"]
    plain = panel("ratio", record_of(run_rows()))
    assert not [found for found in plain.get_lines() if found.get_linestyle() == "--"]


def test_clip_panel_is_in_percent() -> None:
    ax = panel("clip_fraction", record_of(run_rows()))
    for label, percent in (("responses, ratio too low", 10), ("responses, ratio too high", 5), ("tokens, both", 20)):
        assert line(ax, label)[1] == pytest.approx([percent] * 30)


def test_step_time_stacks_to_the_whole_step_and_leaves_gaps() -> None:
    rows = [row for row in run_rows(4) if row["step"] != 3]
    ax = panel("step_time", record_of(rows))
    labels = ax.get_legend_handles_labels()[1]
    assert labels == ["rollout", "reward", "old log-probs", "update", "other"]
    tops = {patch.get_label(): list(patch.get_data().values) for patch in ax.patches}
    assert tops["rollout"] == [4.0, 4.0, 0.0, 4.0]
    assert tops["other"] == [8.75, 8.75, 0.0, 8.75]  # 4 + 0.5 + 1 + 3 + 0.25


def test_dpo_panels_show_training_and_held_out_pairs() -> None:
    record = record_of(dpo_rows())
    for name, smoothed, held_out, level in (
        ("margin", [0.1 * step for step in range(1, 21)], [0.0, 1.5], ("reference", 0.0)),
        ("accuracy", [0.5 + 0.02 * step for step in range(1, 21)], [0.5, 0.875], ("chance", 0.5)),
    ):
        ax = panel(f"dpo_{name}", record)
        steps, values = line(ax, "training pairs, smoothed")
        assert steps == list(range(1, 21)) and values == pytest.approx(smoothed)
        assert line(ax, "held-out pairs") == ([0, 20], held_out) and line(ax, level[0])[1] == [level[1]] * 2
    ax = panel("dpo_log_ratios", record)
    assert line(ax, "chosen")[1][-1] == pytest.approx(-10) and line(ax, "rejected")[1][-1] == pytest.approx(-30)
    charts = figures(record)
    assert list(charts) == ["preference", "overview"] and [len(c.axes) for c in charts.values()] == [3, 3]


def test_smooth_by_hand() -> None:
    # Window 3, inside: means of (3, 0, 6) and (0, 6, 3). Ends: their slopes are 1.5, one step out from those means.
    assert smooth([3.0, 0.0, 6.0, 3.0], window=3) == pytest.approx([1.5, 3.0, 3.0, 4.5])
    # A window wider than the run: one line through all, here flat at the mean.
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], window=99) == pytest.approx([1.2] * 5)
    straight = [2.0 * index for index in range(40)]
    assert smooth(straight) == pytest.approx(straight)
    assert smooth([1.0]) == pytest.approx([1.0])
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(list(noise)).std() < 0.3


def test_all_panels_of_a_phase_share_their_steps() -> None:
    overview = figures(record_of(run_rows()))["overview"]
    assert len(overview.axes) == 6 and {ax.get_xlim() for ax in overview.axes} == {(-0.6, 30.6)}


@pytest.mark.parametrize("chart", ["overview", "reward", "ratio", "clip_fraction", "step_time", "routing"])
def test_legends_cover_nothing_and_axes_keep_their_width(chart: str) -> None:
    with matplotlib.rc_context(LOOK):
        figure = figures(record_of(run_rows(), {"algorithm": {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}}))[chart]
        figure.draw_without_rendering()
    canvas = figure.bbox
    panels = [ax.get_tightbbox() for ax in figure.axes]
    columns = 3 if chart == "overview" else 1
    for ax in figure.axes:
        assert ax.get_title(loc="left") and ax.get_xlabel() and ax.get_ylabel()
        assert ax.bbox.width > 0.75 * canvas.width / columns
    for number, box in enumerate(panels):
        assert canvas.x0 <= box.x0 and box.x1 <= canvas.x1 and canvas.y0 <= box.y0 and box.y1 <= canvas.y1
        assert not any(box.overlaps(other) for other in panels[number + 1 :])
        legend = figure.axes[number].get_legend()
        assert legend is None or not legend.get_window_extent().overlaps(figure.axes[number].bbox)


def test_title_tells_the_run() -> None:
    config = {"name": "demo", "seed": 0, "algorithm": {"name": "gspo"}, "rollout": {"num_prompts": 4, "group_size": 8}}
    assert run_title(record_of([], config)) == "demo: gspo, seed 0, 4 prompts × 8 responses a step"
    config |= {"algorithm": {"name": "dpo", "preference": {"batch_size": 64}}}
    assert run_title(record_of([], config)) == "demo: dpo, seed 0, 64 pairs a step"
    assert run_title(record_of([], {})) == "run"


def test_tool_redraws_and_reports_bad_input(write_run, tmp_path: Path) -> None:
    def run_tool(folder: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "gspo_megatron.cli", "plot", str(folder)]
        environment = {"PYTHONPATH": "."}
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60)

    run = write_run([{"phase": "warm_start", "step": 1, "loss": 2.0}])
    done = run_tool(run)
    assert done.returncode == 0
    assert done.stdout.split() == [str(run / "plots/warm_start.png"), str(run / "plots/overview.png")]
    failed = run_tool(tmp_path / "absent")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ")


def test_corrupt_metrics_draw_nothing(write_run) -> None:
    run = write_run([])
    (run / "metrics.jsonl").write_text("{\n")
    with pytest.raises(GspoError, match="line 1"):
        draw(run)
    assert not (run / "plots").exists()


@pytest.mark.parametrize("name", ["a$\\frac$", "\\", "$", 5, ["a"]])
def test_any_name_is_a_title(write_run, name: object) -> None:
    """A formula of it would be one that matplotlib cannot read; an algorithm may have a number for a name too."""
    config = {"name": name, "algorithm": {"name": name, "clip_ratio_low": 0, "clip_ratio_high": 0}}
    assert len(draw(write_run(run_rows(3), config))) == len(EVERY_CHART)


@pytest.mark.parametrize("value", ["abc", [1], float("inf")])
def test_a_setting_that_is_no_number_is_named(write_run, value: object) -> None:
    run = write_run(run_rows(3), {"algorithm": {"clip_ratio_low": value}, "steps": value})
    with pytest.raises(MetricsError, match=r"run/config\.yaml: algorithm\.clip_ratio_low is .*, not a number"):
        draw(run)
    with pytest.raises(MetricsError, match=r"run/config\.yaml: steps is .*, not a number"):
        summarise(run)


def test_steps_far_apart_take_no_memory(write_run) -> None:
    """A stair for each step in between would take 16 GB. Very large numbers are drawn too."""
    rows = [{"phase": "rl", "step": step, "time/update": 1.0, "ratio/max": 1e308, "ratio/min": -1e308,
             "response/length": 1e308, "clip/token": 1e308} for step in (1, 2, 3, 2**31 - 1)]  # fmt: skip
    tops = panel("step_time", record_of(rows)).patches[0].get_data()
    assert list(tops.values) == [1.0, 1.0, 1.0, 0.0, 1.0] and tops.edges[-1] == 2**31 - 0.5
    with np.errstate(all="ignore"):
        assert draw(write_run(rows, {}))


def test_a_row_of_other_layers_is_left_out_of_the_map() -> None:
    key = "route/by_layer/changed_experts"
    given = ((1, [0.1]), (2, [0.1, 0.2]), (3, [None, 0.4]))
    rows = [{"phase": "rl", "step": step, key: shares} for step, shares in given]
    values = panel("routing_map", record_of(rows)).collections[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(values, np.nan), [[10.0, np.nan], [20.0, 40.0]])


# ---- Where a run went on with other values ----

LOW, HIGH = "algorithm.clip_ratio_low", "algorithm.clip_ratio_high"
NOW = {"algorithm": {"clip_ratio_low": 0.1, "clip_ratio_high": 0.4}}


def changed_record(*events: Event) -> RunRecord:
    return replace(record_of(run_rows(), NOW), events=list(events))


def test_a_change_is_a_mark_with_its_name_in_every_panel_of_its_phase() -> None:
    """Behind step 10 of RL, so at 10.5; three fields are named. A mark is in no legend and moves no axis."""
    changes = {
        "optimizer.lr": (1e-4, 5e-5),
        "a.b": (1, 2),
        "c": (3, 4),
        "tasks.x.on_error": (0.0, "drop"),
        "e.f": (1, 2),
    }
    record = changed_record(Event("rl", 10, changes))
    for name in ("reward", "step_time", "clip_fraction"):
        ax, plain = panel(name, record), panel(name, record_of(run_rows(), NOW))
        marks = [one for one in ax.get_lines() if list(one.get_xdata()) == [10.5, 10.5]]
        assert len(marks) == 1
        assert [text.get_text() for text in ax.texts] == ["lr 0.0001 -> 5e-05\nb 1 -> 2\nc 3 -> 4\nand 2 more"]
        assert ax.get_legend_handles_labels()[1] == plain.get_legend_handles_labels()[1]
        assert (ax.get_xlim(), ax.get_ylim()) == (plain.get_xlim(), plain.get_ylim())
    assert list(panel("warm_start_loss", record).texts) == []
    for figure in figures(record).values():
        figure.draw_without_rendering()


def test_the_clip_range_is_drawn_as_far_as_it_held() -> None:
    """1 - 0.3 up to step 10, 1 - 0.2 up to 20, and 1 - 0.1 now; the upper one never changed."""
    record = changed_record(Event("rl", 10, {LOW: (0.3, 0.2)}), Event("rl", 20, {LOW: (0.2, 0.1)}))
    dashed = [one for one in panel("ratio", record).get_lines() if one.get_linestyle() == "--"]
    assert [(list(one.get_xdata()), list(one.get_ydata())) for one in dashed] == [
        ([-1, 10.5], [-0.3, -0.3]),
        ([10.5, 20.5], [-0.2, -0.2]),
        ([20.5, 31], [-0.1, -0.1]),
        ([-1, 31], [0.4, 0.4]),
    ]
    labels = panel("ratio", record).get_legend_handles_labels()[1]
    assert labels.count("clip range") == 1


def test_what_changed_in_the_warm_start_held_in_all_of_rl() -> None:
    events = Event("warm_start", 5, {LOW: (0.3, 0.2)}), Event("rl", 3, {LOW: (0.2, None)})
    assert changed_record(*events).numbers(LOW, "rl") == [(-math.inf, 0.2), (3.5, None)]
    assert changed_record(*events).numbers(HIGH, "rl") == [(-math.inf, 0.4)]
    with pytest.raises(MetricsError, match="clip_ratio_low changed by .* 0.2 -> much, no numbers"):
        changed_record(Event("rl", 3, {LOW: (0.2, "much")})).numbers(LOW, "rl")
