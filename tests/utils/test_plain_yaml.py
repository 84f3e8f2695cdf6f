"""YAML of others, and recipes: what is too much is refused soon, by one message."""

import time

import pytest
import yaml

from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.utils import plain_yaml

NAMES = "abcdefghij"


def nine_times(first: str, line: str) -> str:
    """Each line has the one before nine times: 9^9 of the first one's in the last."""
    lines = [line.format(new=new, old=", ".join([f"*{old}"] * 9)) for old, new in zip(NAMES, NAMES[1:], strict=False)]
    return "\n".join([first, *lines]) + "\n"


BOMBS = {
    "billion laughs": (nine_times("a: &a [x]", "{new}: &{new} [{old}]"), "stands for over"),
    "merged tables": (nine_times("a: &a {x: 1}", "{new}: &{new} {{<<: [{old}]}}"), "stands for over"),
    "itself": ("a: &a [*a]", "inside of what it names"),
    "lists in lists": ("a: " + "[" * 100_000, "nested too deep"),
    "tables in tables": ("{a: " * 50_000, "nested too deep"),
    "dashes": ("- " * 100_000, "nested too deep"),
    "100 MB": ("a: " + "x" * (100 << 20), "over 256 kB"),
    "a month 13": ("steps: 2001-13-45", "a value cannot be read"),
    "a number of 100,000 digits": ("steps: " + "9" * 10**5, "a value cannot be read"),
    "a tag without a value": ("steps: !!int ''", "a value cannot be read"),
    "a tag of code": ("steps: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_each_is_one_message(tmp_path, name):
    """By the loader, and of a recipe, within ten seconds."""
    text, said = BOMBS[name]
    with pytest.raises(yaml.YAMLError, match=said):
        yaml.load(text, plain_yaml.Loader)
    (tmp_path / "recipe.yaml").write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=f"recipe.yaml': not valid YAML: .*{said}") as caught:
        load_recipe([str(tmp_path / "recipe.yaml")])
    assert time.monotonic() - began < 10 and len(str(caught.value)) < 600 + len(str(tmp_path))


def test_aliases_are_read():
    assert yaml.load("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", plain_yaml.Loader) == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}, {"x": 1}],
    }


@pytest.mark.parametrize("text", ["2001-01-01: 1", "steps: " + ":".join(["59"] * 5000), "- " + "x" * 100_000])
def test_a_recipe_that_is_none(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe([str(tmp_path / "recipe.yaml")])
    assert len(str(caught.value)) < 600 + len(str(tmp_path))
