"""What a user's reward function returned or raised becomes numbers or one line of text.

Like reward_functions.py, it imports nothing of torch; scores of numpy and torch are numbers all the same.
"""

import contextlib
import importlib
import math
import os
import sysconfig
import traceback
from typing import Any

FURTHER = 64  # numbers beside the score that are kept of one dict
LONGEST = 500  # characters of a message, and of a key
NOT_USERS = (os.path.dirname(__file__) + os.sep, importlib.__file__, "<frozen ")  # files in which no user's line is
INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
# Responses that take too long or end the process, for each that is asked at a time, until the rest is not tried.
IN_A_ROW, IN_ALL = 3, 16


class WrongValue(Exception):
    """What a function returned is no score; the text goes on after its name."""


def listed(value: Any, count: int) -> list[Any]:
    """Return what a function of TRL's form returned as a list. Raises WrongValue where it has not `count` entries."""
    if isinstance(value, str | bytes | dict) or not hasattr(value, "__iter__") or getattr(value, "ndim", 1) == 0:
        raise WrongValue(f"returned a value of type {type(value).__name__}, not a list of one number a response")
    values = list(value)
    if len(values) != count:
        raise WrongValue(f"returned {len(values)} scores in a call for {count} responses")
    return values


def score(value: Any) -> float | None:
    """Return a score, None for None. Raises WrongValue for anything else but a finite number."""
    return None if value is None else _number(value)


def _number(value: Any) -> float:
    is_one = hasattr(value, "__float__") or hasattr(value, "__index__")  # of numpy and torch, too
    if not is_one or isinstance(value, str | bytes) or getattr(value, "ndim", 0) != 0:
        raise WrongValue(f"returned a value of type {type(value).__name__} where a number belongs")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise WrongValue(f"returned {found}, which is not a finite number")
    return found


def further(values: dict) -> dict[str, float]:
    """Return the numbers beside the score, as many as are kept."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if len(found) == FURTHER:
            break
        if isinstance(key, str) and key != "score":
            with contextlib.suppress(Exception):  # a text, for example
                found[key[:LONGEST]] = _number(value)
    return found


def too_slow(seconds: float) -> str:
    """Say why a response has no score, after the function's name."""
    return f"gave no answer within {seconds:g} s (faults.reward_timeout)"


def untried(reason: str, count: int) -> str:
    """Say the same for a response that was not tried, because of so many others."""
    return f"{reason} for {count} other responses, so that this one was not tried"


def one_line(error: BaseException, file: str | None = None) -> str:
    """Show an exception with the innermost line of `file`, or else of all files that no package installed.

    A package may stand between an error and the line that made it: W&B has a sys.exit of its own.
    """
    try:
        text = " ".join(str(error).split())
    except Exception:  # an exception of the user's
        text = "(its message cannot be shown)"
    frames = traceback.walk_tb(error.__traceback__)
    places: list[tuple[str, int | None]] = [(frame.f_code.co_filename, line) for frame, line in frames]
    places = [place for place in places if not place[0].startswith(NOT_USERS)]
    own = [place for place in places if not place[0].startswith(INSTALLED)]
    places = [place for place in places if place[0] == file] or own or places
    if isinstance(error, SyntaxError) and os.path.isfile(error.filename or ""):  # the file itself, not what it reads
        text, places = error.msg, [(str(error.filename), error.lineno)]
    at = f" ({os.path.basename(places[-1][0])}, line {places[-1][1]})" if places else ""
    shown = f"{type(error).__name__}: {text}"[:LONGEST] if text else type(error).__name__
    return (shown + at).encode("utf-8", "replace").decode()
