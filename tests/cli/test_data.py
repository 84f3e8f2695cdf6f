"""`gspo-megatron data`: what is shown is what is trained."""

import json

import pytest

from gspo_megatron.cli import data
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.load import REPOSITORY

RECIPE = """
tasks:
  sums: {data: sums.jsonl, prompt_key: question, answer: {after: "####"}, reward: "rewards.py:f", bad_rows: drop}
  gcd: {}
data: {max_prompt_length: 64}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(40)]
    rows.append({"question": "What is 1 + 2?" + "x" * 64, "answer": "#### 3"})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (tmp_path / "rewards.py").write_text("def f(completions, answer):\n    return [0.0] * len(completions)\n")
    recipe = RECIPE + f"model: {{hf_config: {REPOSITORY}/examples/models/qwen3_moe_tiny/config.json}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    return tmp_path


def test_prompts_tokens_and_what_is_left_out_are_shown(folder, capsys):
    assert data.main(["recipe.yaml", "--rows", "1", "--tokens", "--tasks.sums.overlong", "drop"]) == 0
    told = capsys.readouterr().out
    assert "line 42: not valid JSON" in told and "1 of 41 prompts have more than 64 tokens: left out" in told
    assert "f: TRL's form, all responses in one call" in told
    question = told[told.index("\nsums: ") :]
    shown = question[question.index("<|user|>") : question.index("[/trained]")]
    number = shown.replace("|", "").partition("What is ")[2].partition(" + 1?")[0]
    assert "<|assistant|>|[trained]" in shown and shown.count("|") > 12
    assert shown.partition("[trained]")[2].replace("|", "").startswith(str(int(number) + 1))
    assert "endless" in told


def test_of_a_gold_episode_the_model_s_turns_are_shown_as_trained(folder, capsys):
    said = [("assistant", "4?"), ("user", "no"), ("assistant", "3")]
    rows = [{"question": f"What is {i} + 1?", "gold": [{"role": r, "content": c} for r, c in said]} for i in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    options = ("--rows", "1", "--tasks.sums.answer.column", "gold", "--tasks.sums.answer.after", "None")
    assert data.main(["recipe.yaml", *options]) == 0
    end = "<|endoftext|>"
    told = capsys.readouterr().out
    assert f"[trained]4?{end}[/trained]<|user|>no<|assistant|>[trained]3{end}[/trained]" in told
    assert ", and 5 trained in the warm start" in told


def test_a_prompt_that_is_too_long_is_an_error_where_the_recipe_says_so(folder):
    told = "data.max_prompt_length = 64: 1 of 41 prompts of tasks.sums have more tokens, .*sums.jsonl, line 41"
    with pytest.raises(ConfigError, match=told):
        data.main(["recipe.yaml"])


def test_a_reward_with_a_typo_is_one_message(folder):
    (folder / "rewards.py").write_text("def g(completions):\n    return []\n")
    with pytest.raises(ConfigError, match=r"tasks.sums.reward = .*rewards.py:f'"):
        data.main(["recipe.yaml"])
