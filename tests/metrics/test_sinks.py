"""Numbers of a run in W&B (offline) and MLflow (a database), read back by value; and sinks that fail or hang."""

import json
import struct
import threading
from pathlib import Path

import pytest
import wandb
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from gspo_megatron.config import OptimizerConfig, TrackingConfig, TrainConfig
from gspo_megatron.metrics.sink import Background, Row, tracker_sinks
from gspo_megatron.metrics.tracker import Tracker, read_metrics

# The second process goes on from a checkpoint after rl step 1: step 2 is repeated, with other numbers.
FIRST = [
    {"phase": "warm_start", "step": 1, "loss": 2.5},
    {"phase": "rl", "step": 0, "eval/accuracy": 0.25},
    {
        "phase": "rl",
        "step": 1,
        "loss": -0.5,
        "reward/sum/exact": 0.75,
        "reward/sum": 0.5,
        "route/by_layer/x": [1.0, 2.0],
    },
    {"phase": "rl", "step": 2, "loss": -0.25, "grad_norm": None},
]
SECOND = [{"phase": "rl", "step": 2, "loss": -0.125}, {"phase": "rl", "step": 3, "loss": 0.5}]
EXPECTED = {  # name: its (step, value)s, in the order in which they were logged
    "warm_start/loss": [(1, 2.5)],
    "eval/accuracy": [(0, 0.25)],
    "loss": [(1, -0.5), (2, -0.25), (2, -0.125), (3, 0.5)],
    "reward/sum": [(1, 0.5)],
    "reward/sum/exact": [(1, 0.75)],
}


def log(folder: Path, config: TrainConfig, rows: list[dict]) -> list[str]:
    """What one process does; returns its warnings."""
    said: list[str] = []
    with Tracker(folder, said.append, tracker_sinks(folder, config)) as tracker:
        for row in rows:
            tracker.log(row)
    return said


def cut_back(folder: Path) -> None:
    """As a resume does: the record ends after rl step 1."""
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:3]))


# ---- W&B ----


def records(folder: Path) -> list[Record]:
    """Everything in the offline file of one process: after 7 bytes a log of blocks of 32 KiB, as LevelDB writes it."""
    wandb.teardown()  # what its own process has not written by the end of a run, it has at its own end
    (path,) = folder.glob("run-*.wandb")
    data, place, whole, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        whole += data[place + 7 : place + 7 + length]
        if kind in (1, 4):  # full, or last of several parts
            found.append(Record.FromString(whole))
            whole = b""
        place += 7 + length
        left = 32768 - place % 32768
        place += left if left < 7 else 0
    return found


def history(found: list[Record]) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} by the step that we give."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record in found:
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for key, value in row.items():
            if key != "step" and not key.startswith("_"):
                series.setdefault(key, []).append((row["step"], value))
    return series


def recipe_at_wandb(found: list[Record]) -> dict:
    values = {}
    for record in found:
        for item in (*record.config.update, *record.run.config.update):
            values[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return values


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb.teardown()  # its settings are read once a process
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_resumed_run_keeps_its_wandb_id_and_has_every_number(tmp_path, offline, capfd) -> None:
    folder = tmp_path / "moe_gspo-2"
    config = TrainConfig(tracking=TrackingConfig(wandb=True, project="ours"), optimizer=OptimizerConfig(lr=1e-4))
    assert log(folder, config, FIRST) == []
    saved = json.loads((folder / "wandb.json").read_text())
    cut_back(folder)
    assert log(folder, TrainConfig(steps=7, tracking=config.tracking), SECOND) == []
    assert json.loads((folder / "wandb.json").read_text()) == saved

    first, second = (records(path) for path in sorted((folder / "wandb").glob("offline-run-*")))
    assert sorted(history(first)) == sorted(EXPECTED)
    both = {key: values + history(second).get(key, []) for key, values in history(first).items()}
    assert both == EXPECTED
    for found in (first, second):
        (run,) = (record.run for record in found if record.HasField("run"))
        assert (run.run_id, run.project, run.display_name) == (saved["id"], "ours", "moe_gspo-2")
        assert {metric.glob_name: metric.step_metric for metric in (r.metric for r in found) if metric.glob_name} == {
            "*": "step"
        }
    assert recipe_at_wandb(first)["optimizer"]["lr"] == 1e-4 and recipe_at_wandb(first)["steps"] == 100
    assert recipe_at_wandb(second)["steps"] == 7
    assert "".join(capfd.readouterr()) == ""


def test_wandb_that_is_asked_for_later_gets_the_record_first(tmp_path, offline) -> None:
    assert log(tmp_path, TrainConfig(), FIRST) == []
    cut_back(tmp_path)
    assert log(tmp_path, TrainConfig(tracking=TrackingConfig(wandb=True)), SECOND) == []
    (only,) = (tmp_path / "wandb").glob("offline-run-*")
    assert history(records(only)) == EXPECTED | {"loss": [(1, -0.5), (2, -0.125), (3, 0.5)]}


def test_without_a_key_for_wandb_a_run_goes_on_and_says_so_once(tmp_path, monkeypatch) -> None:
    wandb.teardown()
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    folder = tmp_path / "run"
    (said,) = log(folder, TrainConfig(tracking=TrackingConfig(wandb=True)), FIRST)
    assert said.startswith("tracking.wandb: cannot be written (UsageError: No API key configured.")
    assert said.endswith("; the run goes on without")
    assert len(read_metrics(folder)) == 4 and not (folder / "wandb.json").exists()


# ---- MLflow ----


def metrics_at_mlflow(client: MlflowClient, run: str) -> dict[str, list[tuple[int, float]]]:
    names = client.get_run(run).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run, name)] for name in names}


def test_a_resumed_run_keeps_its_mlflow_run_and_has_every_number(tmp_path, monkeypatch, capfd) -> None:
    """In a database of the run folder, since no other place is named; one that has not this run gets the record."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "moe_gspo-2"
    config = TrainConfig(tracking=TrackingConfig(mlflow=True, project="ours"), optimizer=OptimizerConfig(lr=1e-4))
    assert log(folder, config, FIRST) == []
    run = json.loads((folder / "mlflow.json").read_text())["run_id"]
    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    assert client.get_run(run).info.status == "FINISHED"
    cut_back(folder)
    assert log(folder, TrainConfig(steps=7, tracking=config.tracking), SECOND) == []
    assert json.loads((folder / "mlflow.json").read_text()) == {"run_id": run}
    assert "".join(capfd.readouterr()) == ""

    assert metrics_at_mlflow(client, run) == EXPECTED
    found = client.get_run(run)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "moe_gspo-2")
    assert client.get_experiment(found.info.experiment_id).name == "ours"
    assert found.data.params["optimizer.lr"] == "0.0001" and found.data.params["steps"] == "100"
    assert found.data.params["tracking.project"] == "ours" and len(found.data.params) > 100

    # A database that does not know the run, as after a move to another server.
    (folder / "mlflow.json").write_text(json.dumps({"run_id": 32 * "0"}))
    assert log(folder, config, [{"phase": "rl", "step": 4, "loss": 1.5}]) == []
    other = json.loads((folder / "mlflow.json").read_text())["run_id"]
    assert other not in (run, 32 * "0")
    once = {"loss": [(1, -0.5), (2, -0.125), (3, 0.5), (4, 1.5)]}
    assert metrics_at_mlflow(client, other) == EXPECTED | once


def test_an_mlflow_that_refuses_is_one_warning(tmp_path) -> None:
    config = TrainConfig(tracking=TrackingConfig(mlflow=True, mlflow_uri="gopher://nowhere"))
    (said,) = log(tmp_path, config, FIRST)
    assert said.startswith("tracking.mlflow: cannot be written (") and said.endswith("; the run goes on without")
    assert len(read_metrics(tmp_path)) == 4


# ---- Any sink ----


class Failing:
    """Shows one row, and fails from then on."""

    def __init__(self, earlier: list[Row]):
        self.rows = 0

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.rows += 1
        if self.rows > 1:
            raise ConnectionError(f"no way to the server\nat step {step}")

    def close(self, patience: float) -> None:
        raise ConnectionError("no way to close")


@pytest.mark.parametrize("opener", [Failing, lambda earlier: Background(Failing, earlier)], ids=["here", "in a thread"])
def test_a_sink_that_fails_costs_one_warning_and_no_other_sink(tmp_path, opener) -> None:
    said: list[str] = []
    with Tracker(tmp_path, said.append, {"tracking.ours": opener}) as tracker:
        for row in FIRST:
            tracker.log(row)
    assert len(said) == 1 and said[0] == (
        "tracking.ours: cannot be written (ConnectionError: no way to the server at step 0); the run goes on without"
    )
    assert len(read_metrics(tmp_path)) == 4
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, -0.5), (2, -0.25)]


def test_a_sink_that_hangs_holds_up_no_step_and_the_end_by_its_patience(tmp_path) -> None:
    released = threading.Event()

    def hang(earlier: list[Row]) -> Failing:
        released.wait(60)
        return Failing(earlier)

    said: list[str] = []
    tracker = Tracker(tmp_path, said.append, {"tracking.ours": lambda earlier: Background(hang, earlier)})
    for row in FIRST:
        tracker.log(row)
    assert said == []
    tracker.close(patience=0.1)
    released.set()
    (told,) = said
    assert "not all was sent within 0.1 seconds" in told
