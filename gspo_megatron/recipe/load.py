"""A recipe file and command-line overrides become a TrainConfig here, and that becomes a file again.

The order is: defaults of config/, then the YAML file, then overrides (`--optimizer.lr 1e-4`). The recipe says
which tasks are trained; an override may change a weight or an option that the recipe spells out
(`--tasks.spell_backward.weight 2`). Adding or removing a task takes a recipe of its own.

Left out: includes and variables in YAML, several recipes in one command, environment variables. What needs the
model's shape or the world size is checked in recipe/check.py.
"""

import dataclasses
import difflib
import json
import re
from pathlib import Path
from typing import get_args, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).resolve().parents[1]  # in a wheel it has the examples
PROGRAM = "gspo-megatron train [RECIPE.yaml]"


def load_recipe(argv: list[str], quiet: bool = False, program: str = PROGRAM) -> TrainConfig:
    """Read `[RECIPE.yaml] --some.override value ...`.

    Args:
        argv: the command line after the subcommand; its first word is the recipe unless it is an option.
        quiet: print neither --help nor complaints about options (for every rank but one).
        program: the command's name in what is printed.

    Raises:
        ConfigError: the recipe cannot be read, or a value cannot work.
        SystemExit: status 0 for --help, 2 for an unknown option or a value of the wrong type in an override.
    """
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    config = _read(path) if path else TrainConfig()
    config = tyro.cli(
        TrainConfig, prog=program, default=config, args=argv[1:] if path else argv, console_outputs=not quiet
    )
    model = dataclasses.replace(config.model, hf_config=find_file(config.model.hf_config, path, "config.json"))
    if model.load_hf is not None:
        start = find_file(model.load_hf, path, "config.json")
        model = dataclasses.replace(model, load_hf=start.parent if start.is_file() else start)
    preference = config.algorithm.preference
    pairs, held_out = (given and find_file(given, path) for given in (preference.path, preference.eval_path))
    preference = dataclasses.replace(preference, path=pairs, eval_path=held_out)
    algorithm = dataclasses.replace(config.algorithm, preference=preference)
    return dataclasses.replace(config, model=model, algorithm=algorithm.resolved())


def save_recipe(config: TrainConfig, path: Path) -> None:
    """Write every value of the run as a recipe which `load_recipe` reads back to an equal TrainConfig."""
    plain = TypeAdapter(TrainConfig).dump_python(config, mode="json")
    path.write_text(yaml.dump(plain, Dumper=_Dumper, sort_keys=False), encoding="utf-8")


def _read(path: Path) -> TrainConfig:
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"recipe = {str(path)!r}: {reason}. Give the path of a YAML recipe.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe = {str(path)!r}: not valid YAML: {error}. Correct the file.") from None
    if content is None:  # empty, or nothing but comments
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"recipe = {str(path)!r}: holds {content!r}. It must be a table of `field: value` lines.")
    try:
        # Strict, because `steps: true` or `seed: "1"` is a mistake; as JSON, where a path and a tuple still are text
        # and a list.
        return TypeAdapter(TrainConfig).validate_json(json.dumps(content, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_message(item, path) for item in error.errors(include_url=False))) from None


def _message(item: ErrorDetails, path: Path) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "dataclass_type":
        return f"{name} = {item['input']!r}: must be a table. Write {{}} for its defaults, in {path}."
    if item["type"] != "unexpected_keyword_argument":
        return f"{name} = {item['input']!r}: {_lower_first(item['msg'])}. Correct it in {path}."
    parent, _, key = name.rpartition(".")
    known = _field_names(TrainConfig)
    siblings = [other for other in known if _belongs(other, parent)]
    near = difflib.get_close_matches(key, [other.rpartition(".")[2] for other in siblings], n=2)
    # A right name at the wrong depth (`lr:` at the top) is as common as a typing error.
    near = [f"{parent}.{other}".lstrip(".") for other in near] or [n for n in known if n.endswith(f".{key}")][:2]
    hint = (
        f"Did you mean {' or '.join(near)}?"
        if near
        else "Known here: " + ", ".join(other.rpartition(".")[2] for other in siblings) + "."
    )
    return f"{name} = {item['input']!r}: unknown field in {path}. {hint}"


def _belongs(name: str, parent: str) -> bool:
    """`name` is a field of `parent`; a task's own name stands where the pattern has a star."""
    return name.rpartition(".")[0] == re.sub(r"^tasks\.[^.]+", "tasks.*", parent)


def _field_names(kind: type, prefix: str = "") -> list[str]:
    """Dotted names of all fields, sections included."""
    names = []
    for name, hint in get_type_hints(kind).items():
        if name.startswith("__"):
            continue
        names.append(f"{prefix}{name}")
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                star = "" if inner is hint else ".*"
                names += _field_names(inner, f"{prefix}{name}{star}.")
    return names


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def find_file(path: Path, recipe: Path | None = None, inside: str = "") -> Path:
    """A file of the recipe as an absolute path: a run must not depend on where it is started or resumed from.

    Args:
        inside: the file that is meant where `path` is a folder.
    """
    folders = [Path.cwd(), *([recipe.resolve().parent] if recipe else []), REPOSITORY, PACKAGE]
    for folder in folders:
        found = folder / path.expanduser()
        if found.is_dir():
            found = found / inside
        if found.is_file():
            return found.resolve()
    return path  # as the user wrote it, for the error message of hf_config.py


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without two silences: a key given twice, and `1e-3` read as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text such as "1e3", which _Loader would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
