"""A recipe's dataclasses refuse a bad value by one form of message, and allow no unknown fields."""

import dataclasses
import math
from typing import Any

from pydantic import ConfigDict

from gspo_megatron.errors import ConfigError

STRICT = ConfigDict(extra="forbid")
LARGEST = 2**31 - 1  # what every library below takes for a count


def require(ok: bool, field_name: str, value: object, constraint: str, remedy: str) -> None:
    """Raise the one form of message that every bad value gets."""
    if not ok:
        raise ConfigError(f"{field_name} = {value!r}: {constraint}. {remedy}")


def positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, _dotted(prefix, name), value, "must be greater than 0", "Give a positive number.")


def at_most(prefix: str, config: object, **limits: float) -> None:
    """Refuse what no run can mean, and what would fill memory or hours before anything else could tell."""
    for name, limit in limits.items():
        value = getattr(config, name)
        require(value <= limit, _dotted(prefix, name), value, f"must be at most {limit:,}", "Give a smaller number.")


def between(prefix: str, config: object, low: float, below: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            low <= value < below,
            _dotted(prefix, name),
            value,
            f"must be at least {low:g} and below {below:g}",
            "Leave it out for its default.",
        )


def check_numbers(value: Any, name: str = "") -> None:
    """Refuse numbers that are infinite or not a number in a recipe or a part of it, fields beyond LARGEST, and texts
    that are none.

    Args:
        name: the value's own, with dots.
    """
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            check_field(getattr(value, field.name), _dotted(name, field.name))
    elif isinstance(value, dict):
        for key, inner in value.items():
            check_numbers(inner, _dotted(name, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            check_numbers(inner, f"{name}[{index}]")
    elif isinstance(value, str):
        is_text = not any("\ud800" <= letter <= "\udfff" for letter in value)
        require(is_text, name, value, "is no Unicode text, and no file or tokenizer can hold it", "Write it in UTF-8.")
    elif isinstance(value, float):
        require(math.isfinite(value), name, value, "must be a finite number", "Give a number.")


def check_field(value: Any, name: str) -> None:
    """Do so for one field, which may be a table."""
    too_large = isinstance(value, int) and abs(value) > LARGEST
    require(not too_large, name, value, f"must be at most {LARGEST:,}", "Give a smaller number.")
    check_numbers(value, name)


def _dotted(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
