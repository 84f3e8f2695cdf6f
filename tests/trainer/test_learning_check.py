"""Data, rewards and environments of one's own teach the model, in short: the check of `gspo-megatron check-learning`.

Held-out accuracy (the share of rewards of 1) must rise by more than 0.03 and by more than twice its standard error, the
training reward from its first quarter to its last. tools/validation/your_data.py does so with the recipes of the guides
and three seeds each, which takes an hour.

With shuffled advantages (`recipe(..., control=True)`) neither passes, for accuracy moves by -0.098 and -0.039 and the
reward falls.
"""

import json
import random
from pathlib import Path

import pytest

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    Layout,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
    WarmStartConfig,
)
from gspo_megatron.metrics.learning import failures, summarise
from gspo_megatron.trainer import build
from gspo_megatron.trainer.rl import reinforce
from gspo_megatron.trainer.sft import warm_start
from tools.validation.ranks import spawn
from tools.validation.your_data import is_complete, least_rise, row

# Four letters are given, the last of them in the alphabet is asked for.
CODE = """
def exact(completions, answer, **columns):
    return [float(text.strip() == gold) for text, gold in zip(completions, answer)]

class Twice:
    def reset(self, answer, **columns):
        self.answer, self.turns, self.last = answer, 0, 0.0

    def step(self, text):
        self.turns += 1
        self.last = float(text.strip() == self.answer)
        return "no", self.last == 1.0

    def get_reward(self):
        return self.last - 0.25 * (self.turns - 1)
"""


def recipe(folder: Path, task: TaskConfig, tokens: int, control: bool = False) -> TrainConfig:
    """A recipe with questions, rewards and an environment in `folder`; `tokens`: of a response."""
    draw = random.Random(1)
    questions = dict.fromkeys("".join(draw.choices("abcdefgh", k=4)) for _ in range(2500))
    rows = [json.dumps({"prompt": one, "answer": max(one)}) for one in questions]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "mine.py").write_text(CODE)
    return TrainConfig(
        output_dir=folder,
        name="run",
        steps=8,
        eval_interval=8,
        device="cpu",
        tasks={"letters": task},
        data=DataConfig(max_prompt_length=24, num_eval_prompts=256, eval_samples=2),
        warm_start=WarmStartConfig(steps=60, batch_size=64, eval_interval=5, stop_accuracy=0.2, num_examples=1000),
        rollout=RolloutConfig(num_prompts=32, group_size=8, max_response_length=tokens),
        algorithm=AlgorithmConfig(shuffle_advantages=control),
        optimizer=OptimizerConfig(lr=5e-4, warmup_steps=2),
    )


def task(folder: Path, kind: str) -> TaskConfig:
    data = folder / "rows.jsonl"
    if kind == "data":
        return TaskConfig(data=data, reward=(RewardConfig(f"{folder}/mine.py:exact"),))
    return TaskConfig(data=data, environment=f"{folder}/mine.py:Twice", max_turns=2)


def train(rank: int, world_size: int, config: TrainConfig) -> None:
    run = build.build_run(config.resolved(Layout(1, 1, None, 1, 1)))
    warm_start(run)
    reinforce(run)
    build.close_run(run)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tokens"), [("data", 2), ("episodes", 12)])
def test_held_out_reward_rises(kind, tokens, tmp_path):
    spawn(train, 1, recipe(tmp_path, task(tmp_path, kind), tokens), timeout=280)
    report = summarise(tmp_path / "run")
    assert not report.control and 0 < report.start < 0.5
    assert failures(report, min_rise=least_rise(report)) == []
    line, passes = row(Path("mine.yaml"), 1, tmp_path / "run")
    assert passes and line.startswith(f"| mine | 1 | {report.start:.3f} | {report.final:.3f} | {report.rise:+.3f}, ")
    assert line.endswith(" | pass |") and is_complete(tmp_path / "run") and (" | - | pass" in line) == (kind == "data")
