"""Trainings of the command line on episodes: resumed to the bit, with tools, and with environments that misbehave."""

import json
from pathlib import Path

import pytest

from gspo_megatron.metrics.tracker import read_metrics
from tests.trainer.test_your_data import train, write_jsonl
from tools.validation.faults.scenarios import LONG, result

# Short turns: a response is over at a letter that a model of random weights writes now and then.
GAME = """
class Letters:
    def reset(self, answer, **columns):
        self.turns, self.answer = 0, answer

    def step(self, text):
        self.turns += 1
        return f"{len(text)}", self.turns == 3 or text == self.answer, 0.25 * len(text) if self.turns != 2 else None

    def get_reward(self):
        return self.turns + 0.5 * len(self.answer)
"""
OPTIONS = ("--rollout.max-response-length", "24", "--rollout.stop", "a", "e", "i", "o", "1", "2", "3")


def records(folder: Path, step: int) -> list[dict]:
    lines = (folder / f"runs/moe_gspo/rollouts/step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_resumed_run_plays_the_same_episodes(tmp_path):
    """Two steps in one go, and one and one, and both from the files of the first: the same weights and rows to the bit,
    where each turn has an advantage of its own. The masks of the last step's records have the environment's tokens, and
    the reward is that of get_reward(), turns and half the length of an answer of one to three digits, and those of the
    first and third turn."""
    found = []
    options = (*OPTIONS, "--algorithm.name", "gspo_token", "--algorithm.advantage-level", "turn")
    tasks = """
  sums: {data: sums.jsonl, environment: "game.py:Letters", max_turns: 3}"""
    files = ("--rollout.engine", "files", "--rollout.path", str(tmp_path / "whole/runs/moe_gspo/rollouts"))
    for name, parts, source in (
        ("whole", [2], ("--rollout.save", "1")),
        ("parts", [1, 2], ("--rollout.save", "1")),
        ("again", [2], files),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_jsonl(folder)
        (folder / "game.py").write_text(GAME)
        for steps in parts:
            with train(folder, tasks, steps, 1, *options, *source) as launch:
                assert launch.wait(LONG) == 0, launch.stderr
        found.append(result(folder, steps=2))
    assert found[0].digests == found[1].digests == found[2].digests
    rows = [dict(row) for row in found[0].rows if dict(row).get("reward/sums/turns")]
    assert len(rows) == 2 and all(1 < row["reward/sums/turns"] <= 3 for row in rows)
    assert all(row["reward/errors"] == 0 for row in rows)
    responses = [one for group in records(tmp_path / "parts", 2) for one in group["responses"]]
    masks = [one["loss_mask"] for one in responses if one.get("loss_mask")]
    assert masks and all(mask[0] == mask[-1] == 1 and 0 in mask for mask in masks)
    turns = [one["turns"]["rewards"] for one in responses]
    assert all(rewards[1:2] in ([], [0.0]) for rewards in turns) and any(any(rewards) for rewards in turns)
    assert any(len(set(rewards)) > 1 for rewards in turns)
    assert {(one["reward"] - sum(rewards)) % 0.5 for one, rewards in zip(responses, turns, strict=True)} == {0.0}


FAULTY = """
import os, time
class Faulty:
    def reset(self, answer, **columns):
        self.number = Faulty.number = getattr(Faulty, "number", -1) + 1
        if self.number % 8 == 1: raise KeyError("no")
    def step(self, text):
        if self.number % 8 == 2: raise SystemExit(2)
        if self.number % 8 == 3: time.sleep(1000)
        if self.number % 8 == 4: return "one thing"
        if self.number % 8 == 5: print("printed")
        return "ok", True
    def get_reward(self):
        return float("nan") if self.number % 8 == 6 else 1.0
"""


@pytest.mark.parametrize("ranks", [1, 4])
def test_faults_of_an_environment_are_counted_and_nothing_is_lost(tmp_path, ranks):
    """Of each eight episodes, numbers 1 to 4 and 6 fail: 10 of 16 a step. They are left out, and all others have 1."""
    write_jsonl(tmp_path)
    (tmp_path / "game.py").write_text(FAULTY)
    tasks = """
  sums: {data: sums.jsonl, environment: "game.py:Faulty", on_error: drop}"""
    options = ("--warm-start.steps", "0", "--faults.reward-timeout", "2")
    with train(tmp_path, tasks, 2, ranks, *options) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    rows = [row for row in read_metrics(tmp_path / "runs/moe_gspo") if row["phase"] == "rl" and row["step"]]
    assert [(row["reward/errors"], row["reward/left_out"]) for row in rows] == [(10, 10)] * 2
    assert all(row["reward/mean"] == 1.0 for row in rows)


TOOLS = """
class Adding:
    def reset(self, **columns):
        self.calls = 0
    def add(self, a: int, b: int) -> int:
        \"\"\"Add.

        Args:
            a: the first
            b: the second
        \"\"\"
        self.calls += 1
        return a + b
    def get_reward(self):
        return self.calls
"""


def test_tools_are_used_in_training(tmp_path):
    """The warm start teaches a call as the answer to every question; afterwards the model makes some, with whatever
    numbers. Each is worth 1, and what the tool answers is not trained on."""
    with (tmp_path / "sums.jsonl").open("w") as file:
        for i in range(100):
            call = f'<tool_call>{{"name": "add", "arguments": {{"a": {i}, "b": {i}}}}}</tool_call>'
            file.write(json.dumps({"prompt": f"What is {i} + {i}?", "answer": call}) + "\n")
    (tmp_path / "tools.py").write_text(TOOLS)
    tasks = """
  sums: {data: sums.jsonl, environment: "tools.py:Adding", max_turns: 2}"""
    options = ("--warm-start.steps", "40", "--warm-start.warmup-steps", "1", "--warm-start.lr", "3e-3",
               "--rollout.max-response-length", "40", "--rollout.save", "1")  # fmt: skip
    with train(tmp_path, tasks, 1, 1, *options) as launch:
        assert launch.wait(LONG) == 0, launch.stderr
    last = read_metrics(tmp_path / "runs/moe_gspo")[-1]
    assert last["reward/sums/environment"] > 0 and last["reward/sums/turns"] > 1 and last["reward/errors"] == 0
    used = [one for group in records(tmp_path, 1) for one in group["responses"] if one.get("loss_mask")]
    assert used and any(one["reward"] >= 1 for one in used)
    assert all(one["loss_mask"][0] == 1 and 0 in one["loss_mask"] for one in used)
    samples = (tmp_path / "runs/moe_gspo/samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["prompt"].startswith("add <|user|>") for line in samples)


def test_what_cannot_be_used_is_told_before_the_ranks_start(tmp_path):
    write_jsonl(tmp_path)
    (tmp_path / "game.py").write_text("class Game:\n    def reset(self, level): ...\n    def step(self, text): ...\n")
    tasks = """
  sums: {{data: sums.jsonl, environment: "game.py:{}"}}"""
    for name, message in (
        ("Gaem", "Did you mean Game?"),
        ("Game", "reset wants level, and the columns of the data are"),
    ):
        with train(tmp_path, tasks.format(name), 1, 2) as launch:
            assert launch.wait(LONG) == 2
        told = [line for line in launch.stderr.splitlines() if "tasks.sums.environment" in line]
        assert len(told) == 1 and message in told[0] and "Traceback" not in launch.stderr
    assert not (tmp_path / "runs").exists()
