"""Every policy-gradient algorithm trains the small task end to end on two pipeline stages, and gets better at it.

One warm start for all, then each starts from its weights. Held-out accuracy is pass@1 over 256 samples (standard error
about 0.03), the same questions and random numbers each time. DPO is in test_preferences_training.py.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import pytest
import torch

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    Layout,
    OptimizerConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
    WarmStartConfig,
)
from gspo_megatron.trainer import build
from gspo_megatron.trainer.evaluation import evaluate
from gspo_megatron.trainer.rl import reinforce
from gspo_megatron.trainer.run import Run
from gspo_megatron.trainer.sft import warm_start
from tools.validation.ranks import spawn

NAMES = ("gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "ppo")
STEPS = 12
CONFIG = TrainConfig(
    steps=STEPS,
    eval_interval=STEPS,
    tasks={"spell_backward": TaskConfig(options={"min_word_len": 3, "max_word_len": 3})},
    data=DataConfig(max_prompt_length=64, num_eval_prompts=64, eval_samples=4),
    warm_start=WarmStartConfig(steps=200, batch_size=64, eval_interval=5, stop_accuracy=0.2),
    rollout=RolloutConfig(num_prompts=48, group_size=8, max_response_length=6),
    optimizer=OptimizerConfig(lr=2e-4, warmup_steps=4),
).resolved(Layout(1, 2, None, 1, 1))


class Rows:
    """A Reporter that keeps the metric rows."""

    error = None

    def __init__(self):
        self.rows: list[dict] = []

    def row(self, row: dict) -> None:
        self.rows.append(row)

    def ignore(self, *args) -> None:
        """Progress, notes and samples are for people."""

    phase = note = sample = tell = close = ignore

    def scored(self, total: int) -> Callable[[int], None]:
        return self.ignore


def learn(rank: int, world_size: int, folder: str) -> dict:
    """{algorithm: its metric rows} and the accuracy that all start from."""
    config = dataclasses.replace(CONFIG, output_dir=Path(folder))
    run = build.build_run(config)
    run.reporter.close()
    run.reporter = Rows()
    warm_start(run)
    weights = [p for model in run.policy.models for p in model.parameters()]
    start = [w.detach().clone() for w in weights]
    results = {"start": evaluate(run, "rl", 0)["eval/accuracy"]}
    for name in NAMES:
        with torch.no_grad():
            for weight, value in zip(weights, start, strict=True):
                weight.copy_(value)
        results[name] = rows_of(run, dataclasses.replace(config, algorithm=AlgorithmConfig(name=name).resolved()))
    build.close_run(run)
    return results


def rows_of(run: Run, config: TrainConfig) -> list[dict]:
    run.config = run.policy.config = config
    run.prompts.position, run.reporter, run.reference = 0, Rows(), None
    reinforce(run)
    return run.reporter.rows


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    return spawn(learn, 2, str(tmp_path_factory.mktemp("runs")), timeout=280)[0]


@pytest.mark.parametrize("name", NAMES)
def test_reward_and_held_out_accuracy_rise(results, name):
    """The mean reward of a step's 384 responses has a standard error of about 0.02, that of four steps half of it; 0.03
    is two of the difference of two such means. The first row is the evaluation that all share."""
    before, *steps = results[name]
    assert before["eval/accuracy"] == results["start"]
    rewards = [row["reward/mean"] for row in steps]
    assert fmean(rewards[-4:]) > fmean(rewards[:4]) + 0.03
    assert steps[-1]["eval/accuracy"] > results["start"]
    assert all(row["update/skipped"] == 0 for row in steps)


def test_each_took_a_way_of_its_own(results):
    """Same questions and samples in the first step; then the algorithms part. GSPO and GSPO-token may not: they are the
    same where all tokens share an advantage."""
    first = {name: results[name][1]["reward/mean"] for name in NAMES if name != "dapo"}
    assert len(set(first.values())) == 1
    last = {name: results[name][-1]["grad_norm"] for name in NAMES}
    assert last["gspo"] == pytest.approx(last["gspo_token"], rel=1e-3)
    assert len({round(value, 6) for name, value in last.items() if name != "gspo_token"}) == len(NAMES) - 1


def test_what_only_some_of_them_do(results):
    """GRPO and PPO compare with a reference, DAPO samples anew; nobody else does."""
    for name in NAMES:
        row = results[name][-1]
        assert (row["kl/ref"] != 0) == (name in ("grpo", "ppo"))
        assert ("sampling/rounds" in row) == (name == "dapo")
    assert any(row["sampling/rounds"] > 1 for row in results["dapo"][1:])
    token, sequence = results["grpo"][-1]["clip/token"], results["gspo"][-1]["clip/token"]
    assert token < 0.2 < sequence  # the range of a sequence ratio is a thousand times narrower


def test_the_critic_learns_the_returns(results):
    """Its value starts at 0, so its loss starts at half the mean squared return; it falls by a third at least. (In
    twelve steps that is the returns' mean; telling good responses from bad ones takes longer.)"""
    losses = [row["value/loss"] for row in results["ppo"][1:]]
    assert fmean(losses[-3:]) < 0.67 * losses[0]
