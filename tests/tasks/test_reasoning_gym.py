"""reasoning-gym's tasks: which questions are drawn, in which split, and what their answers score."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from gspo_megatron.batch import TaskItem
from gspo_megatron.config import TaskConfig
from gspo_megatron.errors import ConfigError, RolloutError
from gspo_megatron.tasks import reasoning_gym as module
from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.tasks.reasoning_gym import is_correct, task_names
from gspo_megatron.tasks.splits import SPLITS, split_of

SPELL = {"spell_backward": TaskConfig()}


def spelled(word: str) -> TaskItem:
    return TaskItem("spell_backward", f"spell {word}", word[::-1], {"answer": word[::-1], "metadata": {"word": word}})


@pytest.fixture(scope="module")
def spell() -> TaskMixture:
    return TaskMixture(SPELL, seed=1)


def test_an_item_depends_on_seed_split_and_index_alone(spell):
    first = [spell.item("train", i) for i in range(20)]
    other = TaskMixture(SPELL, seed=1)
    assert [other.item("train", i) for i in reversed(range(20))] == first[::-1]
    assert [TaskMixture(SPELL, seed=2).item("train", i) for i in range(20)] != first
    assert len({item.question for item in first}) > 15


def test_items_are_the_same_in_another_process(spell):
    code = (
        "from gspo_megatron.tasks.mixture import TaskMixture; from gspo_megatron.config import TaskConfig; "
        "m = TaskMixture({'spell_backward': TaskConfig()}, 1); print(*[m.item('eval', i).answer for i in range(5)])"
    )
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert told.split() == [spell.item("eval", i).answer for i in range(5)]


def test_splits_are_disjoint_for_a_task_with_few_questions():
    # 3-letter words: about a thousand questions, so 1500 draws a split repeat many of them.
    few = TaskMixture({"spell_backward": TaskConfig(options={"min_word_len": 3, "max_word_len": 3})}, seed=3)
    texts = {split: {few.item(split, i).question for i in range(1500)} for split in SPLITS}
    assert all(len(text) > 50 for text in texts.values())
    assert texts["train"].isdisjoint(texts["eval"])
    assert texts["train"].isdisjoint(texts["warm_start"])
    assert texts["warm_start"].isdisjoint(texts["eval"])


def test_split_of_is_pinned():
    # Changing these moves training questions into the evaluation of runs that are resumed.
    assert [split_of(str(i)) for i in range(6)] == ["train", "warm_start", "train", "train", "train", "eval"]
    shares = Counter(split_of(f"question {i}") for i in range(4000))
    assert {split: round(count / 4000, 1) for split, count in shares.items()} == {
        "train": 0.6,
        "warm_start": 0.2,
        "eval": 0.1,
    }


def test_unknown_task_names_close_matches_and_how_to_list_all():
    with pytest.raises(ConfigError, match=r"tasks = 'spel_backwards'.*Did you mean spell_backward\?.*task_names"):
        TaskMixture({"spel_backwards": TaskConfig()}, seed=1)
    assert {"spell_backward", "countdown"} <= set(task_names())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"min_word_length": 3}, r"\.min_word_length = 3.*Did you mean min_word_len.*max_word_len, data_file"),
        ({"min_word_len": 9, "max_word_len": 4}, r"max_word_len must be >= min_word_len"),
        ({"min_word_len": "3"}, r"'min_word_len': '3'.*TypeError"),
        ({"seed": 5}, r"\.seed = 5: is set by the mixture"),
    ],
)
def test_bad_options_name_task_option_and_valid_fields(options, told):
    with pytest.raises(ConfigError, match=rf"tasks\.spell_backward\.options.*{told}"):
        TaskMixture({"spell_backward": TaskConfig(options=options)}, seed=1)


def test_a_scorer_that_likes_nonsense_is_refused():
    with pytest.raises(
        ConfigError, match=r"tasks\.game_of_life_halting = 1\.0: the scorer gives full marks to nonsense"
    ):
        TaskMixture({"game_of_life_halting": TaskConfig()}, seed=1)


def test_questions_in_set_order_need_a_fixed_hash_seed(monkeypatch):
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(ConfigError, match="ransom_note: PYTHONHASHSEED = 'random'.*Set PYTHONHASHSEED=0"):
        TaskMixture({"ransom_note": TaskConfig()}, seed=1)
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    TaskMixture({"ransom_note": TaskConfig()}, seed=1)


def test_a_task_with_too_few_questions_is_an_error_and_not_an_endless_loop(spell, monkeypatch):
    tiny = TaskMixture(SPELL, seed=1)
    only = {"question": "the only one", "answer": "x", "metadata": {}}
    monkeypatch.setattr(tiny.tasks["spell_backward"], "_dataset", [only])
    missing = next(split for split in SPLITS if split != split_of("the only one"))
    with pytest.raises(ConfigError, match=rf"tasks\.spell_backward.*no question of the split '{missing}'.*Widen"):
        tiny.item(missing, 0)


class Faulty:
    """A dataset whose generator gives up at some positions."""

    def __init__(self, fails):
        self.fails = fails

    def __len__(self):
        return 1000

    def __getitem__(self, position):
        if self.fails(position):
            raise RuntimeError("no path found")
        return {"question": f"question {position}", "answer": "x", "metadata": {}}


def test_a_generator_that_gives_up_now_and_then_is_drawn_again(monkeypatch):
    odd = TaskMixture(SPELL, seed=1)
    monkeypatch.setattr(odd.tasks["spell_backward"], "_dataset", Faulty(lambda position: position % 2))
    assert all(int(odd.item("train", i).question.split()[1]) % 2 == 0 for i in range(30))
    monkeypatch.setattr(odd.tasks["spell_backward"], "_dataset", Faulty(lambda position: True))
    with pytest.raises(RolloutError, match=r"tasks\.spell_backward.*RuntimeError: no path found"):
        odd.item("train", 0)


def test_scores_are_the_tasks_own_and_only_full_marks_are_correct(spell):
    assert spell.score(spelled("sun"), "nus") == 1.0
    assert spell.score(spelled("sun"), "nxs") == pytest.approx(2 / 3)
    assert spell.score(spelled("sun"), "") == 0.0
    assert [is_correct(score) for score in (1.0, 0.99, 0.0)] == [True, False, False]


@pytest.mark.parametrize("length", range(3, 26))
def test_right_letters_followed_by_more_text_are_not_correct(spell, length):
    # 9, 11, 18, 20, 21 and 25 times 1/n add up to more than 1 in floating point.
    word = "abcdefghijklmnopqrstuvwxyz"[:length]
    assert is_correct(spell.score(spelled(word), word[::-1]))
    assert not is_correct(spell.score(spelled(word), word[::-1] + "s"))


def test_a_response_the_scorer_cannot_parse_scores_zero_and_is_told_once(caplog):
    primes = TaskMixture({"prime_factorization": TaskConfig()}, seed=1)
    primes.tasks["prime_factorization"]._has_warned = False
    caplog.clear()
    item = primes.item("train", 0)
    assert [primes.score(item, text) for text in (item.answer, "2 × two", "?")] == [1.0, 0.0, 0.0]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["tasks.prime_factorization"]


@pytest.mark.parametrize(
    ("scorer", "told"),
    [
        (lambda answer, entry: 1 / 0, r"tasks\.spell_backward: the scorer raised ZeroDivisionError.*gold answer too"),
        (lambda answer, entry: float("nan"), r"tasks\.spell_backward: the scorer gave nan for the response 'nus'"),
    ],
)
def test_a_broken_scorer_is_an_error_that_names_the_task(monkeypatch, scorer, told):
    broken = TaskMixture(SPELL, seed=1)
    monkeypatch.setattr(broken.tasks["spell_backward"]._dataset, "score_answer", scorer)
    with pytest.raises(RolloutError, match=told):
        broken.score(spelled("sun"), "nus")


def test_only_text_can_be_scored(spell):
    with pytest.raises(RolloutError, match=r"tasks\.spell_backward: a response of type list.*Decode"):
        spell.score(spelled("sun"), [1, 2])


def test_a_task_without_gold_answers_is_accepted():
    item = TaskMixture({"rush_hour": TaskConfig()}, seed=1).item("train", 0)
    assert item.answer == "" and not item.has_answer and item.entry["answer"] is None


def test_the_tables_name_tasks_that_exist():
    named = {*module.TABLE_TASKS, *module.EVAL_TASKS, *module.HASH_ORDER_TASKS}
    assert named <= set(module.DATASETS)
