"""Rows of samples.jsonl, by hand: which responses, in which order, and what is known of each."""

import math
from types import SimpleNamespace

import pytest
import torch

from gspo_megatron.batch import (
    Completion,
    Minibatch,
    PackedBatch,
    Prompt,
    RolloutGroup,
    Score,
    SequenceStats,
    SequenceTable,
    TaskItem,
    UpdateResult,
)
from gspo_megatron.config import TrackingConfig, TrainConfig
from gspo_megatron.data.tokenizer import train_tokenizer
from gspo_megatron.trainer import samples

TOKENIZER = train_tokenizer(["abc"], 260)


def group(uid: int, has_answer: bool = True) -> RolloutGroup:
    """Two responses to "abc<uid>": one of two tokens that stopped, one of three that was cut."""
    item = TaskItem("sum", f"abc{uid}", "12" if has_answer else "", {}, has_answer=has_answer)
    prompt = Prompt(uid, item, TOKENIZER.encode(f"abc{uid}") + [TOKENIZER.eos_token_id])
    completions = [Completion([5, 6], [-0.5, -0.5], False), Completion([5, 6, 7], [-0.5] * 3, True)]
    scores = [Score(1.5, {"exact": 1.0, "form": 0.5}), Score(None)]
    return RolloutGroup(prompt, completions, scores, [f"right{uid}", f"cut{uid}"])


GROUPS = [group(0), group(1, has_answer=False)]


def batch(*places: int) -> PackedBatch:
    """A packed batch of so many sequences: only their places are looked at."""
    empty = torch.zeros(len(places))
    return PackedBatch(empty, empty, empty, len(places), empty, empty, source_index=list(places))


# Responses 0..3; each optimizer step learns from two, and packing has put them in another order.
MINIBATCHES = [Minibatch([3, 0], [batch(1), batch(0)]), Minibatch([1, 2], [batch(1, 0)])]
TABLES = [  # by the order of packing: responses 0, 3 and then 2, 1
    [{"num_tokens": 2, "sum_log_ratio": 0.5, "clipped_high_tokens": 2}, {"num_tokens": 3, "sum_log_ratio": -0.75}],
    [{"num_tokens": 2, "sum_log_ratio": 0.0}, {"num_tokens": 0}],
]


def result(rows: list[dict]) -> UpdateResult:
    values = torch.tensor([[row.get(name, 0.0) for name in SequenceTable.COLUMNS] for row in rows], dtype=torch.float64)
    return UpdateResult(SequenceStats(1, 0, 0.0, SequenceTable(values)), 1.0, 1e-3, True)


def run(count: int, is_main: bool = True) -> tuple[SimpleNamespace, list[dict]]:
    written: list[dict] = []
    return SimpleNamespace(
        config=TrainConfig(tracking=TrackingConfig(log_samples=count)),
        runtime=SimpleNamespace(is_main=is_main),
        tokenizer=TOKENIZER,
        reporter=SimpleNamespace(sample=written.append),
    ), written


def of_step(count: int, is_main: bool = True) -> list[dict]:
    fake, written = run(count, is_main)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    samples.log_step(fake, 4, GROUPS, advantages, MINIBATCHES, [result(rows) for rows in TABLES])
    return written


def test_a_row_has_all_that_is_known_of_a_response():
    assert of_step(1) == [
        {
            "phase": "rl",
            "step": 4,
            "split": "train",
            "task": "sum",
            "prompt": "abc0" + TOKENIZER.eos_token,
            "question": "abc0",
            "answer": "12",
            "response": "right0",
            "reward": 1.5,
            "parts": {"exact": 1.0, "form": 0.5},
            "advantage": 1.0,
            "ratio": pytest.approx(math.exp(0.25)),
            "clipped": True,
            "finish_reason": "stop",
            "tokens": 2,
        }
    ]


def test_one_a_group_comes_before_a_second_of_any():
    """Response 1 was not trained on: it has no ratio. The table's rows find their responses."""
    rows = of_step(9)
    assert [row["response"] for row in rows] == ["right0", "right1", "cut0", "cut1"]
    assert [row["advantage"] for row in rows] == [1.0, 0.5, -1.0, -0.5]
    assert [row["ratio"] for row in rows] == [pytest.approx(math.exp(0.25)), 1.0, None, pytest.approx(math.exp(-0.25))]
    assert [row["clipped"] for row in rows] == [True, False, None, False]
    assert [row["finish_reason"] for row in rows] == ["stop", "stop", "length", "length"]
    assert [row["answer"] for row in rows] == ["12", None, "12", None]
    assert of_step(3) == rows[:3]


def test_other_ranks_and_a_count_of_0_write_nothing():
    assert of_step(0) == of_step(2, is_main=False) == []
    for count, is_main in ((0, True), (2, False)):
        fake, written = run(count, is_main)
        samples.log_evaluation(fake, "warm_start", 5, GROUPS)
        assert written == []


def test_samples_of_an_evaluation_have_its_phase_and_nothing_of_an_update():
    fake, written = run(2)
    samples.log_evaluation(fake, "warm_start", 5, GROUPS)
    assert [(row["phase"], row["step"], row["split"], row["response"]) for row in written] == [
        ("warm_start", 5, "eval", "right0"),
        ("warm_start", 5, "eval", "right1"),
    ]
    assert {row[name] for row in written for name in ("advantage", "ratio", "clipped")} == {None}
