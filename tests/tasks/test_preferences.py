"""Preference files: what is read, what is held out, and every way a file can be wrong."""

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

from gspo_megatron.batch import TaskItem
from gspo_megatron.config import PreferenceConfig, TaskConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe import check, lint
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import REPOSITORY, load_recipe
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.preferences import PreferencePair, load_pairs, read_pairs
from gspo_megatron.tasks.reasoning_gym import is_correct
from gspo_megatron.tasks.splits import split_of
from tests.processes import imported_by

GOOD = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
SETTING = "algorithm.preference.path"


def written(folder: Path, *lines: str | bytes, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return path


def numbered(count: int, word: str = "q") -> list[str]:
    return [json.dumps(GOOD | {"prompt": f"{word}{i}"}) for i in range(count)]


def test_a_file_as_people_write_it(tmp_path):
    """Byte-order mark, CRLF, an empty line, other keys, a line separator inside a text, no newline at the end."""
    second = json.dumps({"id": 7, "rejected": "b\u2028\n", "chosen": " é", "prompt": "p"}, ensure_ascii=False)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n" + second.encode())
    first, last = read_pairs(path, SETTING)
    assert first == PreferencePair("2 + 2?", "4", "5") and first.where == f"{path}, line 1"
    assert last == PreferencePair("p", " é", "b\u2028\n") and last.where == f"{path}, line 3"


@pytest.mark.parametrize(("count", "held"), [(2, 1), (19, 1), (20, 2), (35, 3)])
def test_the_last_tenth_is_held_out(tmp_path, count, held):
    data = load_pairs(PreferenceConfig(written(tmp_path, *numbered(count)), batch_size=1))
    assert [pair.prompt for pair in data.train] == [f"q{i}" for i in range(count - held)]
    assert [pair.prompt for pair in data.held_out] == [f"q{i}" for i in range(count - held, count)]


def test_with_a_file_of_held_out_pairs_all_others_are_trained_on(tmp_path):
    held = written(tmp_path, *numbered(2, "h"), name="held.jsonl")
    data = load_pairs(PreferenceConfig(written(tmp_path, *numbered(3)), held, batch_size=3))
    assert len(data.train) == 3 and [pair.prompt for pair in data.held_out] == ["h0", "h1"]


BAD_LINES = {
    "no JSON": ("{", "not valid JSON"),
    "not text": (b'{"prompt": "\xff"}', "not valid JSON ('utf-8' codec"),
    "no object": ('["a"]', "holds ['a'], must be a JSON object"),
    "missing": (json.dumps({"prompt": "a", "chosen": "b"}), "rejected is missing"),
    "number": (json.dumps(GOOD | {"chosen": 4}), "chosen = 4 must be text"),
    "conversation": (json.dumps(GOOD | {"prompt": [{"role": "user"}]}), "prompt = [{'role': 'user'}] must be text"),
    "empty": (json.dumps(GOOD | {"rejected": " \n"}), "rejected = ' \\n' is empty"),
    "same": (json.dumps(GOOD | {"rejected": "4"}), "chosen and rejected are both '4'"),
    "surrogate": ('{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}', "half of a surrogate pair"),
}


@pytest.mark.parametrize("mistake", BAD_LINES)
def test_a_bad_line_is_named(tmp_path, mistake):
    line, text = BAD_LINES[mistake]
    path = written(tmp_path, json.dumps(GOOD), "", line)
    with pytest.raises(ConfigError) as error:
        read_pairs(path, SETTING)
    assert str(error.value).startswith(f"{SETTING} = '{path}, line 3': ") and text in str(error.value)
    assert str(error.value).endswith(".") and str(error.value).count(". ") >= 1  # a remedy follows


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "algorithm.preference.path = None: dpo learns from preference pairs. Give a JSONL file"),
        ({"path": "nowhere.jsonl"}, "algorithm.preference.path = 'nowhere.jsonl': no such file"),
        ({"path": "."}, "algorithm.preference.path = '.': is a directory"),
        ({"path": "void.jsonl"}, "holds no pair"),
        ({"path": "ten.jsonl", "eval_path": "gone.jsonl"}, "algorithm.preference.eval_path = 'gone.jsonl': no such"),
        (
            {"path": "ten.jsonl", "batch_size": 10},
            "ten.jsonl leaves 9 pairs to train on after the last 1 are held out, "
            "fewer than a batch. Give more pairs, or a batch_size of 9 or less",
        ),
        ({"path": "ten.jsonl", "eval_path": "ten.jsonl", "batch_size": 11}, "leaves 10 pairs to train on, fewer"),
    ],
)
def test_what_cannot_be_trained_on(tmp_path, monkeypatch, config, text):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, *numbered(10), name="ten.jsonl")
    written(tmp_path, "", " ", name="void.jsonl")
    paths = {name: Path(value) for name, value in config.items() if name != "batch_size"}
    with pytest.raises(ConfigError) as error:
        load_pairs(PreferenceConfig(**paths, batch_size=config.get("batch_size", 1)))
    assert text in str(error.value)


def dpo(path: Path, *argv: str):
    given = ["--algorithm.name", "dpo", "--algorithm.preference.path", str(path), *argv]
    return load_recipe(given)


def check_in(config, world_size: int) -> None:
    check.check(config, resolve_layout(config, world_size, has_cuda=False), world_size)


def test_a_recipe_is_checked_with_its_pairs(tmp_path):
    """Rollout settings that would be refused for gspo (7 prompts, 5 minibatches) are nothing to dpo."""
    path = written(tmp_path, *numbered(80))
    unused = ["--rollout.num-prompts", "7", "--algorithm.num-minibatches", "5"]
    check_in(dpo(path, *unused), 16)
    with pytest.raises(ConfigError, match="batch_size = 64: cannot be divided evenly over 3 data-parallel ranks"):
        check_in(dpo(path, "--warm-start.steps", "0"), 3)
    virtual = ["--parallel.pipeline-model-parallel-size", "2", "--parallel.virtual-pipeline-model-parallel-size", "2"]
    with pytest.raises(ConfigError, match="and 2 pipeline stages.* Give a multiple of 4"):
        check_in(dpo(path, *virtual, "--algorithm.preference.batch-size", "66"), 4)
    with pytest.raises(ConfigError, match="warm_start.batch_size = 128"):
        check_in(dpo(path, "--algorithm.preference.batch-size", "63"), 3)
    written(tmp_path, *numbered(80), "{")
    with pytest.raises(ConfigError, match="pairs.jsonl, line 81': not valid JSON"):
        check_in(dpo(path), 1)


def test_paths_are_looked_up_beside_the_recipe(tmp_path):
    path = written(tmp_path, *numbered(80))
    (tmp_path / "recipe.yaml").write_text(
        "algorithm: {name: dpo, preference: {path: pairs.jsonl, eval_path: pairs.jsonl, batch_size: 8}}\n"
    )
    preference = load_recipe([str(tmp_path / "recipe.yaml")]).algorithm.preference
    assert preference.path == preference.eval_path == path.resolve() and preference.batch_size == 8


def test_the_example_recipe_passes_with_pairs(tmp_path):
    path = written(tmp_path, *numbered(80))
    example = str(REPOSITORY / "examples/recipes/moe_dpo.yaml")
    for world_size in (1, 2, 4, 8):
        config = load_recipe([example, "--algorithm.preference.path", str(path)])
        check_in(config, world_size)
        assert lint.warnings(config) == []


def test_warnings_about_what_dpo_does_not_use(tmp_path):
    path = written(tmp_path, *numbered(80))
    found = lint.warnings(
        dpo(path, "--algorithm.num-minibatches", "2", "--algorithm.kl.coef", "0.1", "--rollout.temperature", "0.5")
    )
    assert len(found) == 2 and "algorithm.num_minibatches, algorithm.kl." in found[0]
    assert "rollout.temperature = 0.5 divides the logits" in found[1]


def test_reading_imports_neither_torch_nor_megatron():
    heavy = ("torch", "megatron", "transformers", "reasoning_gym")
    assert imported_by("from gspo_megatron.tasks import preferences", *heavy) == set()


def make_preferences() -> ModuleType:
    """The tool, which is a script and in no package."""
    place = importlib.util.spec_from_file_location("make_preferences", REPOSITORY / "examples/make_preferences.py")
    tool = importlib.util.module_from_spec(place)
    place.loader.exec_module(tool)
    return tool


def test_the_tool_writes_pairs_that_the_tasks_own_scorer_agrees_with(tmp_path, capsys):
    tool = make_preferences()
    target, example = tmp_path / "a folder/pairs.jsonl", REPOSITORY / "examples/recipes/moe_dpo.yaml"
    assert tool.main(example, target, count=60) == 0
    assert capsys.readouterr().out == f"{target}: 60 pairs\n"
    pairs = read_pairs(target, SETTING)
    assert len({pair.prompt for pair in pairs}) == 60 and {split_of(pair.prompt) for pair in pairs} == {"train"}
    mixture = TaskMixture({"spell_backward": TaskConfig(options={"min_word_len": 3, "max_word_len": 6})}, seed=1)
    items = {item.question: item for item in (mixture.item("train", index) for index in range(100))}
    for pair in pairs:
        item = items[pair.prompt]
        assert is_correct(mixture.score(item, pair.chosen)) and not is_correct(mixture.score(item, pair.rejected))
    before = target.read_bytes()
    assert tool.main(example, target, count=60) == 0 and target.read_bytes() == before  # seeded
    assert tool.main(example, target, count=60, seed=2) == 0 and target.read_bytes() != before
    assert tool.main(example, target, split="eval") == 2 and capsys.readouterr().err.startswith("error: ")


class OneQuestion:
    """A mixture whose tasks have run out; only the gold answer and what contains it score."""

    def item(self, split: str, index: int) -> TaskItem:
        return TaskItem("t", "Q", "ab", {})

    def score(self, item: TaskItem, text: str) -> float:
        return float("ab" in text)

    def is_correct(self, item: TaskItem, reward: float) -> bool:
        return reward >= 1.0

    def gold_response(self, item: TaskItem) -> str:
        return item.answer


def test_the_tool_gives_fewer_pairs_rather_than_the_same_question_twice(capsys):
    (row,) = make_preferences().pairs(OneQuestion(), "train", 3, random.Random(1))
    assert (row["prompt"], row["chosen"]) == ("Q", "ab") and "ab" not in row["rejected"]
    assert capsys.readouterr().err == "warning: 60 draws gave 1 questions of 3\n"
