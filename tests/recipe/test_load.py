"""Recipes and overrides: what is read back, and what every kind of mistake is told."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gspo_megatron.config import OptimizerConfig, TaskConfig, TrainConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.load import REPOSITORY, load_recipe, save_recipe

EXAMPLE = REPOSITORY / "examples/recipes/moe_gspo.yaml"
TINY = REPOSITORY / "examples/models/qwen3_moe_tiny/config.json"


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_recipe([written(folder, text)])
    return str(error.value)


def test_without_arguments_the_defaults_hold():
    config = load_recipe([])
    model = dataclasses.replace(TrainConfig().model, hf_config=TINY)
    assert config == dataclasses.replace(TrainConfig(), model=model, algorithm=TrainConfig().algorithm.resolved())


@pytest.mark.parametrize(
    ("name", "clip", "aggregation", "kl"),
    [
        ("gspo", (3e-4, 4e-4), "sequence_mean", 0.0),
        ("grpo", (0.2, 0.2), "sequence_mean", 0.04),
        ("dr_grpo", (0.2, 0.2), "constant_length", 0.0),
        ("dapo", (0.2, 0.28), "token_mean", 0.0),
        ("ppo", (0.2, 0.2), "token_mean", 0.01),
    ],
)
def test_what_a_recipe_leaves_out_is_the_algorithms_own(name, clip, aggregation, kl):
    """From the command line too, on a recipe that says gspo; a value that is given stays."""
    algorithm = load_recipe([str(EXAMPLE), "--algorithm.name", name]).algorithm
    assert (algorithm.clip_ratio_low, algorithm.clip_ratio_high) == clip
    assert (algorithm.aggregation, algorithm.kl.coef) == (aggregation, kl)
    given = load_recipe(["--algorithm.name", name, "--algorithm.kl.coef", "0.5"]).algorithm
    assert given.kl.coef == 0.5 and given == given.resolved()


def test_the_example_recipe_loads():
    config = load_recipe([str(EXAMPLE)])
    assert config.algorithm.name == "gspo"
    assert config.model.hf_config == TINY


def test_yaml_over_defaults_and_overrides_over_yaml(tmp_path):
    path = written(tmp_path, "optimizer: {lr: 1e-4, weight_decay: 1}\nsteps: 7\n")
    config = load_recipe([path, "--optimizer.lr", "5e-4", "--rollout.group_size", "4", "--model.recompute"])
    assert config.optimizer == OptimizerConfig(lr=5e-4, weight_decay=1.0)
    assert (config.steps, config.rollout.group_size, config.model.recompute) == (7, 4, True)


def test_overrides_reach_into_tasks(tmp_path):
    path = written(tmp_path, "tasks: {lcm: {}, spell_backward: {weight: 2, options: {min_word_len: 3}}}\n")
    changed = load_recipe([path, "--tasks.lcm.weight", "3", "--tasks.spell_backward.options.min_word_len", "4"])
    assert changed.tasks == {
        "lcm": TaskConfig(weight=3.0),
        "spell_backward": TaskConfig(weight=2.0, options={"min_word_len": 4}),
    }


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimizer: {lrr: 1}\n", ["optimizer.lrr = 1", "unknown field", "recipe.yaml", "optimizer.lr?"]),
        ("lr: 1.0e-3\n", ["lr = 0.001", "unknown field", "warm_start.lr"]),
        ("tasks: {lcm: {wight: 1}}\n", ["tasks.lcm.wight = 1", "unknown field", "tasks.lcm.weight?"]),
        ("rollout: {frobnicate: 1}\n", ["rollout.frobnicate", "Known here: num_prompts, group_size"]),
        ("optimizer: {lr: fast}\n", ["optimizer.lr = 'fast'", "number", "recipe.yaml"]),
        ("steps: true\n", ["steps = True", "integer"]),
        ("seed: '1'\n", ["seed = '1'", "integer"]),
        ("parallel: {pipeline_model_parallel_size: 1.5}\n", ["parallel.pipeline_model_parallel_size = 1.5"]),
        ("algorithm: {name: reinforce}\n", ["algorithm.name = 'reinforce'", "'gspo_token'"]),
        ("optimizer:\n", ["optimizer = None", "{} for its defaults"]),
        ("optimizer: {lr: -1.0}\n", ["optimizer.lr = -1.0: must be greater than 0"]),
        ("steps: -1\n", ["steps = -1: must be 0 or more"]),
        ("steps: 1\nsteps: 2\n", ["not valid YAML", "'steps' is given twice", "line 2"]),
        ("steps: [1\n", ["not valid YAML", "recipe.yaml"]),
        ("- steps\n", ["must be a table"]),
    ],
)
def test_a_mistake_names_field_value_and_remedy(tmp_path, text, parts):
    message = refusal(tmp_path, text)
    for part in parts:
        assert part in message


def test_all_mistakes_are_told_at_once(tmp_path):
    message = refusal(tmp_path, "optimizer: {lrr: 1}\nsteps: x\n")
    assert "optimizer.lrr" in message and "steps = 'x'" in message


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_recipe_that_cannot_be_read(tmp_path, name):
    with pytest.raises(ConfigError, match="recipe = .*Give the path of a YAML recipe"):
        load_recipe([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--stepz", "1"], "--stepz"),
        (["--steps", "many"], "--steps"),
        (["--algorithm.name", "reinforce"], "gspo_token"),
        (["--steps"], "--steps"),
        (["--steps", "1", "surplus"], "surplus"),
    ],
)
def test_a_bad_override_exits_2_with_one_message(capsys, argv, word):
    with pytest.raises(SystemExit) as end:
        load_recipe(argv)
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.out == "" and word in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["--stepz", "1"], 2)])
def test_quiet_says_nothing(capsys, argv, status):
    with pytest.raises(SystemExit) as end:
        load_recipe(argv, quiet=True)
    assert (end.value.code or 0) == status
    assert capsys.readouterr() == ("", "")


def test_an_override_is_validated_like_the_recipe():
    with pytest.raises(ConfigError, match="rollout.group_size = 1: .*2 or more"):
        load_recipe(["--rollout.group-size", "1"])


def test_hf_config_is_found_from_here_then_the_recipe_then_the_repository(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        (folder / "model").mkdir(parents=True)
        (folder / "model/config.json").write_text("{}")
    monkeypatch.chdir(here)
    path = written(beside, "model: {hf_config: model/config.json}\n")
    assert load_recipe([path]).model.hf_config == here / "model/config.json"
    (here / "model/config.json").unlink()
    assert load_recipe([path]).model.hf_config == beside / "model/config.json"
    assert load_recipe([path, "--model.hf_config", "model"]).model.hf_config == beside / "model/config.json"
    assert load_recipe([]).model.hf_config == TINY
    assert load_recipe(["--model.hf_config", "nowhere.json"]).model.hf_config == Path("nowhere.json")


def test_a_saved_run_reads_back_equal(tmp_path):
    source = written(
        tmp_path,
        "optimizer: {lr: 3e-4, adam_eps: 1e-12}\nparallel: {expert_model_parallel_size: 2}\nname: '1e3'\n"
        "tasks: {lcm: {options: {a: [1, 2.5, x], b: null, c: {d: true}, e: '1e3', f: 1e-7}}}\n",
    )
    config = load_recipe([source, "--output-dir", "somewhere/else", "--seed", "11"])
    save_recipe(config, tmp_path / "config.yaml")
    assert load_recipe([str(tmp_path / "config.yaml")]) == config


@settings(max_examples=25, deadline=None)
@given(
    lr=st.floats(min_value=1e-30, max_value=1e30),
    name=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1),
    option=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=2),
        max_leaves=5,
    ),
)
def test_any_value_survives_a_file(tmp_path_factory, lr, name, option):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    config = dataclasses.replace(
        load_recipe([]), name=name, optimizer=OptimizerConfig(lr=lr), tasks={"lcm": TaskConfig(options={"o": option})}
    )
    save_recipe(config, path)
    assert load_recipe([str(path)]) == config
