"""Recipes and overrides: what is read back, and what every kind of mistake is told."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import example, given, settings
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
        ("optimizer: {lr: '1e-5'}\n", ["optimizer.lr = '1e-5'", "Take off the quotes"]),
        ("steps: '20'\n", ["steps = '20'", "Take off the quotes"]),
        ("model: {recompute: 'true'}\n", ["model.recompute = 'true'", "Take off the quotes"]),
        ("steps: 010\n", ["steps = 010", "base 8", "Write 10", "line 1"]),
        ("optimizer:\n  warmup_steps: 08\n", ["warmup_steps = 08", "base 8", "Write 8", "line 2"]),
        ("tasks: {lcm: {options: {min_value: 007}}}\n", ["min_value = 007", "base 8", "Write 7"]),
        ("tasks: {lcm: {options: {range: [1, 012]}}}\n", ["range = 012", "base 8", "Write 12"]),
        ("faults: {reward_timeout: 1:30}\n", ["reward_timeout = 1:30", "base 60", "field's unit", "line 1"]),
        ("faults: {reward_timeout: 1:30.5}\n", ["reward_timeout = 1:30.5", "base 60"]),
        ("seed: -1\n", ["seed = -1", "must be 0 or more"]),
        (f"seed: {2**63}\n", [f"seed = {2**63}", "must be at most 2,147,483,647"]),
        ("seed: " + "9" * 5000 + "\n", ["recipe.yaml", "not valid YAML", "digits"]),
        ("name: 2026-13-01\n", ["recipe.yaml", "not valid YAML", "month"]),
        ("rollout: {group_size: 1000000000}\n", ["rollout.group_size = 1000000000", "must be at most 10,000"]),
        ("tasks: {lcm: {weight: .inf}}\n", ["tasks.lcm.weight = inf", "must be a finite number"]),
        ("tasks: {lcm: {weight: 1e300}}\n", ["tasks.lcm.weight = 1e+300", "must be at most 1,000,000"]),
        ("tasks: {lcm: {options: {a: [1, .nan]}}}\n", ["tasks.lcm.options.a[1] = nan", "must be a finite number"]),
        ("optimzer: {lr: 1}\n", ["optimzer", "unknown field", "Did you mean optimizer?"]),
        ("optimizer: {adam_beta2: 1}\n", ["optimizer.adam_beta2 = 1", "below 1"]),
        ("warm_start: {lr: 1e-6}\n", ["warm_start.min_lr = 1e-05", "warm_start.lr = 1e-06"]),
        ("faults: {reward_timeout: 1e15}\n", ["faults.reward_timeout = 1000000000000000.0", "must be at most 86,400"]),
        ("faults: {reward_memory_gb: 1e12}\n", ["faults.reward_memory_gb = 1000000000000.0", "at most 1,048,576"]),
        ("eval_interval: 0\n", ["eval_interval = 0: must be greater than 0"]),
    ],
)
def test_a_mistake_names_field_value_and_remedy(tmp_path, text, parts):
    message = refusal(tmp_path, text)
    for part in parts:
        assert part in message


def test_all_mistakes_are_told_at_once(tmp_path):
    message = refusal(tmp_path, "optimizer: {lrr: 1}\nsteps: x\n")
    assert "optimizer.lrr" in message and "steps = 'x'" in message


def test_of_very_many_mistakes_some_are_told(tmp_path):
    """Names that may be meant are looked for in these alone: all of 20,000 took a minute."""
    lines = refusal(tmp_path, "".join(f"k{number}: 1\n" for number in range(2000))).splitlines()
    assert lines[0].startswith("k0 = 1: unknown field") and lines[19].startswith("k19 = 1: unknown field")
    assert len(lines) == 21 and lines[20].startswith("And 1980 more in ")


def numbers_of(config: object, prefix: str = "") -> list[tuple[str, type]]:
    """(dotted name, type) of every field that takes a whole or a floating-point number."""
    found = []
    for field in dataclasses.fields(config):
        hint, value = get_type_hints(type(config))[field.name], getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += numbers_of(value, f"{prefix}{field.name}.")
        found += [(f"{prefix}{field.name}", kind) for kind in (int, float) if kind in (hint, *get_args(hint))]
    return found


@pytest.mark.parametrize(("name", "kind"), numbers_of(TrainConfig()))
def test_every_number_is_refused_where_it_cannot_mean_anything(tmp_path, name, kind):
    """Infinite, not a number, or far beyond what anything here counts: by its name, before it reaches a library."""
    sections = name.split(".")
    for value in (".inf", "-.inf", ".nan") if kind is float else (str(2**63), str(-(2**63))):
        text = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(sections[:-1]))
        text += f"{'  ' * (len(sections) - 1)}{sections[-1]}: {value}\n"
        assert refusal(tmp_path, text).startswith(f"{name} = ")


@pytest.mark.parametrize("text", ["tasks: {lcm: {options: }}\n", "tasks:\n  lcm:\n", "tasks:\n  lcm:\n    options:\n"])
def test_a_task_without_options_may_be_left_empty(tmp_path, text):
    assert load_recipe([written(tmp_path, text)]).tasks == {"lcm": TaskConfig()}


def test_numbers_that_only_look_like_another_base_are_read(tmp_path):
    """Base 16 says so by itself, 0 and 0.5 have no digit behind the zero, and quotes make a text."""
    path = written(tmp_path, "name: '010'\nsteps: 0x10\nseed: 0\nrollout: {top_p: 0.5, num_prompts: 1_000}\n")
    config = load_recipe([path])
    assert (config.name, config.steps, config.seed) == ("010", 16, 0)
    assert (config.rollout.top_p, config.rollout.num_prompts) == (0.5, 1000)
    save_recipe(config, tmp_path / "again.yaml")
    assert load_recipe([str(tmp_path / "again.yaml")]) == config


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--stepz", "1"], ["--stepz: no such field", "Did you mean steps?"]),
        (["--optimizer.lrr", "1"], ["--optimizer.lrr: no such field", "Did you mean optimizer.lr?"]),
        (["--optimzer.lr", "1"], ["--optimzer.lr: no such field", "Did you mean optimizer.lr?"]),
        (["--lr=1"], ["--lr: no such field", "warm_start.lr or algorithm.critic.lr or optimizer.lr?"]),
        (["--group-size", "8"], ["--group-size: no such field", "Did you mean rollout.group_size?"]),
        (["--tasks.spell_backwards.weight", "2"], ["Did you mean tasks.spell_backward.weight?"]),
        (["--tasks.spell_backward.wight", "2"], ["no such field", "Did you mean tasks.spell_backward.weight?"]),
        (["--rollout.frobnicate", "1"], ["no such field", "Known here: num_prompts, group_size"]),
        (["--frobnicate"], ["no such field", "Known here: name, output_dir"]),
    ],
)
def test_an_unknown_override_is_told_as_an_unknown_field_of_a_recipe(argv, told):
    with pytest.raises(ConfigError) as error:
        load_recipe(argv)
    for part in told:
        assert part in str(error.value)


def test_switches_may_be_turned_off():
    config = load_recipe(["--model.no-recompute", "--no-save-hf", "--checkpoint.no-keep-best", "--seed=3"])
    assert (config.model.recompute, config.save_hf, config.checkpoint.keep_best, config.seed) == (
        False,
        False,
        False,
        3,
    )


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_recipe_that_cannot_be_read(tmp_path, name):
    with pytest.raises(ConfigError, match="recipe = .*Give the path of a YAML recipe"):
        load_recipe([str(tmp_path / name)])


@pytest.mark.parametrize(
    ("argv", "word"),
    [
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


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["--steps", "many"], 2)])
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
    lr=st.floats(min_value=1e-30, max_value=10),
    name=st.from_regex(r"\w(\.?[\w-]){0,9}", fullmatch=True, alphabet=st.characters(codec="ascii")),
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
@example(lr=1.0, name="0809", option=["1:30", "010", {"a": "-0_7"}])
def test_any_value_survives_a_file(tmp_path_factory, lr, name, option):
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    config = dataclasses.replace(
        load_recipe([]), name=name, optimizer=OptimizerConfig(lr=lr), tasks={"lcm": TaskConfig(options={"o": option})}
    )
    save_recipe(config, path)
    assert load_recipe([str(path)]) == config
