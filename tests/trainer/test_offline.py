"""Steps on rollouts from files: a run's own files give its steps again, to the bit on the layout that wrote them.

What a bad record is told is in tests/rollout/test_records.py, and what of a recipe is refused in
tests/recipe/test_rollout_files.py.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    Layout,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
    WarmStartConfig,
)
from gspo_megatron.trainer import build
from gspo_megatron.trainer.rl import reinforce
from gspo_megatron.trainer.sft import warm_start
from tools.validation.faults.scenarios import LONG, Whole, result, same
from tools.validation.launching import PYTHON, launched
from tools.validation.ranks import spawn

ONE, PP2, DP2 = (Layout(1, pipeline, None, 1, 1) for pipeline in (1, 2, 1))
CP2 = Layout(1, 1, None, 2, 1, context_parallel_size=2)
LAYOUTS = {"ONE": ONE, "PP2": PP2, "DP2": DP2, "CP2": CP2}
# Some responses to every other question have no reward; a batch of which none has one would be an error.
REWARDS = """
def left_out(text, gold):
    return int(gold) % 4 == 0 and len(text) % 2 == 0

def score(completions, answer, **kwargs):
    return [None if left_out(text, gold) else len(text) + 0.1 for text, gold in zip(completions, answer)]

def letter(completions, answer, **kwargs):
    return [None if left_out(text, gold) else float(text[:1] == gold[:1]) for text, gold in zip(completions, answer)]
"""


def config_in(folder: Path) -> TrainConfig:
    """A recipe with data and rewards in `folder`."""
    rows = ({"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(100))
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    functions = tuple(RewardConfig(f"{folder}/rewards.py:{name}") for name in ("score", "letter"))
    return TrainConfig(
        output_dir=folder / "runs",
        steps=3,
        eval_interval=99,
        device="cpu",
        tasks={
            "sums": TaskConfig(
                data=folder / "sums.jsonl", reward=functions, on_error="drop", system_prompt="Give a number."
            )
        },
        data=DataConfig(num_eval_prompts=4, eval_samples=1, max_prompt_length=96),
        warm_start=WarmStartConfig(steps=1, num_examples=32, batch_size=16),
        rollout=RolloutConfig(num_prompts=4, group_size=4, max_response_length=8, save=1),
        algorithm=AlgorithmConfig(num_minibatches=2, entropy_coef=0.01),
    )


def training(rank: int, world_size: int, config: TrainConfig, layout: Layout) -> None:
    run = build.build_run(config.resolved(layout))
    warm_start(run)
    reinforce(run)
    build.close_run(run)


def train(config: TrainConfig, layout: str = "DP2", steps: int = 3) -> Whole:
    """Train to this step; what the run has left by then."""
    ranks = 1 if layout == "ONE" else 2
    spawn(training, ranks, dataclasses.replace(config, steps=steps), LAYOUTS[layout], timeout=200)
    return result(config.output_dir.parent, config.name, steps)


def replaying(config: TrainConfig, name: str, path: Path, **changes) -> TrainConfig:
    rollout = dataclasses.replace(config.rollout, save=0, engine="files", path=path)
    return dataclasses.replace(config, name=name, rollout=rollout, **changes)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> TrainConfig:
    return config_in(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def recorded(config) -> Whole:
    """Three steps on two data-parallel ranks, written step by step."""
    return train(config)


@pytest.fixture(scope="module")
def rollouts(config, recorded) -> Path:
    return config.output_dir / config.name / "rollouts"


@pytest.mark.slow
def test_a_step_is_written_in_the_order_of_its_prompts(config, rollouts):
    assert sorted(path.name for path in rollouts.iterdir()) == [f"step_00000{step}.jsonl" for step in (1, 2, 3)]
    groups = [json.loads(line) for path in sorted(rollouts.iterdir()) for line in path.read_text().splitlines()]
    assert [group["uid"] for group in groups] == list(range(12))
    assert [group["version"] for group in groups] == [0] * 4 + [1] * 4 + [2] * 4
    responses = [one for group in groups for one in group["responses"]]
    assert len(responses) == 48 and any(one["reward"] is None and one["error"] for one in responses)
    assert all(len(one["logprobs"]) == len(one["token_ids"]) for one in responses)
    assert all(group["columns"]["answer"] == group["answer"] for group in groups)
    assert all(group["prompt"][0] == {"role": "system", "content": "Give a number."} for group in groups)


@pytest.mark.slow
def test_a_runs_own_files_give_its_steps_again_to_the_bit(config, recorded, rollouts):
    same(train(replaying(config, "again", rollouts)), recorded)


@pytest.mark.slow
def test_what_a_file_leaves_out_is_computed(config, recorded, rollouts, tmp_path):
    """Rewards by the task from the file alone, and no log-probs, which recomputed ones do not need: equal weights."""
    for path in rollouts.iterdir():
        with (tmp_path / path.name).open("w") as file:
            for line in path.read_text().splitlines():
                group = json.loads(line)
                for one in group["responses"]:
                    for name in ("reward", "parts", "error", "logprobs"):
                        del one[name]
                file.write(json.dumps(group) + "\n")
    found = train(replaying(config, "bare", tmp_path))
    assert found.digests == recorded.digests
    last, wanted = dict(found.rows[-1]), dict(recorded.rows[-1])
    assert last["mismatch/max"] == 0 < wanted["mismatch/max"]
    for name in ("reward/mean", "reward/left_out", "reward/errors", "reward/sums/letter"):
        assert last[name] == wanted[name]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ONE", "PP2", "CP2"])
def test_another_layout_takes_the_same_steps_up_to_rounding(layout, config, recorded, rollouts):
    found = train(replaying(config, f"on_{layout}", rollouts), layout)
    steps = [(dict(a), dict(b)) for a, b in zip(found.rows, recorded.rows, strict=True) if dict(a).get("loss")]
    assert len(steps) >= 3
    for ours, other in steps:
        assert ours["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert ours.get("reward/mean") == pytest.approx(other.get("reward/mean"), abs=1e-12)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-3)


@pytest.mark.slow
def test_context_parallel_ranks_write_and_read_their_shares(config, tmp_path):
    """Their replicas generate apart and train together; in the file all groups stand in the prompts' order."""
    other = dataclasses.replace(config_in(tmp_path), steps=2)
    whole = train(other, "CP2", 2)
    path = other.output_dir / other.name / "rollouts"
    assert [json.loads(line)["uid"] for line in (path / "step_000002.jsonl").read_text().splitlines()] == [4, 5, 6, 7]
    same(train(replaying(other, "again", path), "CP2", 2), whole)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_next_group(config, recorded, rollouts):
    half = replaying(config, "in_parts", rollouts)
    train(half, steps=1)
    found = train(half)
    assert found.digests == recorded.digests
    assert [dict(row).get("loss") for row in found.rows] == [dict(row).get("loss") for row in recorded.rows]


@pytest.mark.slow
def test_a_run_that_repeats_steps_writes_their_files_again(config, recorded, rollouts, tmp_path):
    """From the checkpoint of step 1 on; the files of later steps are gone before they are written."""
    other = config_in(tmp_path)
    train(other, steps=1)
    run = tmp_path / "runs/moe_gspo"
    for step in (2, 9):
        shutil.copyfile(rollouts / "step_000003.jsonl", run / f"rollouts/step_00000{step}.jsonl")
    (run / "rollouts/step_000002.jsonl.new").touch()
    train(other)
    assert {path.name: path.read_bytes() for path in (run / "rollouts").iterdir()} == {
        path.name: path.read_bytes() for path in rollouts.iterdir()
    }


@pytest.mark.slow
def test_a_bad_group_ends_the_start_with_one_message(rollouts, tmp_path):
    """Through the command line: line 3 of the second step's file, which another rank judges than the first's."""
    lines = (rollouts / "step_000002.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace('"temperature": 1.0', '"temperature": 0.5')
    (tmp_path / "groups").mkdir()
    shutil.copyfile(rollouts / "step_000001.jsonl", tmp_path / "groups/1.jsonl")
    (tmp_path / "groups/2.jsonl").write_text("\n".join(lines))
    config_in(tmp_path)
    (tmp_path / "recipe.yaml").write_text(
        "tasks:\n  sums: {data: sums.jsonl, reward: rewards.py:score, system_prompt: Give a number.}\n"
        "output_dir: runs\ndevice: cpu\nsteps: 2\ndata: {max_prompt_length: 96, num_eval_prompts: 4}\n"
        "warm_start: {steps: 0}\nalgorithm: {num_minibatches: 2}\n"
        "rollout: {num_prompts: 4, group_size: 4, max_response_length: 8, engine: files, path: groups}\n"
    )
    command = [PYTHON, "-m", "gspo_megatron.cli", "train", "recipe.yaml"]
    with launched(command, tmp_path, CUDA_VISIBLE_DEVICES="", NPROC="2") as launch:
        assert launch.wait(LONG) == 2, launch.stderr
    told = [line for line in launch.stderr.splitlines() if "rollout.path" in line]
    assert len(told) == 1 and "Traceback" not in launch.stderr, launch.stderr
    assert f"{tmp_path}/groups/2.jsonl, line 3': sampling.temperature = 0.5 is not rollout.temperature = 1" in told[0]
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))
