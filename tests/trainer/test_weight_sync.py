"""Who samples has the weights of the moment, at every request of a run: in the warm start, in RL, in evaluations, and
where a run goes on."""

import dataclasses
from pathlib import Path

import pytest
import torch

from gspo_megatron.batch import Completion
from gspo_megatron.config import DataConfig, Layout, RolloutConfig, TrainConfig, WarmStartConfig
from gspo_megatron.metrics.tracker import read_metrics
from gspo_megatron.rollout.megatron_engine import MegatronEngine
from gspo_megatron.rollout.sampler import SampleRequest
from gspo_megatron.rollout.sampling import SamplingParams
from gspo_megatron.trainer import build
from gspo_megatron.trainer.rl import reinforce
from gspo_megatron.trainer.sft import warm_start
from tools.validation.ranks import spawn

CONFIG = TrainConfig(
    steps=2,
    eval_interval=2,
    device="cpu",
    warm_start=WarmStartConfig(steps=2, num_examples=32, batch_size=8, eval_interval=1),
    data=DataConfig(max_prompt_length=64, num_eval_prompts=4, eval_samples=1),
    rollout=RolloutConfig(num_prompts=4, group_size=4, max_response_length=4),
    max_tokens_per_microbatch=512,
)


class Remote:
    """It samples by the training engine, and knows of the weights what a sync has brought it."""

    def __init__(self, engine: MegatronEngine):
        self.engine, self.events, self.brought = engine, [], None

    @property
    def version(self) -> int:
        return self.engine.version

    def sync(self, version: int) -> dict[str, float]:
        self.engine.sync(version)
        self.brought = self.sum()
        self.events.append(f"sync {version}")
        return {"sync/version": float(version)}

    def sample(self, requests: list[SampleRequest], params: SamplingParams) -> list[list[Completion]]:
        fresh = "fresh" if self.sum() == self.brought else "stale"
        self.events.append(f"{fresh} {self.version} {'greedy' if params.greedy else len(requests[0].seeds)}")
        return self.engine.sample(requests, params)

    def sum(self) -> float:
        """A number of all weights, to the bit."""
        parameters = [p.detach().double() for model in self.engine.policy.models for p in model.parameters()]
        return float(torch.stack([p.sin().sum() for p in parameters]).sum())


def start(config: TrainConfig) -> list[str]:
    run = build.build_run(config.resolved(Layout(1, 1, None, 1, 1)))
    run.sampler = run.weight_sync = remote = Remote(run.sampler)
    warm_start(run)
    reinforce(run)
    build.close_run(run)
    return remote.events


def two_starts(rank: int, world_size: int, folder: Path) -> list[list[str]]:
    config = dataclasses.replace(CONFIG, output_dir=folder)
    return [start(config), start(dataclasses.replace(config, steps=4))]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[list[list[str]], list[dict]]:
    folder = tmp_path_factory.mktemp("runs")
    return spawn(two_starts, 1, folder)[0], read_metrics(folder / CONFIG.name)


def evaluation(version: int) -> list[str]:
    return [f"sync {version}", f"fresh {version} 1", f"fresh {version} greedy"]


def rollout(version: int) -> list[str]:
    return [f"sync {version}", f"fresh {version} 4"]


def test_weights_come_before_the_first_request_after_an_update(made):
    """No step of the warm start counts, though its weights change; step s samples with those of s - 1 steps."""
    warm = [*evaluation(0), *evaluation(0)]
    assert made[0][0] == [*warm, *evaluation(0), *rollout(0), *rollout(1), *evaluation(2)]


def test_a_run_that_goes_on_brings_the_version_that_it_goes_on_from(made):
    assert made[0][1] == [*rollout(2), *rollout(3), *evaluation(4)]


def test_metrics_of_a_sync_are_in_the_row_of_its_step(made):
    """Where both a step's rollout and its evaluation sync, the later one's."""
    found = [(row["phase"], row["step"], row["sync/version"]) for row in made[1]]
    expected = [("warm_start", 1, 0), ("warm_start", 2, 0)]
    assert found == [*expected, ("rl", 0, 0), ("rl", 1, 0), ("rl", 2, 2), ("rl", 3, 2), ("rl", 4, 4)]
