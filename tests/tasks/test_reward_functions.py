"""Users' reward functions as the process finds, knows and calls them, by value."""

import functools
import sys

import numpy as np
import pytest

from gspo_megatron.tasks.reward_functions import MATH, TRL, VERL, LoadError, RewardFunction, Row, load, recognised
from gspo_megatron.tasks.reward_values import FURTHER, WrongValue, further, listed, one_line, score

MESSAGES = [{"role": "user", "content": "2 + 2?"}]
COLUMNS = {
    "prompt": "2 + 2?",
    "solution": "4",
    "level": 3,
    "data_source": "sums",
    "reward_model": {"style": "rule", "ground_truth": "four"},
    "extra_info": {"index": 7},
}


def row(text: str, prompt: object = "2 + 2?", columns: dict | None = None, gold: str | None = "4") -> Row:
    return Row(prompt, text, [5, 6], "mine", gold, COLUMNS if columns is None else columns, text)


def known(function) -> RewardFunction:
    return recognised("file.py:f", function)


# ---- The form ----


def test_the_form_is_told_by_the_parameters():
    class Callable:
        async def __call__(self, completions, **kwargs): ...

    async def verl_async(data_source, solution_str, ground_truth): ...

    forms = {
        lambda prompts, completions, **kwargs: []: (TRL, False),
        lambda completions, solution: []: (TRL, False),
        Callable(): (TRL, True),
        functools.partial(Callable(), scale=2): (TRL, True),
        lambda data_source, solution_str, ground_truth, extra_info=None: 0: (VERL, False),
        lambda solution_str, ground_truth, method="strict": 0: (VERL, False),  # verl's gsm8k.compute_score
        functools.partial(verl_async, data_source="x"): (VERL, True),
    }
    for function, form in forms.items():
        found = known(function)
        assert (found.form, found.is_async) == form
    assert known(lambda completions, solution, level=1, **kwargs: []).required == ("solution",)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: 0, r"f\(texts\) has neither of the two forms. Known are f\(prompts, completions, "),
        (lambda completions, trainer_state: 0, "wants trainer_state, which TRL's trainer gives, and nobody does here"),
        (lambda completions, log_metric, **kwargs: 0, "wants log_metric"),
        (lambda solution_str, tokenizer: 0, "wants tokenizer, which verl's form has not"),
        (dict.fromkeys, "has neither of the two forms"),
        (min, "does not tell its parameters"),
    ],
)
def test_a_form_that_is_not_known_is_refused(function, message):
    with pytest.raises(LoadError, match=message):
        known(function)


def test_what_trls_trainer_alone_has_is_left_to_its_default():
    function = known(lambda completions, trainer_state=None, log_extra=None: [float(trainer_state is None)])
    assert function.many([row("x")], COLUMNS) == [1.0]


# ---- Files and modules ----


def test_a_file_is_loaded_once_and_finds_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 5.0\n")
    mine = tmp_path / "json.py"  # a name that Python's library has
    mine.write_text(
        "import neighbour_of_mine\ndef a(completions): return [neighbour_of_mine.VALUE]\n"
        "def b(completions): return []\n"
    )
    a, b = load(f"{mine}:a"), load(f"{mine}:b")
    assert a.call.__globals__ is b.call.__globals__ and a.many([row("x")], ()) == [5.0]
    assert sys.modules["json"].__name__ == "json" and sys.modules["json"].loads("1") == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_package_of_mine").mkdir()
    (tmp_path / "a_package_of_mine" / "scores.py").write_text("def f(completions): return [2.0]\n")
    assert load("a_package_of_mine.scores:f").many([row("x")], ()) == [2.0]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("import no_such_thing", "f", r"ModuleNotFoundError: No module named 'no_such_thing' \(r\d+.py, line 1\)"),
        ("\ndef f(:\n  pass", "f", r"SyntaxError: .* \(r\d+.py, line 2\)"),
        ("import sys\nsys.exit(2)", "f", r"it cannot be imported: SystemExit: 2 \(r\d+.py, line 2\). Correct it."),
        ("import json\njson.loads('')", "f", r"JSONDecodeError: .* \(r\d+.py, line 2\). Correct it."),
        ("def exact_number(completions): pass", "exact_numbr", "has no exact_numbr. Did you mean exact_number?"),
        ("x = 1", "f", "has no f. It has no function."),
        ("f = 1", "f", "f is a value of type int, not a function"),
    ],
)
def test_what_cannot_be_loaded_says_why(tmp_path, monkeypatch, text, name, message, request):
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / f"r{list(request.node.callspec.indices.values())[0]}.py"
    path.write_text(text)
    with pytest.raises(LoadError, match=message):
        load(f"{path}:{name}")
    sys.modules.pop(path.stem, None)


def test_what_is_not_there_says_so(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(LoadError, match=r"there is no file /nowhere/x.py"):
        load("/nowhere/x.py:f")
    with pytest.raises(LoadError, match="ModuleNotFoundError: No module named 'no_such_package'"):
        load("no_such_package.scores:f")


# ---- Calls ----


def test_trls_form_gets_columns_as_lists_and_only_those_that_it_names():
    seen = {}

    def f(prompts, completions, solution, missing="default", **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, solution=solution, missing=missing)

    rows = [row("a"), row("b", columns={**COLUMNS, "solution": "5"})]
    known(f).many(rows, COLUMNS)
    assert seen["prompts"] == ["2 + 2?"] * 2 and seen["completions"] == ["a", "b"]
    assert seen["completion_ids"] == [[5, 6]] * 2 and seen["solution"] == ["4", "5"]
    assert seen["level"] == [3, 3] and seen["missing"] == "default" and "prompt" not in seen
    assert known(lambda completions, level: [completions, level]).many(rows, COLUMNS) == [["a", "b"], [3, 3]]


def test_completions_of_conversations_are_messages():
    rows = [row("a", MESSAGES), row("b", MESSAGES)]
    prompts, completions = known(lambda prompts, completions: (prompts, completions)).many(rows, COLUMNS)
    assert prompts == [MESSAGES, MESSAGES]
    assert completions == [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]


def test_verls_form_gets_its_four_arguments_or_those_that_it_has():
    whole = known(lambda data_source, solution_str, ground_truth, extra_info=None: locals())
    given = {"data_source": "sums", "solution_str": "x", "ground_truth": "four", "extra_info": {"index": 7}}
    assert whole.one(row("x"), COLUMNS) == given
    bare = {"data_source": "mine", "solution_str": "x", "ground_truth": "4", "extra_info": {}}
    assert whole.one(row("x", columns={}), ()) == bare
    assert known(lambda solution_str, ground_truth: locals()).one(row("x"), ()) == {
        "solution_str": "x",
        "ground_truth": "four",
    }


@pytest.mark.parametrize(
    ("gold", "text", "reward"),
    [
        ("42", "I think it is 42", 1.0),
        ("42", "I think it is 43", 0.0),
        ("\\frac{1}{2}", "so \\boxed{0.5}", 1.0),
        ("2\\pi", "so \\boxed{2}", 0.0),  # a gold answer in LaTeX is read to its end
        ("$x^2$", "\\boxed{x \\cdot x}", 1.0),
        ("42", "", 0.0),
    ],
)
def test_math_verify(gold, text, reward):
    function = load("math_verify")
    assert function.form == MATH and function.judged(function.one(row(text, gold=gold), ())) == (reward, {})


def test_math_verify_without_an_answer():
    function = load("math_verify")
    assert function.one(row("4")._replace(answer=None), ()) == 0.0  # the extractor found none
    with pytest.raises(WrongValue, match="found no gold answer"):
        function.one(row("4", gold=None), ())


def test_math_verify_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(LoadError, match=r"Run: pip install 'gspo-megatron\[math\]'"):
        load("math_verify")


# ---- Values ----


@pytest.mark.parametrize(
    ("value", "number"),
    [(1, 1.0), (True, 1.0), (-2.5, -2.5), (np.float32(0.5), 0.5), (np.array(3), 3.0), (None, None)],
)
def test_what_is_a_score(value, number):
    assert score(value) == number


@pytest.mark.parametrize("value", ["1", float("nan"), float("inf"), 10**400, [1.0], {}, 1j, np.ones(1), np.str_("1")])
def test_what_is_no_score(value):
    with pytest.raises(WrongValue, match="returned (a value of type|nan|inf)"):
        score(value)


def test_lists_of_scores():
    assert listed([1, None], 2) == [1, None] == listed((1, None), 2) and listed(np.ones(3), 3) == [1, 1, 1]
    for value in (1.0, "ab", {"a": 1, "b": 2}, None, np.array(1.0)):
        with pytest.raises(WrongValue, match="not a list of one number a response"):
            listed(value, 2)
    with pytest.raises(WrongValue, match="returned 1 scores in a call for 2 responses"):
        listed([1.0], 2)


def test_further_numbers_of_a_dict():
    function = known(lambda solution_str: 0)
    found = function.judged({"score": 0.5, "acc": True, "pred": "x", "n": np.int64(3), "bad": float("nan"), 4: 1.0})
    assert found == (0.5, {"acc": 1.0, "n": 3.0})
    assert len(further({f"key{number}": number for number in range(10**5)})) == FURTHER
    with pytest.raises(WrongValue, match="returned a dict without 'score'"):
        function.judged({"reward": 1.0})


def test_an_error_is_one_line_with_the_innermost_line_of_the_users_file():
    class Worst(Exception):
        def __str__(self):
            raise ValueError

    function = known(lambda solution_str: int("x\ny"))
    line = test_an_error_is_one_line_with_the_innermost_line_of_the_users_file.__code__.co_firstlineno + 5
    try:
        function.one(row("x"), ())
    except ValueError as error:
        place = f"(test_reward_functions.py, line {line})"
        assert function.why(error) == rf"raised ValueError: invalid literal for int() with base 10: 'x\ny' {place}"
    assert one_line(Worst()) == "Worst: (its message cannot be shown)"
    assert len(one_line(ValueError("x" * 10**6))) < 600
    assert one_line(SystemExit()) == "SystemExit"
