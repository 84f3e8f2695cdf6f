"""Calls of tools in a response, in Hermes' and Qwen's form: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

A call that cannot be read is one all the same: what is wrong with it is what the model gets for an answer. Left out:
the other ways of writing (Llama's, Mistral's, pythonic ones, XML), which are refused at the start by a template that
teaches them (data/turns.py).
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, get_origin, get_type_hints

from gspo_megatron.utils.plain_json import parse

# What JSON has, by the annotation of an argument.
TYPES: dict[Any, tuple[type, ...]] = {
    int: (int,), float: (int, float), str: (str,), bool: (bool,), list: (list,), dict: (dict,),
}  # fmt: skip
CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


class BadCall(Exception):
    """A call that cannot be made; the text is for the model."""


@dataclass(frozen=True)
class ToolCall:
    """A call as it was written."""

    text: str

    @property
    def name(self) -> str:
        """Return the tool's name, "" where none can be read."""
        try:
            return str(self._read().get("name", ""))
        except BadCall:
            return ""

    def checked(self, tools: Collection[str]) -> tuple[str, dict[str, Any]]:
        """Return the tool and its arguments. Raises BadCall."""
        read = self._read()
        name, arguments = read.get("name"), read.get("arguments", {})
        if name not in tools:
            raise BadCall(f"there is no tool {name!r}; there are {', '.join(tools)}")
        if not isinstance(arguments, dict):
            raise BadCall("arguments must be an object")
        return str(name), arguments

    def _read(self) -> dict[str, Any]:
        try:
            value = parse(self.text.strip().encode())
        except ValueError as error:
            raise BadCall(f"the call is no JSON ({error!s:.200})") from None
        if not isinstance(value, dict):
            raise BadCall("the call is no JSON object")
        return value


def check_types(name: str, method: Callable, arguments: dict[str, Any]) -> None:
    """Raise BadCall for an argument of another type than the tool says; what JSON has no one type for is not looked at.

    A model writes these, and Python's operators take nearly everything: "x" * 10**9 is a gigabyte.
    """
    try:
        hints = get_type_hints(method)
    except Exception:  # annotations that name nothing: there is no type to hold an argument to
        return
    for argument, value in arguments.items():
        wanted = get_origin(hints.get(argument)) or hints.get(argument)
        if wanted is None or wanted not in TYPES:
            continue
        is_fit = isinstance(value, TYPES[wanted]) and (wanted is bool or not isinstance(value, bool))
        if not is_fit:
            raise BadCall(f"{name}: {argument} = {value!r:.60} must be of type {wanted.__name__}")


def calls_in(text: str) -> list[ToolCall]:
    """Return the calls of a response, in their order."""
    return [ToolCall(match.group(1)) for match in CALL.finditer(text)]
