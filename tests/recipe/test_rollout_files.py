"""What a recipe says of rollouts from files is refused before ranks start, where it cannot work."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe import check
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.recipe.rollout_files import GROUP_FIELDS, check_rollouts

ROW = {name: 1 for name in GROUP_FIELDS}
OPTIONS = ("--rollout.engine", "files", "--rollout.num-prompts", "2", "--steps", "2")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four groups in two files, of which one is Parquet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups/1.jsonl").write_text(f"{json.dumps(ROW)}\n\n{json.dumps(ROW)}\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), tmp_path / "groups/2.parquet")
    (tmp_path / "groups/readme.txt").write_text("text")
    return tmp_path


def checked(*argv: str):
    config = load_recipe([*OPTIONS, *argv])
    check_rollouts(config)
    return config.rollout


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        checked(*argv)
    return str(error.value)


def test_a_path_is_found_from_where_the_command_is_given(folder):
    assert checked("--rollout.path", "groups").path == folder / "groups"
    assert checked("--rollout.path", "groups/2.parquet", "--steps", "1").path == folder / "groups/2.parquet"


def test_more_steps_than_there_are_groups_for(folder):
    told = refusal("--rollout.path", "groups", "--steps", "3")
    assert told.startswith("steps = 3: take 2 groups each (rollout.num_prompts), 6 in all, and ")
    assert told.endswith("groups has 4. Give steps 2, or more groups.")
    config = load_recipe([*OPTIONS, "--rollout.path", "groups", "--steps", "3"])
    with pytest.raises(ConfigError, match="steps = 3: take 2 groups each"):
        check.check(config, resolve_layout(config, 1, has_cuda=False), 1)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ((), "rollout.path = None: rollout.engine is files, which reads groups from it. Give a .jsonl or"),
        (("--rollout.path", "none"), "rollout.path = 'none': is not there. Give"),
        (("--rollout.path", "groups/readme.txt"), "readme.txt': has the unknown suffix '.txt'. Give"),
        (("--rollout.path", "."), "is a folder without a .jsonl or .parquet file. Give"),
        (("--rollout.path", "groups", "--rollout.engine", "megatron"), "is read by rollout.engine files alone. Give"),
        (("--rollout.path", "groups", "--rollout.save", "1"), "rollout.save = 1: the groups are in rollout.path"),
        (("--rollout.path", "groups", "--routing.replay", "R3"), "routing.replay = 'R3': takes the experts that the"),
        (("--rollout.path", "groups", "--algorithm.name", "dpo"), "rollout.engine = 'files': dpo has no rollouts"),
    ],
)
def test_what_cannot_work(argv, says, folder):
    assert says in refusal(*argv)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"uid": 1', "line 2': not valid JSON"),
        ("[1]", "begins as a JSON array. Write one object a line."),
        ('{"uid": 1, "responses": []}', "line 2': task, prompt, prompt_ids, version, tokenizer, sampling missing"),
    ],
)
def test_the_first_line_is_looked_into(line, says, folder):
    (folder / "x.jsonl").write_text("\n" + f"{line}\n" * 4)
    assert says in refusal("--rollout.path", "x.jsonl")


def test_a_damaged_parquet_file(folder):
    (folder / "x.parquet").write_text("no Parquet")
    assert "x.parquet': cannot be read (ArrowInvalid" in refusal("--rollout.path", "x.parquet")


def test_a_recipe_without_rollouts_from_files_is_left_alone():
    check_rollouts(load_recipe(["--rollout.save", "2"]))
    with pytest.raises(ConfigError, match="rollout.save = -1: must be 0 or more"):
        load_recipe(["--rollout.save", "-1"])
    with pytest.raises(ConfigError, match="rollout.save = 1: dpo has no rollouts"):
        check_rollouts(load_recipe(["--rollout.save", "1", "--algorithm.name", "dpo"]))
