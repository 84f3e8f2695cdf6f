"""Names and paths that a recipe may have: what is refused, by one message of one line."""

from pathlib import Path

import pytest

from gspo_megatron.config import AlgorithmConfig, ModelConfig, TrainConfig
from gspo_megatron.config.preference import PreferenceConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.load import load_recipe

NAMES = (
    *("x\ntouch PWN1\n#", "x;id", "$(id)", "`id`", "a b", "a/b", "../../etc", "a..b", "..", ".", ".hidden", "-x", ""),
    *("x\0y", "x\x1b[2J", "x\r", "x\n", "a\u2028b", "%j", "a@b", "a'b", 'a"b', "a\\b"),
    *("x" * 101, "x" * 300, "\u00fc", "\u0663"),  # a letter and a digit, but not of ASCII
)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_such_a_name_is_refused(name):
    with pytest.raises(ConfigError, match=r"^name = .*must be at most 100 letters .* Give a name such as") as caught:
        TrainConfig(name=name)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["moe_gspo", "a", "_x", "2", "Qwen3-30B-A3B.lr1e-5_s1", "x" * 100])
def test_plain_names_are_taken(name):
    assert TrainConfig(name=name).name == name


PATHS = {"a\0b": "cannot be printed", "a\nb": "cannot be printed", "runs/\x1b]0;": "cannot be printed",
         "runs/" + "x" * 300: "is too long", "ü" * 128: "is too long", "x/" * 3000: "is too long"}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_path_that_no_file_can_have_is_refused(path):
    preference = PreferenceConfig(path=Path(path))
    makers = {
        "output_dir": lambda: TrainConfig(output_dir=Path(path)),
        "model.hf_config": lambda: TrainConfig(model=ModelConfig(hf_config=Path(path))),
        "model.load_hf": lambda: TrainConfig(model=ModelConfig(load_hf=Path(path))),
        "algorithm.preference.path": lambda: TrainConfig(algorithm=AlgorithmConfig(name="dpo", preference=preference)),
        "recipe": lambda: load_recipe([path]),
    }
    for field, make in makers.items():
        with pytest.raises(ConfigError) as caught:
            make()
        message = str(caught.value)
        assert message.startswith(f"{field} = ") and PATHS[path] in message
        assert message.isprintable() and len(message) < 500


def test_paths_of_other_languages_are_taken():
    assert TrainConfig(output_dir=Path("/home/jörg/мои запуски/ü" + "x" * 200)).output_dir.name.startswith("ü")
