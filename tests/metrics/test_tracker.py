"""The rows of a run: valid JSON whatever the values, whole after a kill, the same in TensorBoard."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics.record import load_record, series
from gspo_megatron.metrics.tracker import Tracker, read_metrics


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
