"""docs/configuration.md, written from the recipe's dataclasses: `python -m tools.configuration_page [--check]`

Names, types and defaults come from the classes, meanings from the docstring behind each field. With --check nothing is
written, and the exit status is 1 where the file differs from what would be.
"""

import argparse
import ast
import dataclasses
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from gspo_megatron.config import TrainConfig
from gspo_megatron.config.algorithm import ALGORITHMS

PAGE = Path(__file__).resolve().parents[1] / "docs/configuration.md"
HEAD = """\
# Configuration

Every field of a recipe. A recipe is a YAML file with this nesting; what it leaves out has the default. The same names
override it on the command line, with hyphens or underscores: `--optimizer.lr 1e-4`, `--save-hf`, `--no-save-hf`.
Unknown fields and values that cannot work are refused before anything starts. `null` often means that the value is
chosen: by the algorithm (the table under [algorithm](#algorithm)) or from the number of ranks (under
[parallel](#parallel)). The names that other libraries have for these are in [glossary.md](glossary.md).

This page is written by `python -m tools.configuration_page` from
[gspo_megatron/config/](../gspo_megatron/config); a test fails where it is not current.
"""


@dataclasses.dataclass(frozen=True)
class Section:
    """One table of the page: a dataclass, and where it stands in a recipe ("" is the top)."""

    name: str
    kind: type


def sections(kind: type, name: str = "") -> Iterator[Section]:
    """The section of a dataclass, and then those of the dataclasses in its fields; tasks.NAME is the one of a task."""
    yield Section(name, kind)
    for field, hint in hints(kind).items():
        inner = f"{name}.{field}".lstrip(".")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from sections(hint, inner)
        elif get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            yield from sections(get_args(hint)[1], f"{inner}.NAME")
        elif _is_list(hint):
            yield from sections(get_args(hint)[0], inner)


def _is_list(hint: Any) -> bool:
    """Whether it is a list of sections."""
    return get_origin(hint) is tuple and dataclasses.is_dataclass(get_args(hint)[0])


def hints(kind: type) -> dict[str, Any]:
    """Types of the fields, in their order."""
    found = get_type_hints(kind)
    return {field.name: found[field.name] for field in dataclasses.fields(kind)}


def meanings(kind: type) -> dict[str, str]:
    """The docstring behind each field of a class, on one line."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    found, body = {}, definition.body
    for field, text in zip(body, body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def type_words(hint: Any) -> str:
    """A type as a recipe's author reads it."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) in (types.UnionType, Union):
        return ", ".join("`null`" if part is type(None) else type_words(part) for part in get_args(hint))
    if get_origin(hint) is dict:
        return "table"
    if _is_list(hint):
        return "text, list of tables"
    if get_origin(hint) is tuple:
        return {int: "list of integers", str: "list of texts"}[get_args(hint)[0]]
    return {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path"}[hint]


def default_words(field: dataclasses.Field) -> str:
    """A default as YAML would have it."""
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return f"`{{{', '.join(f'{key}: {{}}' for key in made)}}}`" if isinstance(made, dict) else ""
    value = field.default
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, bool) or value is None:
        return f"`{ {None: 'null', True: 'true', False: 'false'}[value] }`"
    return "`[]`" if value == () else f"`{value}`"


def rows(section: Section) -> Iterator[str]:
    """The lines of one section's table. Fields that are sections themselves are links to them."""
    told, types_of = meanings(section.kind), hints(section.kind)
    for field in dataclasses.fields(section.kind):
        hint = types_of[field.name]
        dotted = f"{section.name}.{field.name}".lstrip(".")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield f"| [`{field.name}`](#{anchor(dotted)}) | section | | {summary(hint)} |"
            continue
        meaning = told[field.name].replace("|", "\\|")
        if get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]):
            meaning += f" Each is a section: [{dotted}.NAME](#{anchor(dotted + '.NAME')})."
        if _is_list(hint):
            meaning += f" Each is a section: [{dotted}](#{anchor(dotted)})."
        yield f"| `{field.name}` | {type_words(hint)} | {default_words(field)} | {meaning} |"


def summary(kind: type) -> str:
    """The first sentence of a class's docstring, without the reference to code that may follow."""
    return " ".join(str(inspect.getdoc(kind)).split("\n\n")[0].split()).split(". ")[0].rstrip(".") + "."


def anchor(dotted: str) -> str:
    """GitHub's anchor of a heading that is a dotted name."""
    return dotted.lower().replace(".", "")


def own_values() -> str:
    """What each algorithm fills in where the recipe says nothing, as a table."""
    names = list(dict.fromkeys(name for values in ALGORITHMS.values() for name in values))
    lines = ["", "What stands for `null`, by algorithm:", "", f"| field | {' | '.join(ALGORITHMS)} |",
             f"|---{'|---' * len(ALGORITHMS)}|"]  # fmt: skip
    for name in names:
        values = [default_words(dataclasses.field(default=own[name])) for own in ALGORITHMS.values()]
        lines.append(f"| `{name}` | {' | '.join(values)} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section in sections(TrainConfig):
        text = " ".join(str(inspect.getdoc(section.kind)).split())
        table = "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows(section)])
        parts.append(f"## {section.name or 'The top'}\n\n{text}\n\n{table}\n")
        if section.name == "algorithm":
            parts[-1] += own_values() + "\n"
    return "\n".join(parts)


def main() -> int:
    """Write the page, or compare with it. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.configuration_page", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the page differs")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"error: {PAGE} is not current. Write it anew: python -m tools.configuration_page", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
