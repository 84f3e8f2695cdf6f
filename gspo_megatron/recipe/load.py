"""A recipe file and command-line overrides become a TrainConfig here, and that becomes a file again.

The order is: defaults of config/, then the YAML file, then overrides (`--optimizer.lr 1e-4`). The recipe says
which tasks are trained; an override may change a weight or an option that the recipe spells out
(`--tasks.spell_backward.weight 2`). Adding or removing a task takes a recipe of its own.

Left out: includes and variables in YAML, several recipes in one command, environment variables. What needs the
model's shape or the world size is checked in recipe/check.py.
"""

import dataclasses
import io
import json
import re
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from gspo_megatron.config import TaskConfig, TrainConfig
from gspo_megatron.config.names import check_path
from gspo_megatron.errors import ConfigError
from gspo_megatron.recipe.field_names import check_overrides, field_names, suggestion
from gspo_megatron.utils import plain_yaml
from gspo_megatron.utils.small_files import replace

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).resolve().parents[1]  # in a wheel it has the examples
OTHER_BASE = re.compile(r"[-+]?(0[0-9_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
PROGRAM = "gspo-megatron train [RECIPE.yaml]"
TOLD = 20  # mistakes of a recipe; who sees more reads none


def load_recipe(argv: list[str], quiet: bool = False, program: str = PROGRAM) -> TrainConfig:
    """Read `[RECIPE.yaml] --some.override value ...`.

    Args:
        argv: the command line after the subcommand; its first word is the recipe unless it is an option.
        quiet: print neither --help nor complaints about options (for every rank but one).
        program: the command's name in what is printed.

    Raises:
        ConfigError: the recipe cannot be read, an override names no field, or a value cannot work.
        SystemExit: status 0 for --help, 2 for a value of the wrong type in an override.
    """
    path = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    config = _read(path) if path else TrainConfig()
    overrides = argv[1:] if path else argv
    check_overrides(overrides, config)
    # tyro prints some errors all the same.
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        config = tyro.cli(TrainConfig, prog=program, default=config, args=overrides, console_outputs=not quiet)
    model = dataclasses.replace(config.model, hf_config=find_file(config.model.hf_config, path, "config.json"))
    if model.load_hf is not None:
        start = find_file(model.load_hf, path, "config.json")
        model = dataclasses.replace(model, load_hf=start.parent if start.is_file() else start)
    preference = config.algorithm.preference
    pairs, held_out = (given and find_file(given, path) for given in (preference.path, preference.eval_path))
    preference = dataclasses.replace(preference, path=pairs, eval_path=held_out)
    algorithm = dataclasses.replace(config.algorithm, preference=preference)
    tasks = {name: _found(task, path) for name, task in config.tasks.items()}
    rollouts = config.rollout.path and find_path(config.rollout.path, path)
    rollout = dataclasses.replace(config.rollout, path=rollouts)
    return dataclasses.replace(config, model=model, algorithm=algorithm.resolved(), tasks=tasks, rollout=rollout)


def _found(task: TaskConfig, recipe: Path | None) -> TaskConfig:
    """The task with its files as absolute paths."""
    data, held_out = (given and _data(given, recipe) for given in (task.data, task.eval_data))
    rewards = tuple(dataclasses.replace(one, function=_code(one.function, recipe)) for one in task.reward)
    environment = task.environment and _code(task.environment, recipe)
    return dataclasses.replace(task, data=data, eval_data=held_out, reward=rewards, environment=environment)


def _code(target: str, recipe: Path | None) -> str:
    """ "file.py:name" with the file's absolute path; a module's as it is."""
    file, _, name = target.rpartition(":")
    return f"{find_file(Path(file), recipe)}:{name}" if file.endswith(".py") else target


def _data(path: Path, recipe: Path | None) -> Path:
    """A file of data, or a folder that the library datasets saved."""
    for mark in ("dataset_info.json", "dataset_dict.json"):
        found = find_file(path, recipe, mark)
        if found.is_file():
            return found.parent if found.name == mark else found
    return path


def save_recipe(config: TrainConfig, path: Path) -> None:
    """Write every value of the run as a recipe which `load_recipe` reads back to an equal TrainConfig.

    Raises OSError, and leaves the file as it was.
    """
    replace(path, yaml.dump(plain_values(config), Dumper=_Dumper, sort_keys=False).encode())


def plain_values(config: TrainConfig) -> dict[str, Any]:
    """Return every value of a recipe as tables, lists, texts, numbers and None."""
    return TypeAdapter(TrainConfig).dump_python(config, mode="json")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested tables as one, with dotted names; an empty table is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


def read_saved(path: Path) -> dict:
    """Return the plain values of what `save_recipe` has written, unchecked: they may be of another version.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()}).") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ConfigError(f"{path}: cannot be read (it {'is empty' if content is None else 'holds no recipe'}).")
    return content


def _read(path: Path) -> TrainConfig:
    check_path("recipe", path)
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"recipe = {str(path)!r}: {reason}. Give the path of a YAML recipe.") from None
    except (yaml.YAMLError, ValueError) as error:  # a month 13, a number of 5000 digits, bytes that are no UTF-8
        raise ConfigError(f"recipe = {str(path)!r}: not valid YAML: {error}. Correct the file.") from None
    if content is None:  # empty, or nothing but comments
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"recipe = {str(path)!r}: holds {content!r:.200}. It must be a table of `field: value` lines."
        )
    try:
        # Strict, because `steps: true` or `seed: "1"` is a mistake; as JSON, where a path and a tuple still are text
        # and a list.
        return TypeAdapter(TrainConfig).validate_json(json.dumps(_without_gaps(content), default=str), strict=True)
    except ValidationError as error:
        raise ConfigError(_messages(error.errors(include_url=False), path)) from None
    except (TypeError, ValueError) as error:  # of json.dumps: a date as a key, a number of 5000 digits
        raise ConfigError(f"recipe = {str(path)!r}: no fields and values ({error!s:.200}). Correct the file.") from None


def _messages(items: list[ErrorDetails], path: Path) -> str:
    known = field_names(TrainConfig)
    lines = [_message(item, path, known) for item in items[:TOLD]]
    return "\n".join(lines + ([f"And {len(items) - TOLD} more in {path}."] if len(items) > TOLD else []))


def _message(item: ErrorDetails, path: Path, known: list[str]) -> str:
    name = ".".join(str(part) for part in item["loc"])
    if item["type"] == "dataclass_type":
        return f"{name} = {item['input']!r:.200}: must be a table. Write {{}} for its defaults, in {path}."
    if item["type"] != "unexpected_keyword_argument":
        return f"{name} = {item['input']!r:.200}: {_lower_first(item['msg'])}. {_remedy(item, path)}"
    return f"{name} = {item['input']!r:.200}: unknown field in {path}. {suggestion(name, known)}"


def _remedy(item: ErrorDetails, path: Path) -> str:
    """What to do about a value of the wrong type: a number or a switch in quotes is text."""
    text = item["input"]
    if item["type"] not in ("int_type", "float_type", "bool_type") or not isinstance(text, str):
        return f"Correct it in {path}."
    try:
        float(text)
    except ValueError:
        is_value = item["type"] == "bool_type" and text.lower() in ("true", "false")
        return f"Take off the quotes in {path}." if is_value else f"Correct it in {path}."
    return f"Take off the quotes in {path}."


def _without_gaps(content: dict) -> dict:
    """The recipe with {} for a task, or its options, of which only the name is written, and a list of one reward for a
    reward that is written as a text."""
    tasks = content.get("tasks")
    if not isinstance(tasks, dict):
        return content
    filled = {name: {} if task is None else task for name, task in tasks.items()}
    for name, task in filled.items():
        if isinstance(task, dict) and task.get("options", {}) is None:
            filled[name] = task = task | {"options": {}}
        if isinstance(task, dict) and isinstance(task.get("reward"), str):
            filled[name] = task | {"reward": [{"function": task["reward"]}]}
    return content | {"tasks": filled}


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def find_file(path: Path, recipe: Path | None = None, inside: str = "") -> Path:
    """A file of the recipe as an absolute path: a run must not depend on where it is started or resumed from.

    Args:
        inside: the file that is meant where `path` is a folder.
    """
    for found in _places(path, recipe):
        if found.is_dir():
            found = found / inside
        if found.is_file():
            return found.resolve()
    return path  # as the user wrote it, for the error message of hf_config.py


def find_path(path: Path, recipe: Path | None = None) -> Path:
    """A file or folder of the recipe as an absolute path, looked up where find_file looks."""
    return next((found.resolve() for found in _places(path, recipe) if found.exists()), path)


def _places(path: Path, recipe: Path | None) -> list[Path]:
    folders = [Path.cwd(), *([recipe.resolve().parent] if recipe else []), REPOSITORY, PACKAGE]
    return [folder / path.expanduser() for folder in folders]


class _Loader(plain_yaml.Loader):
    """PyYAML's safe loader within limits, without four silences: a key given twice, `1e-3` read as text, and numbers to
    the base 8 (`010` is 8) or 60 (`1:30` is 90)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
            for item in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                _refuse_other_bases(key, item)
        return super().construct_mapping(node, deep)


def _refuse_other_bases(name: str | None, node: yaml.Node) -> None:
    """Raise ConfigError for a value without quotes that YAML 1.1 reads to another base, or would with other digits."""
    text = node.value
    if not isinstance(node, yaml.ScalarNode) or node.style is not None or not OTHER_BASE.fullmatch(text):
        return
    place = f"in {node.start_mark.name}, line {node.start_mark.line + 1}"
    if ":" in text:
        reason, remedy = "YAML reads a colon between digits as base 60", "Write the number in the field's unit"
    else:
        reason, remedy = "YAML reads a zero in front as base 8", f"Write {text.lstrip('+-0_') or '0':.100}"
    raise ConfigError(f"{name} = {text:.100}: {reason}. {remedy}, or a text in quotes, {place}.")


class _Dumper(yaml.SafeDumper):
    """Quotes a text such as "1e3", which _Loader would read as a number, and "0809", which it would refuse."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        style = "'" if OTHER_BASE.fullmatch(text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)

for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
