"""What ends a response: the union of all that the files and the recipe name."""

import dataclasses
import json

import pytest

from gspo_megatron.config import ModelConfig, RolloutConfig, TrainConfig
from gspo_megatron.data.stops import find_stops
from gspo_megatron.errors import ConfigError
from tests.data.templates import CHATML, GLM, PLAIN, tokenizer

VOCAB = 300


def folder(path, generation=None, config=None) -> ModelConfig:
    """A folder to start from, with eos_token_id in these files."""
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (path / name).write_text(json.dumps({"eos_token_id": value}))
    return ModelConfig(load_hf=path)


def found(template: str, model: ModelConfig | None = None, **rollout) -> set[int]:
    config = dataclasses.replace(TrainConfig(), model=model or ModelConfig(), rollout=RolloutConfig(**rollout))
    return set(find_stops(config, tokenizer(template), VOCAB).token_ids)


def ids(*tokens: str) -> set[int]:
    return set(tokenizer(PLAIN).convert_tokens_to_ids(list(tokens)))


def test_the_union_of_all_sources(tmp_path):
    end, turn = ids("<|endoftext|>"), ids("<|im_end|>")
    assert found(PLAIN) == end == {1}
    assert found(PLAIN, stop_token_ids=(7, 9)) == end | {7, 9}
    assert found(CHATML) == end | turn  # a base model's eos is another token than its template's
    assert found(PLAIN, folder(tmp_path, [1, 3], 5)) == {1, 3, 5}
    assert found(GLM, folder(tmp_path, 4)) == {1, 4, 5}


@pytest.mark.parametrize(("value", "expected"), [(3, {1, 3}), ([3], {1, 3}), ([], {1}), (None, {1}), (-1, {1})])
def test_one_several_or_no_token_in_a_file(tmp_path, value, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert found(PLAIN, ModelConfig(load_hf=tmp_path)) == expected


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True, [None], {"a": 1}, 1.5, 2**31, [1, 2**40], 2**70])
def test_other_values_are_refused_by_file_and_field(tmp_path, value):
    with pytest.raises(ConfigError, match=r"generation_config\.json'?: eos_token_id is .*Correct it"):
        found(PLAIN, folder(tmp_path, value))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match="generation_config.json': no JSON object"):
        found(PLAIN, ModelConfig(load_hf=tmp_path))


def test_a_random_model_does_not_take_the_ids_of_the_config_it_was_shaped_by(tmp_path):
    """Its tokenizer is another one, so 3 is another token."""
    folder(tmp_path, config=3)
    assert found(PLAIN, ModelConfig(hf_config=tmp_path / "config.json")) == {1}


def test_recipe_values_that_cannot_work():
    for values, words in (
        ({"stop_token_ids": (-1,)}, "rollout.stop_token_ids = -1"),
        (
            {"stop_token_ids": (VOCAB,)},
            f"rollout.stop_token_ids = {VOCAB}: is not below the model's vocabulary size 300",
        ),
        ({"stop": ("a", "")}, "rollout.stop = '': an empty text"),
    ):
        with pytest.raises(ConfigError, match=words):
            found(PLAIN, **values)


def test_nothing_at_all_ends_a_response():
    made = tokenizer(PLAIN)
    made.eos_token = None
    with pytest.raises(ConfigError, match="nothing ends a response"):
        find_stops(TrainConfig(), made, VOCAB)


def test_they_are_told_in_words():
    config = dataclasses.replace(TrainConfig(), rollout=RolloutConfig(stop=("\nQ:",)))
    made = tokenizer(CHATML)
    turn = made.convert_tokens_to_ids("<|im_end|>")
    assert find_stops(config, made, VOCAB).described(made) == f"1 <|endoftext|>, {turn} <|im_end|>, '\\nQ:'"
