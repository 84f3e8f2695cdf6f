"""Which fields of a recipe a run may go on with otherwise, field by field, and how the others are refused."""

from dataclasses import replace
from typing import Any

import pytest

from gspo_megatron.config import (
    AlgorithmConfig,
    DataConfig,
    KlConfig,
    Layout,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)
from gspo_megatron.recipe.changes import CHANGEABLE, FREE, NEVER, Change, _is_named, differences, noted, refusal
from gspo_megatron.recipe.load import flat, plain_values
from tools.validation.launching import ROOT

REWARDS = (RewardConfig("r.py:exact"), RewardConfig("r.py:short", 0.5))
CONFIG = TrainConfig(tasks={"a": TaskConfig(data=ROOT / "a.jsonl", reward=REWARDS), "b": TaskConfig()})


def named(rules: tuple, field: str) -> bool:
    return any(_is_named(rule.fields, field) for rule in rules)


@pytest.mark.parametrize("field", flat(plain_values(CONFIG)))
def test_every_field_has_a_rule(field):
    """Free of any note, changeable or never: somebody has decided each of them."""
    if not field.endswith(".reward"):  # spelled out: the functions never, their weights may
        assert _is_named(FREE, field) or named(CHANGEABLE, field) or named(NEVER, field)


def test_the_document_has_the_table():
    """Each rule is a row of docs/resuming.md, with its fields and its reason."""
    text = (ROOT / "docs/resuming.md").read_text()
    for rule in (*CHANGEABLE, *NEVER):
        fields = ", ".join(f"`{name}`" for name in rule.fields)
        assert f"| {fields} | {rule.why} |" in text
    assert all(f"`{name}`" in text for name in FREE)


def changed(**sections: Any) -> list[Change]:
    """What a recipe with other sections has otherwise than CONFIG's run."""
    return differences(replace(CONFIG, **sections), plain_values(CONFIG.resolved(Layout())))


def test_nothing_differs_in_the_same_recipe():
    """The run's file has the algorithm's own values filled in, and the layout."""
    assert changed() == []
    assert changed(steps=999, name="b", algorithm=AlgorithmConfig(clip_ratio_low=3e-4)) == []


ALLOWED = {
    "optimizer.lr": ({"optimizer": OptimizerConfig(lr=2e-4)}, 1e-4, 2e-4),
    "algorithm.clip_ratio_dual": ({"algorithm": AlgorithmConfig(clip_ratio_dual=3.0)}, None, 3.0),
    "algorithm.entropy_coef": ({"algorithm": AlgorithmConfig(entropy_coef=0.1)}, 0.0, 0.1),
    "rollout.temperature": ({"rollout": RolloutConfig(temperature=0.7)}, 1.0, 0.7),
    "rollout.max_response_length": ({"rollout": RolloutConfig(max_response_length=64)}, 32, 64),
    "tasks.b.weight": ({"tasks": CONFIG.tasks | {"b": TaskConfig(weight=3)}}, 1.0, 3.0),
    "tasks.a.reward.short.weight": (
        {"tasks": CONFIG.tasks | {"a": replace(CONFIG.tasks["a"], reward=(REWARDS[0], RewardConfig("r.py:short", 2)))}},
        0.5,
        2.0,
    ),
    "tasks.a.on_error": (
        {"tasks": CONFIG.tasks | {"a": replace(CONFIG.tasks["a"], on_error="drop")}}, 0.0, "drop"),
}  # fmt: skip


@pytest.mark.parametrize("field", ALLOWED)
def test_coefficients_and_limits_may_change(field):
    sections, old, new = ALLOWED[field]
    assert changed(**sections) == [Change(field, old, new)]
    assert refusal(Change(field, old, new)) is None


REFUSED = {
    "seed": ({"seed": 2}, "seed = 1 there, 2 here: it fixes the initial weights"),
    "batch": ({"rollout": RolloutConfig(num_prompts=64)}, "rollout.num_prompts = 32 there, 64 here: it says what"),
    "algorithm": ({"algorithm": AlgorithmConfig(aggregation="token_mean")},
                  "algorithm.aggregation = 'sequence_mean' there, 'token_mean' here: it says what is optimised"),
    "a reference anew": ({"algorithm": AlgorithmConfig(kl=KlConfig(coef=0.1))},
                         "algorithm.kl.coef = 0.0 there, 0.1 here: it changes between values above 0 alone"),
    "resampling anew": ({"algorithm": AlgorithmConfig(resampling_rounds=2)}, "it changes between values above 0 alone"),
    "Adam": ({"optimizer": OptimizerConfig(adam_beta2=0.99)}, "optimizer.adam_beta2 = 0.95 there, 0.99 here: Adam's"),
    "held-out prompts": ({"data": DataConfig(num_eval_prompts=8)}, "data.num_eval_prompts = 256 there, 8 here: the"),
    "another function": ({"tasks": CONFIG.tasks | {"a": replace(CONFIG.tasks["a"],
                         reward=(REWARDS[0], RewardConfig("s.py:short", 0.5)))}},
                         "tasks.a.reward = ['r.py:exact', 'r.py:short'] there, ['r.py:exact', 's.py:short'] here: it"),
    "a task less": ({"tasks": {"b": TaskConfig()}}, "tasks = ['a', 'b'] there, ['b'] here: it says which prompts"),
    "a task more": ({"tasks": CONFIG.tasks | {"c": TaskConfig()}}, "tasks = ['a', 'b'] there, ['a', 'b', 'c'] here"),
    "options": ({"tasks": CONFIG.tasks | {"b": TaskConfig(options={"weight": 3})}},
                "tasks.b.options.weight = None there, 3 here: it says which prompts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_run_means_never_changes(case):
    sections, said = REFUSED[case]
    refused = [text for change in changed(**sections) if (text := refusal(change))]
    assert len(refused) == 1 and said in refused[0]


@pytest.mark.parametrize("field", ["algorithm.kl.coef", "algorithm.resampling_rounds"])
def test_a_term_that_is_there_may_weigh_more_and_stays(field):
    assert refusal(Change(field, 1, 2)) is None
    for old, new in ((0, 1), (1, 0), (0.0, 1)):
        assert "between values above 0 alone" in (refusal(Change(field, old, new)) or "")


def test_a_limit_that_chooses_rows_is_not_free():
    """data.max_prompt_length is free, but where a task leaves out what is longer."""
    assert changed(data=DataConfig(max_prompt_length=50)) == []
    tasks = {"a": replace(CONFIG.tasks["a"], overlong="drop")}
    there = plain_values(replace(CONFIG, tasks=tasks).resolved(Layout()))
    (change,) = differences(replace(CONFIG, tasks=tasks, data=DataConfig(max_prompt_length=50)), there)
    assert "says which rows" in (refusal(change) or "")


def test_more_steps_are_noted_where_the_curve_of_the_learning_rate_ends_with_them():
    there = plain_values(CONFIG.resolved(Layout()))
    longer = replace(CONFIG, steps=200)
    assert noted(longer, there) == []
    linear = OptimizerConfig(lr_decay_style="linear")
    there = plain_values(replace(CONFIG, optimizer=linear).resolved(Layout()))
    assert noted(replace(longer, optimizer=linear), there) == [Change("steps", 100, 200)]
