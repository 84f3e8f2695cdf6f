"""The rows of a run: valid JSON whatever the values, whole after a kill, the same in TensorBoard."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics import plots
from gspo_megatron.metrics.learning import summarise
from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.metrics.record import load_record, series
from gspo_megatron.metrics.tracker import MetricsError, Tracker, read_metrics, read_record
from tests.full_disk import full_at


def strict_lines(path: Path) -> list[dict]:
    """Parsed as other languages would: NaN is an error."""

    def reject(constant: str) -> None:
        raise AssertionError(f"{constant} in {path}")

    return [json.loads(line, parse_constant=reject) for line in path.read_text().splitlines()]


def test_rows_are_on_disk_before_close_and_come_back_equal(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path)
    tracker.log({"phase": "warm_start", "step": 1, "loss": 2.5})
    foreign = {"eval/accuracy": np.float32(0.25), "kl/k1": torch.tensor(0.5)}
    tracker.log({"phase": "rl", "step": 0, "eval/num": 48, **foreign})
    rows = read_metrics(tmp_path)
    tracker.close()
    assert rows == [
        {"phase": "warm_start", "step": 1, "loss": 2.5},
        {"phase": "rl", "step": 0, "eval/accuracy": 0.25, "eval/num": 48, "kl/k1": 0.5},
    ]


def test_non_finite_values_are_null_and_named_in_the_warning(tmp_path: Path) -> None:
    said: list[str] = []
    with Tracker(tmp_path, warn=said.append) as tracker:
        tracker.log({"phase": "rl", "step": 3, "loss": math.nan, "ratio/max": math.inf, "entropy": 0.5})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"phase": "rl", "step": 3, "loss": None, "ratio/max": None, "entropy": 0.5}
    ]
    assert said == ["rl step 3: loss is nan, ratio/max is inf; written as null"]
    assert series(read_metrics(tmp_path), "loss") == ([], [])


def test_tensorboard_has_both_phases_on_their_own_step_axis(tmp_path: Path) -> None:
    with Tracker(tmp_path, warn=lambda text: None) as tracker:
        tracker.log({"phase": "warm_start", "step": 7, "loss": 2.0})
        tracker.log({"phase": "rl", "step": 5, "loss": -0.5, "grad_norm": math.nan})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"warm_start/loss": [(7, 2.0)], "loss": [(5, -0.5)]}


@pytest.mark.parametrize("row", [{"step": 1}, {"phase": "x", "step": 1}, {"phase": "rl"}, {"phase": "rl", "step": 1.0}])
def test_a_row_without_phase_or_step_is_a_defect_and_writes_nothing(tmp_path: Path, row: dict) -> None:
    with Tracker(tmp_path) as tracker, pytest.raises(ValueError, match="phase"):
        tracker.log(row)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_samples_keep_any_text_on_one_line(tmp_path: Path) -> None:
    row = {"prompt": "é\n\u2028", "response": "\udc80", "reward": 1.0, "step": 2}
    with Tracker(tmp_path) as tracker:
        tracker.sample(row)
    data = (tmp_path / "samples.jsonl").read_bytes()
    assert data.count(b"\n") == 1 and "é".encode() in data
    assert json.loads(data) == row


def test_corrupt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for bad in ("{broken", '{"phase": "rl", "step": 1, "loss": NaN}', '{"loss": 1.0}', "[1]", ""):
        path.write_text('{"phase": "rl", "step": 0}\n' + bad + '\n{"phase": "rl", "step": 2}\n')
        with pytest.raises(GspoError, match=r"metrics\.jsonl, line 2: not"):
            read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("reward/mean", '"abc"', "is 'abc', not a number"),
        ("reward/mean", "[1, 2]", "is [1, 2], not a number"),
        ("reward/mean", "{}", "is {}, not a number"),
        ("reward/mean", "1" + "0" * 400, "is 1000000"),
        ("loss", "1e999", "is inf, not a number"),
        ("route/by_layer/entropy", "0.5", "is 0.5, not a list of numbers"),
        ("route/by_layer/entropy", '[0.5, "x"]', "not a list of numbers"),
    ],
)
def test_a_metric_that_cannot_be_is_named(tmp_path: Path, key: str, text: str, said: str) -> None:
    """By everything that reads the record: the charts, the criteria, and a run that goes on."""
    (tmp_path / "metrics.jsonl").write_text(
        f'{{"phase": "rl", "step": 0}}\n{{"phase": "rl", "step": 1, "{key}": {text}}}\n'
    )
    for read in (read_metrics, load_record, plots.draw, Tracker):
        with pytest.raises(MetricsError) as caught:
            read(tmp_path)
        assert f"metrics.jsonl, line 2: {key} is " in str(caught.value) and said in str(caught.value)
        assert "Repair or remove the line by hand." in str(caught.value)


@pytest.mark.parametrize("step", ["true", "-5", "1e3", str(2**31), str(10**30)])
def test_a_step_that_cannot_be_is_no_row(tmp_path: Path, step: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"phase": "rl", "step": {step}}}\n')
    with pytest.raises(MetricsError, match="line 1: not a metric row"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("eval/accuracy", 1.5, "eval/accuracy is 1.5 at rl step 0, not between 0 and 1."),
        ("eval/accuracy", -0.1, "eval/accuracy is -0.1 at rl step 0, not between 0 and 1."),
        ("eval/num", -4, "eval/num is -4 at rl step 0, not between 1 and 1e+18."),
        ("eval/num", 0, "eval/num is 0 at rl step 0"),
        ("reward/mean", 1e308, "reward/mean is 1e+308 at rl step 0, not between -1e+30 and 1e+30."),
    ],
)
def test_a_metric_out_of_its_range_is_named(write_run, key: str, value: float, said: str) -> None:
    run = write_run([{"phase": "rl", "step": 0, "eval/accuracy": 0.5, "eval/num": 4} | {key: value}])
    for read in (summarise, plots.draw):
        with pytest.raises(MetricsError) as caught:
            read(run)
        assert f"{run / 'metrics.jsonl'}: {said}" in str(caught.value)


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(GspoError, match=r"metrics\.jsonl: no such file"):
        read_metrics(tmp_path)


def test_line_cut_by_a_kill_is_left_out_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 1}\n{"phase": "rl", "st')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 2: unfinished"):
        assert read_metrics(tmp_path) == [{"phase": "rl", "step": 1}]


@pytest.mark.parametrize(
    ("tail", "steps", "warnings"),
    [('{"phase": "rl", "st', [1, 3], 1), ('{"phase": "rl", "step": 2}', [1, 2, 3], 0)],
)
def test_resuming_after_a_kill_does_not_join_lines(tmp_path: Path, tail: str, steps: list[int], warnings: int) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 1}\n' + tail)
    said: list[str] = []
    with Tracker(tmp_path, warn=said.append) as tracker:
        tracker.log({"phase": "rl", "step": 3})
    assert [row["step"] for row in read_metrics(tmp_path)] == steps
    assert len(said) == warnings


def test_record_takes_the_later_row_of_a_repeated_step(write_run) -> None:
    steps = ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.7), (3, 0.8))
    rows = [{"phase": "rl", "step": step, "reward/mean": value} for step, value in steps]
    record = load_record(write_run(rows, {"algorithm": {"clip_ratio_low": 3e-4}}))
    assert series(record.rl, "reward/mean") == ([1, 2, 3], [0.1, 0.7, 0.8])
    assert record.setting("algorithm.clip_ratio_low") == 3e-4
    assert record.setting("algorithm.name.deeper", "none") == "none"


def test_unreadable_config_is_a_user_error(write_run) -> None:
    run = write_run([{"phase": "rl", "step": 0}])
    for text in ("a: [", "- a list"):
        (run / "config.yaml").write_text(text)
        with pytest.raises(GspoError, match=r"config\.yaml"):
            load_record(run)


# ---- What cannot be written ----


def test_a_row_that_cannot_be_written_is_one_error_and_no_half_line(tmp_path: Path) -> None:
    """The file has room for 10 bytes of the second row."""
    tracker = Tracker(tmp_path, warn=lambda text: None)
    tracker.log({"phase": "rl", "step": 0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    with full_at(len(whole) + 10), pytest.raises(GspoError) as caught:
        tracker.log({"phase": "rl", "step": 1, "loss": 0.25})
    assert str(caught.value).startswith(f"{tmp_path / 'metrics.jsonl'}: cannot be written (File too large). Make room")
    assert "the same command: it goes on from the newest checkpoint" in str(caught.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    tracker.log({"phase": "rl", "step": 2})  # there is room again
    tracker.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 2]


def test_a_run_goes_on_without_samples_and_events_and_says_so_once(tmp_path: Path) -> None:
    """The limit is 50 bytes behind the first event: the second event of the same 40 numbers does not fit, a sample of
    3000 characters neither, and both rows do (11 bytes a number, an event 24)."""
    said: list[str] = []
    numbers = {f"m/{number}": 1 for number in range(40)}
    with Tracker(tmp_path, warn=said.append) as tracker:
        tracker.sample({"step": 0, "response": "a"})
        tracker.log({"phase": "warm_start", "step": 1} | numbers)
        with full_at(next((tmp_path / "tensorboard").iterdir()).stat().st_size + 50):
            for step in (2, 3):
                tracker.sample({"step": 1, "response": 3000 * "a"})
                if step == 2:
                    tracker.log({"phase": "warm_start", "step": step} | numbers)
    assert [text.split(" (")[0] for text in said] == [
        f"{tmp_path / name}: cannot be written" for name in ("samples.jsonl", "tensorboard")
    ]
    assert all(text.endswith("(File too large); the run goes on without") for text in said)
    assert (tmp_path / "samples.jsonl").read_text() == '{"step": 0, "response": "a"}\n'
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert scalars(tmp_path)["warm_start/m/39"] == [(1, 1.0)]  # whole events, as many as there was room for


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_events_of_a_resumed_run_are_those_of_its_record(tmp_path: Path) -> None:
    """A resume removes the events and cuts the record back: both show each step once."""
    rows = [{"phase": "warm_start", "step": 1, "loss": 2.0}, {"phase": "rl", "step": 0, "loss": 0.5, "lr": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Tracker(tmp_path) as tracker:
        tracker.log({"phase": "rl", "step": 1, "loss": 0.25})
    assert scalars(tmp_path) == {"warm_start/loss": [(1, 2.0)], "loss": [(0, 0.5), (1, 0.25)]}


def test_each_row_is_synced_before_log_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint is begun after log(): the row that it counts is on the disk by then, not in the system's memory."""
    synced: list[tuple[str, int]] = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        real(descriptor)
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))

    monkeypatch.setattr(os, "fsync", watched)
    with Tracker(tmp_path) as tracker:
        tracker.log({"phase": "rl", "step": 0})
        assert synced == [(str(tmp_path / "metrics.jsonl"), len('{"phase": "rl", "step": 0}\n'))]


def test_an_empty_record_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(GspoError, match=r"metrics\.jsonl: has no row"):
        plots.draw(tmp_path)


def test_a_chart_that_cannot_be_written_leaves_no_half_of_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 0, "reward/mean": 0.5}\n')
    with full_at(4096), pytest.raises(OSError, match="File too large") as caught:
        plots.draw(tmp_path)
    assert caught.value.filename == str(tmp_path / "plots/reward.png")
    assert list((tmp_path / "plots").iterdir()) == []


# ---- Events ----

CHANGED = Event("rl", 2, {"optimizer.lr": (1e-4, 5e-5), "tasks.a.on_error": (0.0, "drop"), "x": (None, [1])}, 16)


def test_an_event_stands_between_the_rows_and_is_in_no_reader_s_way(tmp_path: Path) -> None:
    """Rows are as without it, in the record and in TensorBoard; the event is on the disk before the next row."""
    with Tracker(tmp_path) as tracker:
        tracker.log({"phase": "rl", "step": 2, "loss": 1.0})
        tracker.event(CHANGED)
        assert strict_lines(tmp_path / "metrics.jsonl")[-1] == {
            "phase": "rl",
            "step": 2,
            "event": "change",
            "prompts": 16,
            "changes": {
                "optimizer.lr": {"old": 1e-4, "new": 5e-5},
                "tasks.a.on_error": {"old": 0.0, "new": "drop"},
                "x": {"old": None, "new": [1]},
            },
        }
        tracker.log({"phase": "rl", "step": 3, "loss": 2.0})
    assert read_metrics(tmp_path) == [{"phase": "rl", "step": step, "loss": step - 1.0} for step in (2, 3)]
    assert read_record(tmp_path)[1] == load_record(tmp_path).events == [CHANGED]
    with Tracker(tmp_path):  # a start reads it all to make events of TensorBoard again
        pass
    assert scalars(tmp_path) == {"loss": [(2, 1.0), (3, 2.0)]}
    assert str(CHANGED) == "optimizer.lr 0.0001 -> 5e-05, tasks.a.on_error 0 -> drop, x None -> [1]"


@pytest.mark.parametrize(
    "text",
    [
        '"event": "change"',
        '"event": "change", "changes": {}',
        '"event": "change", "prompts": -1, "changes": {}',
        '"event": "change", "prompts": true, "changes": {}',
        '"event": "change", "prompts": 0, "changes": []',
        '"event": "change", "prompts": 0, "changes": {"a": 1}',
        '"event": "change", "prompts": 0, "changes": {"a": {"old": 1}}',
        '"event": "sleep", "prompts": 0, "changes": {}',
        '"event": null, "prompts": 0, "changes": {}',
        '"event": "change", "prompts": 0, "changes": {}, "loss": 1',
    ],
)
def test_an_event_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 1}\n{"phase": "rl", "step": 1, ' + text + "}\n")
    with pytest.raises(MetricsError, match=r"metrics.jsonl, line 2: not an event, which has .* by hand\."):
        read_metrics(tmp_path)


def test_an_event_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        with (
            full_at(10),
            pytest.raises(MetricsError, match=r"metrics\.jsonl: cannot be written .* goes on from the newest"),
        ):
            tracker.event(CHANGED)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
