"""Trainings on a real Slurm of two virtual nodes: a job that finishes, and one that meets what jobs meet.

The second job is preempted, loses a node and runs into its time limit, one after the other. Its weights and its record
must be those of the first one, to the bit.
"""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gspo_megatron.cli import main
from gspo_megatron.metrics.tracker import read_metrics
from tests.slurm.cluster import STOPPED, Cluster, cluster, missing
from tools.validation.launching import ROOT, wait_until

STEPS = 40  # long enough for Slurm, which looks at time limits every 30 s
LIMIT = 120  # seconds for what takes 10 to 40 on an idle machine
SIZES = [
    "--device", "cpu", "--parallel.pipeline-model-parallel-size", "2", "--parallel.expert-model-parallel-size", "1",
    "--parallel.tensor-model-parallel-size", "1", "--steps", str(STEPS), "--eval-interval", "999",
    "--warm-start.steps", "1", "--warm-start.num-examples", "32", "--warm-start.batch-size", "16",
    "--data.num-eval-prompts", "4", "--data.eval-samples", "1", "--rollout.num-prompts", "4",
    "--rollout.group-size", "4", "--rollout.max-response-length", "8", "--algorithm.entropy-coef", "0.01",
    "--checkpoint.no-keep-best",
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(  # CI installs it, and must not pass without
        bool(missing()) and os.environ.get("GSPO_MEGATRON_SLURM") != "1",
        reason=f"no Slurm here: {', '.join(missing())} not found (docs/slurm.md)",
    ),
]


@pytest.fixture(scope="module")
def slurm():
    with cluster() as running:
        yield running


@pytest.fixture(scope="module")
def finished(slurm, tmp_path_factory) -> Path:
    """The folder of a job that nothing happened to."""
    folder = tmp_path_factory.mktemp("finished")
    job = submit(slurm, folder)
    wait(slurm, folder, job, lambda: slurm.state(job) in STOPPED, 2 * LIMIT)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("COMPLETED", "0"), logs(folder)
    return folder


def submit(slurm: Cluster, folder: Path) -> str:
    """Write a script as users do, and submit it. `grace`: seconds. Returns the job's number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert (
            main.main(
                [
                    "slurm",
                    str(ROOT / "examples/recipes/moe_gspo.yaml"),
                    "--nodes",
                    "2",
                    "--ranks-per-node",
                    "1",
                    "--max-restarts",
                    "1",
                    "--time",
                    "01:00:00",
                    "--grace",
                    "75",
                    *SIZES,
                ]
            )
            == 0
        )
    return slurm.submit(folder / "moe_gspo.sbatch", cwd=folder)


def steps(folder: Path) -> int:
    """That the run has recorded."""
    return sum(path.read_text().count('"phase": "rl"') for path in folder.glob("runs/*/metrics.jsonl"))


def logs(folder: Path) -> str:
    return "\n".join(f"---- {path.name}\n{path.read_text()[-4000:]}" for path in sorted(folder.glob("logs/*.log")))


def wait(slurm: Cluster, folder: Path, job: str, condition: Callable[[], bool], within: float) -> None:
    assert wait_until(condition, within), f"{slurm.job(job)}\n{logs(folder)}\n{slurm.log()}"


def tensors(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of tensors in the last checkpoint."""
    manifest = json.loads((folder / f"runs/moe_gspo/checkpoints/step_{STEPS:06d}/manifest.json").read_text())["files"]
    return {name: entry[1] for name, entry in manifest.items() if name.endswith(".distcp")}


def record(folder: Path) -> list[tuple]:
    return [
        tuple((k, v) for k, v in row.items() if not k.startswith(("time/", "perf/")))
        for row in read_metrics(folder / "runs/moe_gspo")
    ]


def test_the_job_finishes_with_a_log_for_each_node(finished):
    assert len(tensors(finished)) == 4
    assert len(record(finished)) == 1 + 1 + STEPS
    names = sorted(re.sub(r"-\d+", "", path.name, count=1) for path in finished.glob("logs/*"))
    host = socket.gethostname().split(".")[0]  # of both virtual nodes
    assert names == [f"moe_gspo-0-{host}.log", f"moe_gspo-1-{host}.log", "moe_gspo.log"]
    assert "ended with status 0" in logs(finished)


def test_convert_sbatch_writes_a_hugging_face_folder(slurm, finished, tmp_path):
    (tmp_path / ".venv").symlink_to(sys.prefix)  # the script's, of the folder where it is submitted
    source = finished / f"runs/moe_gspo/checkpoints/step_{STEPS:06d}"
    (tmp_path / "logs").mkdir()
    job = slurm.call(
        "sbatch", "--parsable", str(ROOT / "examples/slurm/convert.sbatch"), str(source), "hf", cwd=tmp_path
    )
    wait(slurm, tmp_path, job, lambda: slurm.state(job) in STOPPED, LIMIT)
    assert slurm.state(job) == "COMPLETED", logs(tmp_path)
    assert (tmp_path / "hf/config.json").is_file() and list((tmp_path / "hf").glob("*.safetensors"))


def test_preempted_then_without_a_node_then_out_of_time(slurm, finished, tmp_path):
    job = submit(slurm, tmp_path)
    folder = tmp_path

    def in_start(number: int, after: int) -> Callable[[], bool]:
        return lambda: slurm.job(job)["Restarts"] == str(number) and steps(folder) > after

    wait(slurm, folder, job, in_start(0, 1), LIMIT)
    other = slurm.call("sbatch", "--parsable", "-p", "high", "-N2", "-o", "/dev/null", "--wrap", "sleep 1", cwd=folder)
    wait(slurm, folder, job, lambda: slurm.state(other) == "COMPLETED", LIMIT)
    assert slurm.state(job) != "COMPLETED"
    before = steps(folder)
    wait(slurm, folder, job, in_start(1, before), LIMIT)

    slurm.lose_node("node2")
    began = time.monotonic()
    wait(slurm, folder, job, lambda: "down" in " ".join(slurm.states()), LIMIT)
    print(f"node called down after {time.monotonic() - began:.0f} s")
    slurm.start_node("node2")
    wait(slurm, folder, job, in_start(2, 0), LIMIT)
    slurm.end_lost_sruns()
    wait(slurm, folder, job, in_start(2, before + 1), LIMIT)

    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=2")
    wait(slurm, folder, job, in_start(3, 0), LIMIT)
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait(slurm, folder, job, lambda: slurm.state(job) in STOPPED, 2 * LIMIT)
    assert (slurm.job(job)["JobState"], slurm.job(job)["Restarts"]) == ("COMPLETED", "3"), logs(folder)
    assert tensors(folder) == tensors(finished)
    assert record(folder) == record(finished)
