"""Names of a recipe's fields, and what somebody may have meant who wrote another one, in YAML or on the command line.

Left out: a value of the wrong type on the command line, which tyro tells.
"""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import ConfigError


def check_overrides(argv: Sequence[str], config: TrainConfig) -> None:
    """Raise ConfigError for an override of a field that there is not, as a recipe with that field would.

    Args:
        argv: the command line behind the recipe.
        config: the recipe, whose tasks and options an override may name.
    """
    known = _names(config)
    for word in argv:
        given = word.partition("=")[0].removeprefix("--")
        name = given.replace("-", "_")
        # Of a switch `--model.recompute` there is `--model.no-recompute` too.
        plain = re.sub(r"(^|\.)no_", r"\1", name)
        if word.startswith("--") and not name.startswith("tyro_") and not {name, plain} & {"help", *known}:
            raise ConfigError(f"--{given}: no such field. {suggestion(name, known)}")


def suggestion(name: str, known: Sequence[str]) -> str:
    """Say which known field may be meant by one that there is not, in a sentence.

    Args:
        name: with dots, as those that are known.
    """
    parent, _, key = name.rpartition(".")
    siblings = [other for other in known if _belongs(other, parent)] or [other for other in known if "." not in other]
    near = [f"{parent}.{_last(other)}".lstrip(".") for other in _close(key, siblings)]
    # A section's name with a typing error; a right name at the wrong depth (`lr:` at the top).
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.85) or [n for n in known if _last(n) == key][:4]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return "Known here: " + ", ".join(_last(other) for other in siblings) + "."


def _close(key: str, names: list[str]) -> list[str]:
    """At most two of the names whose last part is close to the key."""
    by_last = {_last(name): name for name in names}
    return [by_last[last] for last in difflib.get_close_matches(key, by_last, n=2)]


def field_names(kind: type, prefix: str = "") -> list[str]:
    """List dotted names of all fields, sections included; a task's own name is a star."""
    names = []
    for name, hint in get_type_hints(kind).items():
        if name.startswith("__"):
            continue
        names.append(f"{prefix}{name}")
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                star = "" if inner is hint else ".*"
                names += field_names(inner, f"{prefix}{name}{star}.")
    return names


def _names(value: Any, prefix: str = "") -> list[str]:
    """Dotted names of everything in a recipe or a part of it."""
    if dataclasses.is_dataclass(value):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        parts = value if isinstance(value, dict) else {}
    names = []
    for key, inner in parts.items():
        # tyro writes a dash for each underscore of an option, those of a task's name and options too.
        name = f"{prefix}{key}".replace("-", "_")
        names += [name, *_names(inner, f"{name}.")]
    return names


def _belongs(name: str, parent: str) -> bool:
    """`name` is a field of `parent`; a task's own name stands where the pattern has a star."""
    return name.rpartition(".")[0] == re.sub(r"^tasks\.[^.]+", "tasks.*", parent)


def _last(name: str) -> str:
    return name.rpartition(".")[2]
