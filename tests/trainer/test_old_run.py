"""A run folder that version 0.1.0 wrote goes on today: its recipe, record and checkpoint are read as they are.

tests/data/run_0_1_0 is a tiny GSPO run on two pipeline stages, ended after two RL steps; step_3.json is the row that
version 0.1.0 itself wrote for its third step, on one rank. A change of a file format shows here.

That version drew the numbers of a step's responses from one generator, as a matrix of rows and places; today each comes
from the response's seed. So the two functions that make seeds and numbers are replaced by that matrix here, for the
samples to be the old ones, and everything else is today's.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from gspo_megatron.metrics.tracker import read_metrics
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.rollout import random_numbers
from gspo_megatron.trainer.train import train
from tools.validation.launching import ROOT
from tools.validation.ranks import spawn

LIMIT = 6  # rollout.max_response_length
OLD = ROOT / "tests/data/run_0_1_0"
NEW_METRICS = {"reward/equal_groups", "eval/reward"}
ONE_RANK = ("--steps", "3", "--device", "cpu", "--parallel.pipeline-model-parallel-size", "1")


class OldNumbers:
    """What version 0.1.0 drew from: of each step or evaluation a matrix [responses, LIMIT], its rows in the order of
    the prompts. A seed is a number in `places`."""

    def __init__(self) -> None:
        self.rows: dict[int, list[tuple[int, int]]] = {}  # by the step's seed: (uid, response)
        self.places: list[tuple[int, int]] = []  # (the step's seed, row)

    def response_seed(self, seed: int, uid: int, number: int) -> int:
        rows = self.rows.setdefault(seed, [])
        if (uid, number) not in rows:  # a greedy evaluation asks for those of the sampled one again
            rows.append((uid, number))
        self.places.append((seed, rows.index((uid, number))))
        return len(self.places) - 1

    def uniforms(self, seeds: torch.Tensor, place: int) -> torch.Tensor:
        return torch.stack([self.matrix(step)[row, place] for step, row in (self.places[i] for i in seeds.tolist())])

    def matrix(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(len(self.rows[seed]), LIMIT, generator=generator, dtype=torch.float64)


def go_on(rank: int, world_size: int, folder: Path) -> None:
    old = OldNumbers()
    random_numbers.response_seed, random_numbers.uniforms = old.response_seed, old.uniforms
    config = load_recipe([str(folder / "runs/tiny/config.yaml"), "--output-dir", str(folder / "runs"), *ONE_RANK])
    train(config, resolve_layout(config, world_size, has_cuda=False))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("old")
    shutil.copytree(OLD, folder / "runs/tiny")
    recipe = folder / "runs/tiny/config.yaml"
    recipe.write_text(recipe.read_text().replace("hf_config: model.json", f"hf_config: {OLD / 'model.json'}"))
    spawn(go_on, 1, folder)
    return read_metrics(folder / "runs/tiny")


def test_the_old_record_is_kept(rows):
    """120 rows of the warm start, the one before RL, and two RL steps; the third step is new."""
    assert rows[:-1] == [json.loads(line) for line in (OLD / "metrics.jsonl").open()]
    assert [row["step"] for row in rows if row["phase"] == "rl"] == [0, 1, 2, 3]


def test_the_next_step_is_the_old_version_s(rows):
    """One row, and every number in it but clocks: fp32 sums in another order on another processor differ by 1e-5."""
    new, old = rows[-1], json.loads((OLD / "step_3.json").read_text())
    assert set(new) - set(old) == NEW_METRICS and set(old) <= set(new)
    for name, value in old.items():
        if name.startswith(("time/", "perf/")):
            continue
        assert new[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-6)), name
