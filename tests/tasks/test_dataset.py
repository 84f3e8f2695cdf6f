"""Tasks of data sets: what a row gives, how rows are shared out and ordered, and every way a row can be wrong."""

import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from gspo_megatron.batch import Response, Score
from gspo_megatron.config import AnswerConfig, TaskConfig
from gspo_megatron.config.task import RewardConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.tasks.dataset import DatasetTask

REWARD = (RewardConfig("math_verify"),)
ASKED = [{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}]


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task(data: Path, held_out: Path | None = None, seed: int = 1, **fields) -> DatasetTask:
    return DatasetTask("t", TaskConfig(data=data, eval_data=held_out, reward=REWARD, **fields), seed, None)


def of_rows(folder: Path, rows: list[dict], **fields) -> DatasetTask:
    """A task with these rows to train on, and one held out."""
    held_out = lines(folder / "held.jsonl", [rows[0]])
    return task(lines(folder / "rows.jsonl", rows), held_out, **fields)


def numbered(count: int) -> list[dict]:
    return [{"prompt": f"q{number}"} for number in range(count)]


def questions(given: DatasetTask, split: str, epoch: int = 0) -> list[str]:
    size = given.size(split)
    return [given.item(split, epoch * size + place).question for place in range(size)]


def test_a_text_is_a_prompt(tmp_path):
    row = {"prompt": " 2 + 2?\n", "solution": "4", "more": [1]}
    item = of_rows(tmp_path, [row]).item("train", 0)
    assert (item.task, item.question, item.messages, item.answer) == ("t", " 2 + 2?\n", (), "4")
    assert item.has_answer and item.entry == row and item.epoch == 0


def test_messages_are_a_prompt(tmp_path):
    """Fields that are null in Parquet, because another message has them, are none."""
    path = tmp_path / "rows.parquet"
    messages = [message | {"name": None} for message in ASKED]
    kind = pyarrow.struct([(name, pyarrow.string()) for name in ("role", "content", "name")])
    parquet.write_table(pyarrow.table({"chat": pyarrow.array([messages], pyarrow.list_(kind))}), path)
    item = task(path, path, prompt_key="chat").item("eval", 0)
    assert item.question == "Think.\n\n2 + 2?" and item.messages == tuple(ASKED) == item.conversation
    assert (item.answer, item.has_answer) == ("", False) and item.entry == {"chat": messages}


VERL = {
    "data_source": "openai/gsm8k",
    "prompt": ASKED,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train", "index": 0, "answer": "48 + 24 = 72"},
}


@pytest.mark.parametrize(
    ("row", "answer", "expected"),
    [
        (VERL, {}, "72"),
        (VERL | {"solution": "other"}, {}, "72"),
        (VERL | {"reward_model": {"ground_truth": ["72"]}, "answer": 7}, {}, "7"),
        ({"prompt": "a", "solution": "1", "answer": "2", "ground_truth": "3"}, {}, "1"),
        ({"prompt": "a", "solution": None, "answer": 2.5}, {}, "2.5"),
        ({"prompt": "a", "ground_truth": "3"}, {}, "3"),
        ({"prompt": "a", "completion": "b"}, {}, None),
        ({"prompt": "a", "answer": " "}, {}, None),
        ({"prompt": "a", "answer": True}, {}, None),
        ({"prompt": "a", "answer": "1", "gold": 0}, {"column": "gold"}, "0"),
        ({"prompt": "a", "answer": "#### 3 is wrong\n#### 72 \n"}, {"after": "####"}, "72"),
        (VERL | {"reward_model": {"ground_truth": "A: 5"}}, {"after": "A:"}, "5"),
    ],
)
def test_gold_answers(tmp_path, row, answer, expected):
    item = of_rows(tmp_path, [row], answer=AnswerConfig(**answer)).item("train", 0)
    assert item.answer == (expected or "") and item.has_answer == (expected is not None)
    assert item.entry == row


def message(**fields) -> dict:
    return {"prompt": [{"role": "user", "content": "a"} | fields]}


def episode(*roles: str | int) -> dict:
    return {
        "prompt": "a",
        "gold": [{"role": role, "content": "b"} if isinstance(role, str) else role for role in roles],
    }


GOLD = {"column": "gold"}
CALLING = {"role": "assistant", "content": "b", "tool_calls": [{"function": {"name": "add"}}]}
BAD_ROWS = {
    "no column": ({"promt": "a", "id": 1}, "has no column prompt, only promt, id. Did you mean promt? Give tasks.t.pr"),
    "no columns": ({}, "has no column prompt, it is empty. Give tasks.t.prompt_key"),
    "null": ({"prompt": None}, "prompt = None must be a text or a list of messages"),
    "number": ({"prompt": 4}, "prompt = 4 must be a text or a list of messages"),
    "no message": ({"prompt": []}, "prompt = [] must be a text or a list of messages"),
    "empty": ({"prompt": " \n"}, "prompt = ' \\n' is empty"),
    "surrogate": ({"prompt": "\ud800"}, "half of a surrogate pair"),
    "text in a list": ({"prompt": ["a"]}, "prompt[0] = 'a' must be a message with role and content"),
    "other names": ({"prompt": [{"from": "human", "value": "a"}]}, "prompt[0].role = None must be one of system, user"),
    "role": (message(role="User"), "prompt[0].role = 'User' must be one of system, user, assistant, tool"),
    "parts": (message(content=[{"type": "image"}]), "must be text, and this project takes text alone"),
    "empty message": (message(content=""), "prompt[0].content = '' is empty"),
    "tool call": (message(tool_calls=[1]), "prompt[0] has tool_calls, which the model would not get to see"),
    "assistant": (message(role="assistant"), "prompt ends with a message of the assistant"),
    "surrogate in an answer": ({"prompt": "a", "answer": "\udfff"}, "answer = '\\udfff' has half of a surrogate pair"),
}
BAD_ANSWERS = {
    "no column": ({"prompt": "a", "gold": "1"}, {"column": "golf"}, "has no column golf, only prompt, gold. Did you"),
    "null": ({"prompt": "a", "gold": None}, {"column": "gold"}, "gold = None must be a text or a number"),
    "list": ({"prompt": "a", "gold": ["1"]}, {"column": "gold"}, "gold = ['1'] must be a text or a number"),
    "no messages": (episode("assistant", 4, "assistant"), GOLD, "gold[1] = 4 must be a message with role and content"),
    "begins with a user": (episode("user", "assistant"), GOLD, "gold must begin and end with a message of the assis"),
    "ends with a tool": (episode("assistant", "tool"), GOLD, "must begin and end with a message of the assistant"),
    "two answers": (episode("assistant", "assistant"), GOLD, "something that a user or tool says between two messages"),
    "system": (episode("assistant", "system", "assistant"), GOLD, "a user or tool says between two messages of the as"),
    "after": (episode("assistant"), GOLD | {"after": "#"}, "has messages, in which no answer is looked for. Remove t"),
    "calls": ({"prompt": "a", "gold": [CALLING]}, GOLD, "gold[0] has tool_calls, which the model would not get to see"),
    "no mark": ({"prompt": "a", "answer": "4"}, {"after": "####"}, "answer = '4' has no answer after '####'"),
    "nothing after": ({"prompt": "a", "answer": "1 #### "}, {"after": "####"}, "has no answer after '####'"),
    "none at all": ({"prompt": "a"}, {"after": "####"}, "answer = '' has no answer after '####'"),
}


def test_a_gold_answer_may_be_an_episode(tmp_path):
    """Its last message is the answer; a tool's name is kept, and fields that are null are none."""
    said = [
        {"role": "assistant", "content": "add(1, 2)", "name": None},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "It is 3."},
    ]
    item = of_rows(tmp_path, [{"prompt": "1 + 2?", "gold": said}], answer=AnswerConfig("gold")).item("warm_start", 0)
    assert (item.answer, item.has_answer) == ("It is 3.", True)
    assert item.episode == ({"role": "assistant", "content": "add(1, 2)"}, *said[1:])


def test_scorers_get_the_usual_answer_beside_an_episode(tmp_path):
    said = [{"role": "assistant", "content": "It is 3."}]
    for column in ({"answer": "3"}, {"solution": "3"}, {"reward_model": {"ground_truth": "3"}}):
        row = {"prompt": "1 + 2?", "gold": said, **column}
        assert of_rows(tmp_path, [row], answer=AnswerConfig("gold")).item("warm_start", 0).answer == "3"


@pytest.mark.parametrize(
    ("row", "answer", "text"),
    [(row, {}, text) for row, text in BAD_ROWS.values()] + list(BAD_ANSWERS.values()),
    ids=[*BAD_ROWS, *(f"answer: {name}" for name in BAD_ANSWERS)],
)
def test_a_bad_row_is_named_or_left_out(tmp_path, row, answer, text):
    """Line 2 of 3 is bad; left out, 2 rows are trained on, and a note says which one is not."""
    good = {"prompt": "fine", "answer": "x #### 1", "gold": "#### 1", "golf": "1"}
    path = lines(tmp_path / "a.jsonl", [good, row, good])
    held_out = lines(tmp_path / "held.jsonl", [good])
    with pytest.raises(ConfigError) as error:
        task(path, held_out, answer=AnswerConfig(**answer))
    assert str(error.value).startswith(f"tasks.t.data = '{path}, line 2': ") and text in str(error.value)
    assert str(error.value).endswith(".") and str(error.value).count(". ") >= 1  # a remedy follows
    rest = task(path, held_out, answer=AnswerConfig(**answer), bad_rows="drop")
    assert rest.size("train") == 2
    assert [note for note in rest.notes() if f"1 bad rows left out (bad_rows: drop), the first: {path}, line 2" in note]


def test_bad_rows_of_both_kinds_are_counted(tmp_path):
    """Line 2 is no JSON, lines 3 to 5 have no prompt: 4 bad ones, of which 3 are told. None good: an error."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a"}\n{\n{"x": 1}\n{"x": 1}\n{"x": 1}\n')
    note = task(path, lines(tmp_path / "b.jsonl", numbered(1)), bad_rows="drop").notes()[1]
    assert note.startswith("tasks.t.data: 4 bad rows left out (bad_rows: drop), the first: ")
    assert all((f"line {number}: " in note) == (number in (2, 3, 4)) for number in range(1, 6))
    bad = lines(tmp_path / "c.jsonl", [{"x": 1}] * 3)
    with pytest.raises(
        ConfigError, match=r"eval_data = .*none of its 3 rows can be used, the first is .*, line 1: has"
    ):
        task(path, bad, bad_rows="drop")


def test_an_eighth_is_held_out_by_a_hash_of_the_prompt(tmp_path):
    """Of q0 to q19 that hash holds out q13 and q19, wherever their rows stand and as often as they do."""
    rows = numbered(20) + numbered(20)
    given = task(lines(tmp_path / "a.jsonl", rows))
    turned = task(lines(tmp_path / "b.jsonl", rows[::-1]), seed=2)
    assert questions(given, "eval") == ["q13", "q19"] * 2 and questions(turned, "eval") == ["q19", "q13"] * 2
    rest = sorted(row["prompt"] for row in rows if row["prompt"] not in ("q13", "q19"))
    assert sorted(questions(given, "train")) == rest == sorted(questions(turned, "train"))


def test_the_share_that_is_held_out(tmp_path):
    """2 of 16 buckets: of 2,000 prompts 250 on average, with a standard deviation of 15; 4 of them either way."""
    given = task(lines(tmp_path / "a.jsonl", numbered(2000)))
    assert 190 <= given.size("eval") <= 310 and given.size("train") == 2000 - given.size("eval")


def test_rows_that_cannot_be_shared_out(tmp_path):
    """q0 is no prompt that is held out."""
    path = lines(tmp_path / "a.jsonl", numbered(1) * 5)
    with pytest.raises(
        ConfigError, match=r"eval_data = None: .*of its 5 rows that leaves 5 to train on and 0 held out"
    ):
        task(path)


def test_training_goes_through_epochs_of_permutations(tmp_path):
    """Each epoch has every one of 20 rows once, in an order of its own, that seed and name rule."""
    rows = numbered(20)
    given = of_rows(tmp_path, rows)
    first, second = questions(given, "train"), questions(given, "train", epoch=1)
    in_order = [row["prompt"] for row in rows]
    assert sorted(first) == sorted(second) == sorted(in_order) and len({*map(tuple, (first, second, in_order))}) == 3
    again = of_rows(tmp_path, rows)
    assert questions(again, "train", epoch=1) == second and questions(again, "train") == first
    assert questions(of_rows(tmp_path, rows, seed=2), "train") != first
    assert [given.item("train", index).epoch for index in (0, 19, 20, 59)] == [0, 0, 1, 2]


def test_other_splits_are_in_the_order_of_the_file(tmp_path):
    """Rows 1 and 3 of 4 have an answer; item 5 of 2 rows is the second, for the third time."""
    rows = [row | ({"answer": "1"} if number % 2 else {}) for number, row in enumerate(numbered(4))]
    given = task(lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "b.jsonl", numbered(3)))
    assert questions(given, "warm_start") == ["q1", "q3"] and questions(given, "eval") == ["q0", "q1", "q2"]
    item = given.item("warm_start", 5)
    assert (item.question, item.epoch) == ("q3", 2) and given.where("warm_start", 5) == f"{tmp_path}/a.jsonl, line 4"
    for split, index in (("test", 0), ("train", -1)):
        with pytest.raises(ValueError, match="split must be one of"):
            given.item(split, index)


def test_a_warm_start_needs_answers(tmp_path):
    given = of_rows(tmp_path, numbered(2))
    assert given.size("warm_start") == 0
    with pytest.raises(ConfigError, match=r"tasks.t.answer.column = None: no row to train on has a gold answer"):
        given.item("warm_start", 0)


def test_keep_leaves_out_what_does_not_fit(tmp_path):
    """Of 12 + 12 prompts q0 to q11, q10 and q11 are too long: 4 in all; 20 are left, 10 on each side."""
    rows = [row | {"answer": "1"} for row in numbered(12)]
    given = task(lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "b.jsonl", rows))
    questions(given, "train")
    before = given.fingerprint()
    assert given.keep([len(row.item.question) < 3 for row in given.every()]) == 4
    assert [given.size(split) for split in ("train", "warm_start", "eval")] == [10, 10, 10]
    assert sorted(questions(given, "train")) == questions(given, "eval") == [f"q{number}" for number in range(10)]
    assert given.keep([True] * len(given.every())) == 0 and given.fingerprint() == before
    with pytest.raises(ConfigError, match=r"tasks.t.data = .*no prompt is left for train, all 10 are left out"):
        given.keep([False] * len(given.every()))


def test_keep_names_the_held_out_rows(tmp_path):
    given = task(lines(tmp_path / "a.jsonl", numbered(2)), lines(tmp_path / "b.jsonl", [{"prompt": "long"}]))
    with pytest.raises(ConfigError, match=r"tasks.t.eval_data = '.*b.jsonl': no prompt is left for eval"):
        given.keep([row.item.question != "long" for row in given.every()])


def test_repeated_prompts_are_told(tmp_path):
    """q0 stands three times in data, which is 2 too many; of the held-out q5, q1, q0 two are trained on."""
    rows = numbered(3) + numbered(1) + numbered(1)
    held_out = lines(tmp_path / "b.jsonl", [{"prompt": f"q{number}"} for number in (5, 1, 0)])
    notes = task(lines(tmp_path / "a.jsonl", rows), held_out).notes()
    assert notes[:2] == [f"tasks.t.data: 5 rows of {tmp_path}/a.jsonl.", f"tasks.t.eval_data: 3 rows of {held_out}."]
    assert "2 rows to train on have the prompt of an earlier one" in notes[2]
    assert "2 of its prompts are in data too" in notes[3] and notes[3].endswith(f"the first is {held_out}, line 2.")


def test_notes_without_eval_data(tmp_path):
    given = task(lines(tmp_path / "a.jsonl", numbered(50)))
    assert f"{given.size('eval')} of the rows are held out, by a hash of the prompt" in given.notes()[1]
    assert len(given.notes()) == 2


def test_the_fingerprint_follows_the_files(tmp_path):
    """3 rows to train on and 1 held out are 4."""
    given = of_rows(tmp_path, numbered(3)).fingerprint()
    assert given["rows"] == 4 and given == of_rows(tmp_path, numbered(3)).fingerprint()
    other = of_rows(tmp_path, numbered(2)).fingerprint()
    assert other["rows"] == 3 and other["digest"] != given["digest"] and other["eval_digest"] == given["eval_digest"]
    assert task(lines(tmp_path / "c.jsonl", numbered(50))).fingerprint()["eval_digest"] is None


class Lengths:
    """Scores a response by its length."""

    closed = False

    def score(self, responses, told):
        told(len(responses))
        return [Score(float(len(response.text))) for response in responses]

    def close(self):
        self.closed = True


def test_scores_are_those_of_the_rewards(tmp_path):
    path, rewards, done = lines(tmp_path / "a.jsonl", numbered(1)), Lengths(), []
    config = TaskConfig(data=path, eval_data=path, reward=REWARD)
    given = DatasetTask("t", config, 1, rewards)
    responses = [Response(given.item("train", 0), text, []) for text in ("ab", "c")]
    assert given.score(responses, done.append) == [Score(2.0), Score(1.0)] and done == [2]
    given.close()
    assert rewards.closed
    without = DatasetTask("t", config, 1, None)
    with pytest.raises(ValueError, match="tasks.t was built without its rewards"):
        without.score(responses, done.append)
    without.close()


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(ConfigError, match=r"tasks.t.answer.after = '': must not be empty"):
        of_rows(tmp_path, numbered(1), answer=AnswerConfig(after=""))
    with pytest.raises(ValueError, match="has no data"):
        DatasetTask("t", TaskConfig(), 1, None)
