"""Epochs become steps: by hand, and of the rows that are left once long prompts are dropped; in a real run, too."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml

from gspo_megatron.backend.parallel import topology
from gspo_megatron.config import (
    AlgorithmConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ResolvedConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
    WarmStartConfig,
)
from gspo_megatron.errors import ConfigError
from gspo_megatron.metrics.tracker import read_metrics
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.trainer import build
from gspo_megatron.trainer.epochs import Epochs
from gspo_megatron.trainer.finish import finish
from gspo_megatron.trainer.gspo_trainer import GspoTrainer
from gspo_megatron.trainer.rl import reinforce
from tests.backend.small import CONFIG_PATH, SINGLE
from tools.validation.ranks import spawn


@pytest.mark.parametrize(
    ("number", "rows", "steps"),
    [(1, 8, 2), (2, 9, 5), (1, 9, 3), (3, 1, 1), (5, 1, 2), (2, 4, 2)],  # of 4 prompts: 18 / 4 = 4.5 are 5 steps
)
def test_steps_by_hand(number, rows, steps):
    assert Epochs(number, rows).steps(4) == steps


def recipe(folder: Path, number: int | None = 2) -> ResolvedConfig:
    """Ten rows to train on, of which row 4 is too long, and one held out. The learning rate falls to 0 at the end."""
    rows = [f"What is {i}?" + " Think long." * 20 * (i == 4) for i in range(10)]
    for name, prompts in (("train", rows), ("test", ["What is 11?"])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    (folder / "rewards.py").write_text("def length(completions, **kwargs):\n    return [len(c) for c in completions]\n")
    rewards = (RewardConfig(f"{folder}/rewards.py:length"),)
    task = TaskConfig(data=folder / "train.jsonl", eval_data=folder / "test.jsonl", reward=rewards, overlong="drop")
    return TrainConfig(
        num_epochs=number,
        tasks={"sums": task},
        output_dir=folder / "runs",
        device="cpu",
        model=dataclasses.replace(TrainConfig().model, hf_config=CONFIG_PATH),
        data=DataConfig(num_eval_prompts=1, eval_samples=1, max_prompt_length=96),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(num_prompts=4, group_size=2, max_response_length=4, save=1),
        algorithm=AlgorithmConfig(num_minibatches=1),
        optimizer=OptimizerConfig(warmup_steps=1, lr_decay_style="linear"),
        checkpoint=CheckpointConfig(interval=1, keep_last=9),
    ).resolved(SINGLE)


def test_rows_are_those_that_are_left_to_train_on(tmp_path):
    """One of ten is dropped: 2 epochs of 9 rows are 5 steps of 4 prompts, and those prompts hold each row twice."""
    config = recipe(tmp_path)
    mixture = TaskMixture(config.tasks, config.seed)
    mixture.data["sums"].keep([place != 4 for place in range(11)])
    epochs = Epochs.of(config, mixture)
    assert epochs == Epochs(2, 9)
    made = epochs.resolved(config)
    assert made == dataclasses.replace(config, steps=5, num_epochs=None)
    assert epochs.described(made) == "5: 2 epochs of 9 rows, 4 prompts a step"
    drawn = [mixture.item("train", uid).question for uid in range(5 * 4)]
    assert {drawn[:18].count(question) for question in drawn} == {2} and len(set(drawn)) == 9


def test_a_recipe_of_steps_is_left_as_it_is(tmp_path):
    config = recipe(tmp_path, None)
    assert Epochs.of(config, TaskMixture(config.tasks, config.seed)) is None


def test_more_steps_than_can_be_counted_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="^num_epochs = 1000000: 8,590,000 rows are .* Give a smaller number"):
        Epochs(1_000_000, 8_590_000).resolved(recipe(tmp_path))


def test_a_trainer_without_data_has_no_epochs(tmp_path):
    with pytest.raises(ConfigError, match="^num_epochs = 2: counts rows of data, which a trainer does not read"):
        GspoTrainer(recipe(tmp_path), model=tmp_path)


def started(config: ResolvedConfig) -> dict:
    """A whole start, as trainer/train.py makes it: what its folder then holds, without clocks."""
    run = build.build_run(config)
    reinforce(run)
    finish(run)
    run.reporter.close()
    run.mixture.close()
    run.hold.close()
    topology.destroy_model_parallel()
    clocks = ("time/", "perf/")
    rows = [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(run.folder)]
    manifest = json.loads((run.folder / "checkpoints/step_000005/manifest.json").read_text())["files"]
    digests = {name: entry[1] for name, entry in manifest.items() if name.endswith(".distcp")}
    return {"rows": rows, "digests": digests, "steps": run.config.steps, "began": run.resumed and run.resumed.step}


def three_starts(rank: int, world_size: int, folder: Path) -> list:
    """Whole; after the loss of its end and of two checkpoints; and once more."""
    config = recipe(folder)
    found = [started(config)]
    for step in (4, 5):
        shutil.rmtree(folder / f"runs/moe_gspo/checkpoints/step_{step:06d}")
    (folder / "runs/moe_gspo/finished.json").unlink()
    found.append(started(config))
    try:
        started(config)
    except build.AlreadyFinished as finished:
        found.append(str(finished))
    return found


def test_a_resumed_run_comes_to_the_same_end(tmp_path):
    """2 epochs of 9 rows are 5 steps of 4 prompts, the first 18 of which hold each row twice. A learning rate over any
    other number of steps would give other weights, and the resumed run has the same ones to the bit."""
    (whole, resumed, third) = spawn(three_starts, 1, tmp_path, timeout=280)[0]
    assert whole["steps"] == resumed["steps"] == 5 and (whole["began"], resumed["began"]) == (None, 3)
    assert whole["digests"] == resumed["digests"] and whole["digests"]
    assert whole["rows"] == resumed["rows"] and whole["rows"][-1]["lr"] < whole["rows"][-2]["lr"]
    run = tmp_path / "runs/moe_gspo"
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert (saved["steps"], saved["num_epochs"]) == (5, None)
    groups = [json.loads(line) for path in sorted(run.glob("rollouts/*.jsonl")) for line in path.open()]
    prompts = [json.dumps(group["prompt"]) for group in groups]
    assert len(prompts) == 20 and sorted(map(prompts[:18].count, set(prompts))) == [2] * 9
    assert third == f"{run} is finished. Give --resume never to train anew, or more steps or epochs to go on."
