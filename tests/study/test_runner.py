"""A real study of three short trainings: what is kept, what is not done twice, and what a failure does."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gspo_megatron.study import archive, plan, report
from gspo_megatron.study.plan import RunSpec
from gspo_megatron.study.results import load
from gspo_megatron.study.runner import Study, StudyError, run_all

SHORT = {
    "steps": 2, "eval-interval": 1, "warm-start.steps": 3, "warm-start.num-examples": 128, "warm-start.batch-size": 32,
    "data.num-eval-prompts": 8, "data.eval-samples": 1, "rollout.num-prompts": 8, "routing.diagnostics-interval": 2,
}  # fmt: skip
FREE, REPLAYED = RunSpec("gspo", "main", 2e-4, 1), RunSpec("gspo_R2", "main", 2e-4, 1)
BAD = RunSpec("grpo", "main", -1.0, 1)  # no learning rate: the training refuses it


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tuple[Study, list[str]]:
    folder = tmp_path_factory.mktemp("study")
    made = Study(plan.RECIPE, folder / "report", folder / "work", slots=2, extra=SHORT)
    return made, run_all(made, [FREE, BAD, REPLAYED])


def test_finished_runs_are_kept(study):
    """Both from the same weights, with a row a step, and with R2's routes as the statistics see them."""
    results = {run.spec: run for run in load(study[0].folder)}
    assert set(results) == {FREE, REPLAYED}
    assert results[FREE].about["start"] == results[REPLAYED].about["start"]
    assert results[REPLAYED].about["overrides"]["routing.replay"] == "R2"
    for run in results.values():
        assert [row["step"] for row in run.rows] == [0, 1, 2] and run.about["status"] == "finished"
        assert run.rows[1]["ratio/noise_floor"] == 0 and run.rows[1]["route/changed_experts"] >= 0
        assert run.rows[2]["ratio_parts/sequence_total"] > 0 and run.rows[2]["eval/accuracy"] >= 0
    # The first updates of both are made at the weights that made the routes: they are the same.
    assert results[FREE].rows[1]["reward/mean"] == results[REPLAYED].rows[1]["reward/mean"]


def test_a_failed_run_says_why_and_keeps_nothing(study):
    made, failures = study
    assert len(failures) == 1 and "optimizer.lr = -1.0" in failures[0] and BAD.name in failures[0]
    assert not made.data_file(BAD).exists() and list(made.folder.rglob("*.part")) == []


def test_nothing_is_trained_twice(study):
    made, _ = study
    before = {path: path.stat().st_mtime_ns for path in (made.folder / "data").iterdir()}
    began = time.monotonic()
    assert run_all(made, [FREE, REPLAYED]) == []
    assert time.monotonic() - began < 3
    assert {path: path.stat().st_mtime_ns for path in (made.folder / "data").iterdir()} == before


def test_data_of_another_recipe_are_refused(study):
    made, _ = study
    with pytest.raises(StudyError, match="Give --folder another folder"):
        run_all(replace(made, extra=SHORT | {"steps": 3}), [FREE])


def test_packed_data_are_as_good_as_loose_ones(study, tmp_path):
    """Their runs are not trained again, and those of another recipe are refused."""
    packed = replace(study[0], folder=tmp_path)
    (tmp_path / archive.PACKED).write_bytes(archive.pack(archive.read(study[0].folder)))
    assert run_all(packed, [FREE, REPLAYED]) == [] and list(tmp_path.rglob("*.jsonl")) == []
    with pytest.raises(StudyError, match=r"run gspo_R2\.main.*remove data\.tar\.xz and data/"):
        run_all(replace(packed, extra=SHORT | {"steps": 3}), [REPLAYED])


def test_the_report_is_written(study):
    assert "2 runs" in report.write(study[0].folder)
    assert json.loads((study[0].folder / "findings.json").read_text())["cells"][0]["arm"] == "gspo"
    loose = {path.name: path.read_bytes() for path in (study[0].folder / "data").iterdir()}
    assert archive.unpack((study[0].folder / archive.PACKED).read_bytes()) == loose


def test_a_study_that_is_killed_leaves_no_training_behind(tmp_path):
    """SIGKILL, which nobody can answer: the trainings end with the study."""
    options = ["--folder", str(tmp_path / "report"), "--work", str(tmp_path / "work"), "--slots", "1"]
    command = [sys.executable, "-m", "gspo_megatron.cli", "study", "routing-replay", *options]
    study = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = tmp_path / "work" / "start.main.seed1.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "warm start" in log.read_text()):
        assert time.monotonic() < deadline and study.poll() is None
        time.sleep(0.2)
    trainings = descendants(study.pid)
    assert len(trainings) >= 2  # torchrun and its rank
    study.send_signal(signal.SIGKILL)
    study.wait()
    while any(alive(pid) for pid in trainings):
        assert time.monotonic() < deadline, "a training goes on"
        time.sleep(0.2)


def descendants(pid: int) -> list[int]:
    children = [int(word) for file in Path(f"/proc/{pid}/task").glob("*/children") for word in file.read_text().split()]
    return children + [each for child in children for each in descendants(child)]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
