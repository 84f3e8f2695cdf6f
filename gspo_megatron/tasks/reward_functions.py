"""Users' reward functions, in the process of their own: found, known by their parameters, and called.

A function has TRL's form, `f(prompts, completions, **columns)` with lists of one entry a response, or verl's,
`compute_score(data_source, solution_str, ground_truth, extra_info=None)` for one response. Arguments go by name, and
only those that it takes. math_verify is built in.

Nothing of torch or Megatron is imported, so the process is up in a second. Left out: what only a trainer of TRL or a
server of verl could give (TRAINERS).
"""

import difflib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gspo_megatron.tasks.reward_values import LONGEST, WrongValue, further, listed, one_line, score

TRL, VERL, MATH = "TRL's", "verl's", "built-in"
FORMS = "Known are f(prompts, completions, **columns) and compute_score(data_source, solution_str, ground_truth)."
GIVEN = {
    TRL: ("prompts", "completions", "completion_ids"),
    VERL: ("data_source", "solution_str", "ground_truth", "extra_info"),
}
COLUMNS = {VERL: ("data_source", "reward_model", "extra_info"), MATH: ()}
TRAINERS = ("trainer_state", "log_extra", "log_metric", "environments")  # that TRL's trainer alone can give
OF_PROMPT = ("prompt", "completion")  # columns that TRL keeps from functions, unless they are named
DELIMITERS = ("$", "\\(", "\\[", "\\begin", "\\boxed")  # by which math-verify finds LaTeX


class LoadError(Exception):
    """A function that cannot be used; the text says why, and what to do."""


class Row(NamedTuple):
    """One response with its row of data, as it is sent to the process."""

    prompt: Any  # a text or messages, as the data have it
    text: str  # the whole response
    token_ids: list[int]
    task: str
    gold: str | None
    columns: dict[str, Any]
    answer: str | None  # what math_verify judges; None: the response has no answer
    messages: tuple[dict[str, str], ...] = ()  # of an episode, all behind the prompt


@dataclass(frozen=True)
class RewardFunction:
    """A function that was found, and how it wants to be called."""

    target: str
    call: Callable[..., Any]
    form: str
    is_async: bool = False
    takes: tuple[str, ...] | None = ()  # its parameters; None: **kwargs, so everything
    required: tuple[str, ...] = ()  # columns without which it cannot be called

    def one(self, row: Row, columns: Iterable[str]) -> Any:
        """Call it for one response; the result is for `judged`, and awaited before where the function is async."""
        if self.form == MATH:
            return self.call(row)
        return self.call(**self.taken(_of_verl(row))) if self.form == VERL else self.many([row], columns)

    def many(self, rows: Sequence[Row], columns: Iterable[str]) -> Any:
        """Call it, of TRL's form, for all of these responses at once.

        Args:
            columns: names of the data's columns.
        """
        own = set(columns) - set(GIVEN[TRL])
        if self.takes is None:
            own -= set(OF_PROMPT) - set(self.required)
        names = own if self.takes is None else own.intersection(self.takes)
        given: dict[str, list] = {
            "prompts": [row.prompt for row in rows],
            "completions": [_completion(row) for row in rows],
            "completion_ids": [row.token_ids for row in rows],
        }
        return self.call(**self.taken(given), **{name: [row.columns.get(name) for row in rows] for name in names})

    def taken(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that it takes."""
        return given if self.takes is None else {name: given[name] for name in given if name in self.takes}

    def judged(self, value: Any) -> tuple[float | None, dict[str, float]]:
        """Return the score of what it returned for one response, None where it does not apply, and further numbers.

        Raises:
            WrongValue: it is none.
        """
        if self.form == TRL:
            return score(listed(value, 1)[0]), {}
        if not isinstance(value, dict):
            return score(value), {}
        if "score" not in value:
            raise WrongValue("returned a dict without 'score'")
        return score(value["score"]), further(value)

    def why(self, error: BaseException) -> str:
        """Say in one line, that goes on after its name, what went wrong in a call."""
        return str(error) if isinstance(error, WrongValue) else f"raised {one_line(error, _file(self.call))}"


# ---- Finding a function ----


def load(target: str) -> RewardFunction:
    """Return the function that a recipe names: math_verify, "file.py:function" or "module:function".

    Raises:
        LoadError: it cannot be found, or has no form that is known.
    """
    if target == "math_verify":
        return RewardFunction(target, _math_verify(), MATH)
    function, name = named(target, "function"), target.rpartition(":")[2]
    if not callable(function):
        raise LoadError(f"{name} is a value of type {type(function).__name__}, not a function. {FORMS}")
    return recognised(target, function)


def recognised(target: str, function: Callable[..., Any]) -> RewardFunction:
    """Return a function with its form, which its parameters tell.

    Raises:
        LoadError: it has none, or wants an argument that nobody gives.
    """
    name = target.rpartition(":")[2]
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise LoadError(f"{name} does not tell its parameters. {FORMS}") from None
    parameters = signature.parameters
    form = TRL if "completions" in parameters else VERL if "solution_str" in parameters else None
    if form is None:
        raise LoadError(f"{name}{signature} has neither of the two forms. {FORMS}")
    takes, needed = asked_for(parameters.values())
    required = tuple(one for one in needed if one not in GIVEN[form])
    missing = [one for one in required if form == VERL or one in TRAINERS]
    if missing:
        whose = "TRL's trainer gives" if form == TRL else "verl's form has not"
        raise LoadError(
            f"{name}{signature} wants {', '.join(missing)}, which {whose}, and nobody does here. Give it a default."
        )
    return RewardFunction(target, function, form, is_async(function), takes, required)


def asked_for(parameters: Iterable[inspect.Parameter]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Return the names that a call may give, None where **kwargs takes all, and those that it must give."""
    given = list(parameters)
    plain = [one for one in given if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    takes_all = any(one.kind == one.VAR_KEYWORD for one in given)
    takes = None if takes_all else tuple(one.name for one in plain)
    return takes, tuple(one.name for one in plain if one.default is one.empty)


def named(target: str, kind: str) -> Any:
    """Return what "file.py:name" or "module:name" names.

    Args:
        kind: of thing that is wanted, for the message where there is none.

    Raises:
        LoadError: it cannot be found.
    """
    where, _, name = target.rpartition(":")
    module = _module(where)
    if not hasattr(module, name):
        known = [other for other, value in vars(module).items() if callable(value) and not other.startswith("_")]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {close[0]}?" if close else f"It has {', '.join(known) or f'no {kind}'}."
        raise LoadError(f"{where} has no {name}. {hint}")
    return getattr(module, name)


def _module(where: str) -> types.ModuleType:
    """The module of a file, or of a name as Python finds it from the working directory."""
    is_file = where.endswith(".py") or os.sep in where
    if is_file and not os.path.isfile(where):
        raise LoadError(f"there is no file {where}. Correct the path.")
    sys.path.insert(0, os.path.dirname(where) if is_file else os.getcwd())
    try:
        return _run_file(where) if is_file else importlib.import_module(where)
    except BaseException as error:  # a module may well call exit()
        raise LoadError(f"it cannot be imported: {one_line(error)}. Correct it.") from None


def _run_file(path: str) -> types.ModuleType:
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == path:  # of another function
            return module
    stem = os.path.splitext(os.path.basename(path))[0]
    is_taken = stem in sys.modules or stem in sys.stdlib_module_names
    name = f"_reward_{stem}" if is_taken else stem  # as which its neighbours can import it
    loader = importlib.machinery.SourceFileLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None  # it has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # for dataclasses and pickle, which look there
    loader.exec_module(module)
    return module


def is_async(function: Any) -> bool:
    """Tell whether a call of it is to be awaited."""
    function = _whole(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _whole(function: Any) -> Any:
    """The function of which a functools.partial is one."""
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _file(function: Any) -> str | None:
    """The file that a function is written in."""
    function = inspect.unwrap(_whole(function))
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return None if code is None else code.co_filename


# ---- What goes in ----


def _completion(row: Row) -> Any:
    """As TRL has it: a text where the prompt is one, else messages."""
    if isinstance(row.prompt, str):
        return row.text
    return [dict(message) for message in row.messages] or [{"role": "assistant", "content": row.text}]


def _of_verl(row: Row) -> dict[str, Any]:
    """The arguments of verl's form. Without an extra_info verl gives {}."""
    model = row.columns.get("reward_model")
    has_truth = isinstance(model, dict) and "ground_truth" in model
    return {
        "data_source": row.columns.get("data_source", row.task),
        "solution_str": row.text,
        "ground_truth": model["ground_truth"] if has_truth else row.gold,  # type: ignore[index]
        "extra_info": row.columns.get("extra_info", {}),
    }


def delimited(answer: str) -> str:
    """Return an answer that stands alone so that math-verify reads it as LaTeX."""
    return answer if any(mark in answer for mark in DELIMITERS) else f"\\boxed{{{answer}}}"


def _math_verify() -> Callable[[Row], float]:
    try:
        package = importlib.import_module("math_verify")
    except ImportError:
        raise LoadError("math-verify is not installed. Run: pip install 'gspo-megatron[math]'") from None

    def judge(row: Row) -> float:
        if row.gold is None:
            raise WrongValue("found no gold answer to compare with")
        gold = package.parse(delimited(row.gold)) or package.parse(row.gold)
        if not gold:
            raise WrongValue(f"cannot read the gold answer {row.gold[:LONGEST]!r}")
        return 1.0 if row.answer is not None and package.verify(gold, package.parse(row.answer)) else 0.0

    return judge
