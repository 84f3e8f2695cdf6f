"""Fields of a JSON object, taken by name and kind: the first that is not what it must be is named with its value."""

import difflib
import sys
from collections.abc import Callable
from typing import Any

from gspo_megatron.recipe.rollout_files import FORM
from gspo_megatron.tasks.data_files import BadRow, shortened

LARGEST_ID = 2**63  # int64
LARGEST = sys.float_info.max  # an integer of 400 digits is no float


class Fields:
    """The fields of one object of a record.

    `value`: what stands there; `where`: its own name, "" for the record itself. A field that is None is as good as
    left out, because Parquet gives every object the fields of all.

    Raises:
        BadRow: it is no object, lacks a field of `required`, or has one that is in neither tuple.
    """

    def __init__(self, value: Any, where: str, required: tuple[str, ...], known: tuple[str, ...] = ()):
        if not isinstance(value, dict):
            raise BadRow(f"{where} = {shortened(value)} must be a JSON object", FORM)
        self._value, self._prefix = value, f"{where}." if where else ""
        known = known or required
        for name in value:
            if name not in known and value[name] is not None:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"Did you mean {close[0]}?" if close else "Leave it out, or put it into columns."
                raise BadRow(f"{self._prefix}{name} is no field of a record", hint)
        for name in required:
            if value.get(name) is None:
                raise BadRow(f"{self._prefix}{name} is missing", FORM)

    def value(self, name: str) -> Any:
        """Return whatever a field holds; None where it is left out."""
        return self._value.get(name)

    def text(self, name: str) -> str:
        """Return a text that is not empty. Raises BadRow."""
        value = self._value[name]
        self._require(isinstance(value, str) and value != "", name, "must be text", "Give it in quotes.")
        return value

    def text_or_none(self, name: str) -> str | None:
        """Return a text, None where it is left out. Raises BadRow."""
        value = self.value(name)
        self._require(value is None or isinstance(value, str), name, "must be text", "Give it in quotes, or null.")
        return value

    def integer(self, name: str) -> int:
        """Return an integer of 0 or more. Raises BadRow."""
        self._require(_is_count(self._value[name]), name, "must be an integer of 0 or more", "Give a number.")
        return self._value[name]

    def number(self, name: str) -> float:
        """Return a finite number. Raises BadRow."""
        self._require(_is_finite(self._value[name]), name, "must be a finite number", "Give a number.")
        return float(self._value[name])

    def number_or_none(self, name: str) -> float | None:
        """Return a finite number, None where it is left out. Raises BadRow."""
        return None if self.value(name) is None else self.number(name)

    def table(self, name: str) -> dict[str, Any]:
        """Return an object of any fields, {} where it is left out. Raises BadRow."""
        value = self.value(name)
        self._require(value is None or isinstance(value, dict), name, "must be a JSON object", "Give {} for none.")
        return value or {}

    def numbers(self, name: str) -> dict[str, float]:
        """Return finite numbers by name, {} where it is left out. Raises BadRow."""
        given = {key: value for key, value in self.table(name).items() if value is not None}
        inner = Fields(given, f"{self._prefix}{name}", (), tuple(given))
        return {key: inner.number(key) for key in given}

    def token_ids(self, name: str) -> list[int]:
        """Return one token id or more. Raises BadRow."""
        value = self._list(name, "token ids")
        self._require(value != [], name, "is empty, must have a token id or more", "Leave the record out.")
        self._each(name, value, _is_count, "must be a token id, an integer of 0 or more")
        return value

    def integers_or_none(self, name: str) -> list[int] | None:
        """Return integers of 0 or more, None where they are left out. Raises BadRow."""
        return None if self.value(name) is None else self.integers(name)

    def finite_numbers(self, name: str) -> list[float]:
        """Return a list of finite numbers. Raises BadRow."""
        value = self._list(name, "numbers")
        self._each(name, value, _is_finite, "must be a finite number")
        return [float(one) for one in value]

    def integers(self, name: str) -> list[int]:
        """Return integers of 0 or more. Raises BadRow."""
        value = self._list(name, "integers")
        self._each(name, value, _is_count, "must be an integer of 0 or more")
        return value

    def logprobs(self, name: str, length: int) -> list[float] | None:
        """Return one log-prob a token, None where they are left out. Raises BadRow."""
        return self._by_token(name, length, "log-probs", _is_logprob, "must be a finite number, 0 or less")

    def mask(self, name: str, length: int) -> list[int] | None:
        """Return 0 or 1 a token, None where it is left out. Raises BadRow."""
        return self._by_token(name, length, "numbers", _is_bit, "must be 0 or 1")

    def _by_token(
        self, name: str, length: int, kind: str, is_good: Callable[[Any], bool], constraint: str
    ) -> list | None:
        if self.value(name) is None:
            return None
        value = self._list(name, kind)
        if len(value) != length:
            raise BadRow(
                f"{self._prefix}{name} has {len(value)} {kind} for {length} tokens, must have one a token",
                "Leave out those of the prompt, and give that of the last token.",
            )
        self._each(name, value, is_good, constraint)
        return value

    def _list(self, name: str, kind: str) -> list:
        value = self._value[name]
        self._require(isinstance(value, list), name, f"must be a list of {kind}", FORM)
        return value

    def _each(self, name: str, values: list, is_good: Callable[[Any], bool], constraint: str) -> None:
        if not all(map(is_good, values)):
            bad = next(place for place, value in enumerate(values) if not is_good(value))
            raise BadRow(f"{self._prefix}{name}[{bad}] = {shortened(values[bad])} {constraint}", "Repair the record.")

    def _require(self, ok: bool, name: str, constraint: str, remedy: str) -> None:
        if not ok:
            raise BadRow(f"{self._prefix}{name} = {shortened(self._value[name])} {constraint}", remedy)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < LARGEST_ID


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= LARGEST


def _is_logprob(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= 0


def _is_bit(value: Any) -> bool:
    return type(value) is int and value in (0, 1)
