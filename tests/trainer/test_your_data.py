"""Trainings of the command line on data and rewards of a user's own, as they have them for TRL and verl.

docs/your_data.md is the guide; what single parts do is in tests/tasks/.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest

from gspo_megatron.metrics.tracker import read_metrics
from tools.validation.faults.scenarios import LONG, result, same
from tools.validation.launching import PYTHON, ROOT, Launch, launched

TINY = f"""
output_dir: runs
device: cpu
eval_interval: 99
model: {{hf_config: {ROOT}/examples/models/qwen3_moe_tiny/config.json}}
data: {{num_eval_prompts: 8, eval_samples: 1, max_prompt_length: 96}}
warm_start: {{steps: 1, num_examples: 32, batch_size: 16}}
rollout: {{num_prompts: 4, group_size: 4, max_response_length: 8}}
algorithm: {{num_minibatches: 2, entropy_coef: 0.01}}
"""
# TRL's form, as one of its users wrote it.
TRL = """
def length(completions, **kwargs):
    return [float(len(text)) for text in completions]

async def same_letter(prompts, completions, answer, **kwargs):
    assert all(prompt.startswith("What is") for prompt in prompts)
    return [1.0 if text[:1] == gold[:1] else None for text, gold in zip(completions, answer)]
"""
# verl's form.
VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and isinstance(solution_str, str) and extra_info["index"] >= 0
    return {"score": 2.0 + 0.5 * (ground_truth in solution_str), "format": "\\n" not in solution_str}
"""


def write_jsonl(folder: Path, number: int = 100) -> None:
    rows = ({"prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(number))
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def train(folder: Path, tasks: str, steps: int, ranks: int, *options: str) -> Iterator[Launch]:
    (folder / "recipe.yaml").write_text(f"tasks:\n{tasks}\n{TINY}")
    command = [PYTHON, "-m", "gspo_megatron.cli", "train", "recipe.yaml", "--steps", str(steps), *options]
    with launched(command, folder, CUDA_VISIBLE_DEVICES="", NPROC=str(ranks)) as launch:
        yield launch


def test_trl_rewards_and_a_resumed_run_goes_on_with_the_next_row(tmp_path):
    """Four steps in one go, and two and two: rows are shuffled, so another order would be other weights. With weights
    0.5 and 2, the mean reward is 0.5 times the mean length where the first letter never fits."""
    tasks = """
  sums:
    data: sums.jsonl
    reward: [{function: "rewards.py:length", weight: 0.5}, {function: "rewards.py:same_letter", weight: 2.0}]"""
    found = []
    for name, parts in (("whole", [4]), ("parts", [2, 4])):
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder)
        (folder / "rewards.py").write_text(TRL)
        for steps in parts:
            with train(folder, tasks, steps, 2, "--name", "sums") as launch:
                assert launch.wait(LONG) == 0, launch.stderr
        found.append(result(folder, "sums", 4))
    assert "goes on after rl step 2" in launch.stdout and "an eighth" not in launch.stderr
    assert found[0].digests == found[1].digests
    rows = [dict(row) for row in found[0].rows]
    # Evaluated at the end of either start; all else is the same.
    assert [{k: v for k, v in dict(row).items() if not k.startswith("eval/")} for row in found[1].rows] == [
        {k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows
    ]
    for row in rows[-4:]:
        assert row["reward/sums/length"] > 0 and row["reward/errors"] == row["reward/left_out"] == 0
        if "reward/sums/same_letter" not in row:
            assert row["reward/mean"] == pytest.approx(0.5 * row["reward/sums/length"])
    assert "eval/reward" in rows[-1] and rows[-1]["eval/num"] == 8
    assert json.loads((folder / "runs/sums/data.json").read_text())["sums"]["rows"] == 100


def test_verls_parquet_and_compute_score_as_they_are(tmp_path):
    """The score is 2 or 2.5, above 1: it is not cut, and all of them are right."""
    rows = [
        {
            "data_source": "sums",
            "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"split": "train", "index": i},
        }
        for i in range(100)
    ]
    for name, part in (("train", rows[:80]), ("test", rows[80:])):
        datasets.Dataset.from_list(part).to_parquet(str(tmp_path / f"{name}.parquet"))
    (tmp_path / "rewards.py").write_text(VERL)
    tasks = """
  sums: {data: train.parquet, eval_data: test.parquet, reward: "rewards.py:compute_score"}"""
    with train(tmp_path, tasks, 2, 1) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    last = read_metrics(tmp_path / "runs/moe_gspo")[-1]
    assert 2.0 <= last["reward/mean"] <= 2.5 and last["reward/mean"] == last["reward/sums/compute_score"]
    assert 0.0 <= last["reward/sums/compute_score/format"] <= 1.0
    assert last["eval/accuracy"] == 1.0 and 2.0 <= last["eval/reward"] <= 2.5


# Of 16 responses of a step, those with these numbers meet a fault each.
FAULTY = """
import os, sys, time
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    calls = compute_score.calls = getattr(compute_score, "calls", -1) + 1
    kind = calls % 16
    if kind == 0: raise KeyError("no such key")
    if kind == 1: return None
    if kind == 2: return float("nan")
    if kind == 3: return float("-inf")
    if kind == 4: return [[1.0]]
    if kind == 5: print("print", "{\\"score\\": 1}", flush=True); print("x" * 1000)
    if kind == 6: return "a word"
    if kind == 7: sys.exit(3)
    if kind == 8 and os.fork() == 0: return 0.25
    return 1.0 + kind
"""


@pytest.mark.parametrize("ranks", [1, 4])
def test_faults_of_a_reward_are_counted_and_nothing_is_lost(tmp_path, ranks):
    """Kinds 0 to 4, 6 and 7 are errors: 7 of the first 16 responses that a process scores, whoever is held out. The
    responses are left out, so the smallest reward that counts is that of kind 5, and no reward is 0."""
    write_jsonl(tmp_path)
    (tmp_path / "rewards.py").write_text(FAULTY)
    tasks = """
  sums: {data: sums.jsonl, reward: "rewards.py:compute_score", on_error: drop}"""
    with train(tmp_path, tasks, 2, ranks, "--data.num-eval-prompts", "16") as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    rows = [row for row in read_metrics(tmp_path / "runs/moe_gspo") if row["phase"] == "rl" and row["step"]]
    assert len(rows) == 2
    for row in rows:
        assert row["reward/errors"] == row["reward/left_out"] == 7
        assert row["reward/mean"] == pytest.approx(sum(1.0 + kind for kind in (5, 8, *range(9, 16))) / 9)


def test_a_reward_that_hangs_costs_its_response_and_one_that_always_fails_ends_the_run(tmp_path):
    write_jsonl(tmp_path)
    (tmp_path / "rewards.py").write_text(
        "import time\n"
        "def hangs(completions, **kwargs):\n"
        "    if len(completions) > 1 or len(completions[0]) % 3 == 1: time.sleep(1000)\n"
        "    return [1.0]\n"
        "def short(completions, **kwargs):\n"
        "    return [0.0]\n"
    )
    tasks = """
  sums: {{data: sums.jsonl, reward: "rewards.py:{}"}}"""
    options = ("--faults.reward-timeout", "0.5", "--warm-start.steps", "0", "--data.num-eval-prompts", "1")
    with train(tmp_path, tasks.format("hangs"), 1, 1, *options) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    last = read_metrics(tmp_path / "runs/moe_gspo")[-1]
    assert 0 <= last["reward/errors"] < 16 and last["reward/left_out"] == 0
    with train(tmp_path, tasks.format("short"), 1, 4, *options, "--name", "short") as launch:
        assert launch.wait(LONG) == 2
    told = [line for line in launch.stderr.splitlines() if "rewards.py:short" in line]
    assert len(told) == 1 and "Traceback" not in launch.stderr, launch.stderr
    assert "on each of" in told[0]


def test_a_warm_start_that_had_ended_is_not_gone_on_with(tmp_path):
    """Every response is right, so it ends at its first evaluation, after 1 of 4 steps. A run that lost what came after
    that step makes the same RL steps again, and no second warm-up step."""
    write_jsonl(tmp_path)
    (tmp_path / "rewards.py").write_text("def right(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    tasks = """
  sums: {data: sums.jsonl, reward: "rewards.py:right"}"""
    options = ("--warm-start.steps", "4", "--warm-start.eval-interval", "1", "--warm-start.stop-accuracy", "0.5",
               "--checkpoint.interval", "1")  # fmt: skip
    with train(tmp_path, tasks, 1, 1, *options) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    whole = result(tmp_path, steps=1)
    run = tmp_path / "runs/moe_gspo"
    shutil.rmtree(run / "checkpoints/step_000001")
    (run / "finished.json").unlink()
    with train(tmp_path, tasks, 1, 1, *options) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    assert "goes on after warm_start step 1" in launch.stdout and "warm start had ended" in launch.stdout
    same(result(tmp_path, steps=1), whole)
