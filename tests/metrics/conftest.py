"""Run folders written by hand, so that the readers are tested without the writer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """write_run(rows, config, name) -> a run folder below tmp_path; config None leaves config.yaml out."""

    def write(rows: list[dict], config: dict | None = None, name: str = "run") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return write


@pytest.fixture
def write_learning_run(write_run: Callable[..., Path]) -> Callable[..., Path]:
    """A complete run of 8 RL steps: accuracy 0.25 -> 0.5 (at step 4) -> 0.375, six evaluations in the warm start."""

    def write(final: float = 0.375, shuffled: bool = False, planned: int = 8, name: str = "run") -> Path:
        warm = [{"phase": "warm_start", "step": step, "time/step": 3.0} for step in range(1, 61)]
        for step, accuracy in ((10, 0.05), (20, 0.1), (30, 0.15), (40, 0.2), (50, 0.22), (60, 0.25)):
            warm[step - 1] |= {"eval/accuracy": accuracy, "time/eval": 10.0}
        rl: list[dict] = [{"phase": "rl", "step": 0, "eval/accuracy": 0.25, "eval/num": 48, "time/eval": 12.0}]
        rl[0]["eval/accuracy_greedy"] = 0.25
        for step in range(1, 9):
            rl.append({"phase": "rl", "step": step, "reward/mean": step / 10, "time/step": 30.0})
        rl[4] |= {"eval/accuracy": 0.5, "eval/num": 48}
        rl[8] |= {"eval/accuracy": final, "eval/accuracy_greedy": 0.625, "eval/num": 48, "time/eval": 48.0}
        config = {"seed": 7, "steps": planned, "algorithm": {"shuffle_advantages": shuffled}}
        return write_run(warm + rl, config, name)

    return write
