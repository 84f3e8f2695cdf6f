"""The rooms of the package, and which of them may import which: arrows only go down.

A room is a folder of gspo_megatron (backend's folders are rooms of their own) or a module at its top. A file may import
from its own room and from rooms further down in LAYERS. The table is the order, from the ground up.
"""

import ast
from pathlib import Path

import pytest

from tools.validation.launching import ROOT

PACKAGE = ROOT / "gspo_megatron"
LAYERS = (
    "errors",
    "utils",
    "models",
    "routing",
    "ops",
    "config",
    "batch",
    "process",
    "algorithms",
    "tasks",
    "recipe",
    "slurm",
    "data",
    "backend/cpu_shim",
    "backend/parallel",
    "backend/layers",
    "backend/model",
    "backend/engine",
    "backend/checkpoint",
    "hf",
    "metrics",
    "study",
    "rollout",
    "trainer",
    "cli",
)
MEGATRON = ("backend",)  # the folders whose files may import megatron
NO_TORCH = ("errors", "models", "config", "tasks", "recipe", "slurm", "cli")
TOP = {"__init__", "errors"}  # modules at the top of the package


def room_of(name: str) -> str:
    """The room of a dotted name below the package: `backend.engine.policy` is in `backend/engine`."""
    parts = name.split(".")
    return "/".join(parts[:2]) if parts[0] == "backend" and len(parts) > 1 else parts[0]


def imported(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions too."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def wrong_arrows(room: str, source: str) -> list[str]:
    """Imports of a file in `room` that go up, or into a room that LAYERS does not know."""
    wrong = []
    for line, name in imported(ast.parse(source)):
        if not name.startswith("gspo_megatron."):
            continue
        target = room_of(name.removeprefix("gspo_megatron."))
        if target != room and (target not in LAYERS or LAYERS.index(target) > LAYERS.index(room)):
            wrong.append(f"line {line}: {room} imports {name}")
    return wrong


def files() -> dict[str, Path]:
    """Dotted name below the package -> file, without the empty __init__ files."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__" and path.read_text().strip():
            found[name] = path
    return found


@pytest.mark.parametrize("name", [name for name in files() if name != "backend"])
def test_arrows_go_down(name):
    assert wrong_arrows(room_of(name), files()[name].read_text()) == []


def test_an_arrow_that_goes_up_is_found():
    """The table can fail: a lower room that imports a higher one, inside a function too, and an unknown room."""
    assert wrong_arrows("hf", "from gspo_megatron.backend.engine.policy import Policy") == []
    assert wrong_arrows("backend/engine", "from gspo_megatron.hf.load import load") != []
    assert wrong_arrows("models", "def f():\n    from gspo_megatron.recipe import check") != []
    assert wrong_arrows("cli", "from gspo_megatron.attic import thing") != []


def test_every_room_is_in_the_table():
    assert {room_of(name) for name in files()} - {"backend"} == set(LAYERS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP


def test_megatron_is_imported_in_its_room_alone():
    outside = []
    for name, path in files().items():
        heads = {what.split(".")[0] for _, what in imported(ast.parse(path.read_text()))}
        if name.split(".")[0] not in MEGATRON and "megatron" in heads:
            outside.append(name)
    assert outside == []


def test_rooms_below_the_ranks_import_no_torch():
    """At the top of their files; inside a function a command may, once its checks have passed."""
    heavy = ("torch", "megatron", "transformers")
    wrong = []
    for name, path in files().items():
        top = ast.Module([node for node in ast.parse(path.read_text()).body], [])
        for node in top.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                wrong += [name for _, what in imported(node) if what.split(".")[0] in heavy]
    assert sorted({name for name in wrong if room_of(name) in NO_TORCH}) == []


@pytest.mark.parametrize("name", files())
def test_files_and_functions_are_short(name):
    """At most 300 lines a file and 64 a function, so that each is read in one go."""
    source = files()[name].read_text()
    assert source.count("\n") <= 300
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 64] == []
