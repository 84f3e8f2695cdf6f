"""The documents are true: links and names of files lead somewhere, and the commands in them run.

Every command of README.md, CONTRIBUTING.md and docs/*.md stands in RUN, whose commands one test runs in a folder of its
own, or in LONG, with the reason why not. A command that stands in neither fails, and so does one that no document has.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from gspo_megatron.cli.main import COMMANDS
from gspo_megatron.recipe.load import load_recipe
from tools.validation.launching import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*GUIDES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs/studies").rglob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
README_LINES = 150

FOLDERS = "gspo_megatron|csrc|tests|tools|docs|examples|requirements"
PATHS = (
    rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w",  # below a folder of the repository, whatever it is
    r"(?<![\w/.-])[\w-]+(?:/[\w-]+)+\.(?:py|yaml|sh|inc|cpp|cu|h|sbatch)\b",  # a file, from some folder on
)
PLACEHOLDER = r"NAME|NNN"

PROGRAMS = r"(?:gspo-megatron|torchrun|make|python|pytest|bash|sbatch|apt-get|mkdir|tar) "
# What makes a training, or a diagnosis, one of seconds.
TINY = ("--data.num-eval-prompts 2 --data.eval-samples 1 --rollout.num-prompts 2 --rollout.group-size 2 "
        "--rollout.max-response-length 4 --algorithm.num-minibatches 1 --max-tokens-per-microbatch 300")  # fmt: skip
TRAIN = f"{TINY} --steps 1 --warm-start.steps 1 --warm-start.num-examples 8 --warm-start.batch-size 4"
# In this order, each with what is added to it: a later one needs what an earlier one leaves.
RUN = {
    "bash examples/train_moe_gspo.sh --help": "",
    "gspo-megatron slurm --help": "",
    "gspo-megatron slurm my_recipe.yaml --nodes 2 --partition gpu": "",
    "gspo-megatron slurm examples/recipes/moe_gspo.yaml --nodes 2 --partition gpu": "--overwrite",
    "python examples/make_preferences.py examples/recipes/moe_dpo.yaml": "--count 20",
    "gspo-megatron train my_recipe.yaml --steps 20": TRAIN,
    "gspo-megatron train my_recipe.yaml --steps 20 --optimizer.lr 5e-5 --resume change": f"{TRAIN} --steps 2",
    "python examples/your_data/make_questions.py": "",
    "python examples/environments/make_questions.py": "",
    "gspo-megatron data examples/recipes/retry.yaml": "",
    "gspo-megatron train examples/recipes/retry.yaml": TRAIN,
    "python examples/environments/make_calculations.py": "",
    "gspo-megatron data examples/recipes/calculator.yaml": "",
    "gspo-megatron train examples/recipes/calculator.yaml": TRAIN,
    "gspo-megatron data examples/recipes/your_data.yaml --tokens": "",
    "gspo-megatron train examples/recipes/your_data.yaml": TRAIN,
    "gspo-megatron train examples/recipes/your_data.yaml --rollout.save 1 --name first": TRAIN,
    "gspo-megatron train examples/recipes/your_data.yaml --rollout.engine files --rollout.path runs/first/rollouts "
    "--name again": TRAIN,
    "gspo-megatron data my_recipe.yaml": "",
    "gspo-megatron plot runs/NAME": "",
    "gspo-megatron check-learning runs/NAME": "",
    "gspo-megatron doctor --noise-floor my_recipe.yaml": f"--num-prompts 2 {TINY}",
    "gspo-megatron convert CHECKPOINT MODEL_FOLDER": "",
    "gspo-megatron train my_recipe.yaml --model.load-hf MODEL_FOLDER --save-hf": f"{TRAIN} --warm-start.steps 0",
    "python tools/convert_megatron_to_hf.py CHECKPOINT MODEL_FOLDER": "",
    "gspo-megatron convert MODEL_FOLDER CHECKPOINT": "",
    "python tools/convert_hf_to_megatron.py MODEL_FOLDER CHECKPOINT": "",
    "gspo-megatron upcycle DENSE_FOLDER MOE_FOLDER --experts 8": "",
}  # fmt: skip
MAY_FAIL = ("gspo-megatron check-learning", "gspo-megatron doctor")  # status 1 is their verdict on a tiny training
LONG = {
    "torchrun --nproc-per-node 2 examples/your_trainer.py MODEL_FOLDER": "tests/trainer/test_gspo_trainer.py",
    "make install": "an installation",
    "make train": "minutes",
    "make test": "minutes",
    "make lint": "an installation",
    "torchrun --nproc-per-node 4 examples/train_moe_gspo.sh --optimizer.lr 5e-5": "minutes; tests/cli/test_launch.py",
    "torchrun --no-python --nproc-per-node 4 examples/train_moe_gspo.sh": "minutes; tests/cli/test_launch.py",
    "torchrun --nproc-per-node 8 --no-python gspo-megatron convert MODEL_FOLDER CHECKPOINT": "tests/hf/test_convert.py",
    "gspo-megatron train examples/recipes/moe_dpo.yaml": "minutes; tests/trainer/test_preferences_training.py",
    "gspo-megatron train examples/recipes/smollm2_moe_gspo.yaml": "minutes, and a model",
    "gspo-megatron study routing-replay": "hours",
    "gspo-megatron study algorithms": "hours",
    "python -m pytest -m 'not slow'": "tests",
    "python -m pytest -m parity": "tests",
    "python -m pytest tests/algorithms": "tests",
    "pytest -m oracle": "tests",
    "pytest tests/slurm": "tests",
    "python -m tools.configuration_page": "writes docs/configuration.md; its --check is run below",
    "python -m tools.validation.parity_matrix": "minutes",
    "python -m tools.validation.parity_matrix --markdown FILE": "minutes",
    "python -m tools.validation.conversion_matrix": "minutes",
    "python -m tools.validation.smollm2 runs/smollm2": "minutes, and a package of weights",
    "python -m tools.validation.fault_matrix": "minutes",
    "python -m tools.validation.kill_resume": "minutes",
    "python -m tools.validation.your_data": "an hour; tests/trainer/test_learning_check.py is its short form",
    "python -m tools.validation.ratio_accuracy": "minutes",
    "python -m tools.validation.sum_accuracy": "minutes",
    "python -m tools.benchmarks.convert --rounds 4": "minutes",
    "python -m tools.benchmarks.checkpoint": "minutes",
    "python -m tools.benchmarks.sequence_ratio --tokens 1048576": "minutes",
    "python -m tools.benchmarks.communication": "minutes",
    "python -m tools.benchmarks.routing": "minutes",
    "python -m tools.benchmarks.scoring": "a minute",
    "python tools/gpu_check.py": "a GPU; tests/ops/test_gpu_check.py",
    "tar -xf data.tar.xz": "megabytes; tests/study/test_archive.py",
    "sbatch moe_gspo.sbatch": "Slurm; tests/slurm",
    "mkdir -p logs; sbatch examples/slurm/convert.sbatch SOURCE TARGET": "Slurm",
    "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge": "network",
}


def parsed(path: Path) -> list[Token]:
    """All tokens of a document, those inside paragraphs, headings and table cells too."""
    tokens = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    return [inner for token in tokens for inner in (token, *(token.children or []))]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    tokens, seen, found = parsed(path), Counter(), set()
    for opening, heading in zip(tokens, tokens[1:], strict=False):
        if opening.type == "heading_open":
            text = "".join(part.content for part in heading.children)
            slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            found.add(slug + (f"-{seen[slug]}" if seen[slug] else ""))
            seen[slug] += 1
    return found


def broken_links(path: Path) -> list[str]:
    """Relative links and images of a document whose file or anchor is not there."""
    broken = []
    for token in parsed(path):
        link = token.attrGet("href") or token.attrGet("src")
        if not link or re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = str(link).partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def repository() -> set[str]:
    """Every file and folder of the repository, from its root."""
    found = [path.relative_to(ROOT) for top in FOLDERS.split("|") for path in (ROOT / top).rglob("*")]
    return {str(path) for path in found} | set(FOLDERS.split("|"))


def missing_files(text: str, files: set[str]) -> list[str]:
    """Names of files in a text that no file has, or ends with."""
    named = {name for pattern in PATHS for name in re.findall(pattern, text) if not re.search(PLACEHOLDER, name)}
    return [name for name in named if name not in files and not any(file.endswith(f"/{name}") for file in files)]


def commands(path: Path) -> list[str]:
    """Command lines in a document's code, without comments and what is in brackets. `gspo-megatron SUBCOMMAND` and
    `gspo-megatron doctor --noise-floor` alone are names of commands."""
    blocks = {"fence", "code_block"}
    lines = [line for token in parsed(path) if token.type in blocks | {"code_inline"}
             for line in token.content.splitlines()]  # fmt: skip
    lines = [re.sub(r"\s+#.*|\[[^]]*\]", "", line).strip().removeprefix(".venv/bin/") for line in lines]
    names = {f"gspo-megatron {name}" for name in COMMANDS} | {"gspo-megatron doctor --noise-floor"}
    return [line.strip() for line in lines if re.match(PROGRAMS, line) and line not in names]


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert broken_links(ROOT / name) == []


@pytest.mark.parametrize("name", NAMES)
def test_named_files_exist(name):
    assert missing_files((ROOT / name).read_text(encoding="utf-8"), repository()) == []


def test_what_is_wrong_is_found(tmp_path):
    """The checks can fail."""
    page = tmp_path / "page.md"
    page.write_text("# One `two`\n\n# One two\n\n[a](#one-two-1) [b](#three) [c](gone.md) [d](page.md#one-two)\n")
    assert broken_links(page) == ["#three", "gone.md"]
    text = "`gspo_megatron/gone.py`, `gone/policy.py`, `engine/policy.py`, `tests/data/`, `algorithms/NAME.py`"
    assert set(missing_files(text, repository())) == {"gspo_megatron/gone.py", "gone/policy.py"}


def test_readme_is_short_and_the_index_is_whole():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    names = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert [name for name in names if f"]({name})" not in index and name != "README.md"] == []


def test_architecture_names_every_file_of_the_package():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "gspo_megatron").rglob("*.py") if "__" not in path.name}
    told = {file for file in files if f"]({'../' + file})" in text}
    assert sorted(file for file in files - told if not re.search(r"/config/|/families/", file)) == []


def test_the_configuration_page_is_current():
    checked = subprocess.run([sys.executable, "-m", "tools.configuration_page", "--check"], cwd=ROOT,
                             capture_output=True, text=True)  # fmt: skip
    assert checked.returncode == 0, checked.stderr


def test_every_command_is_run_or_named_as_long():
    found = {command for path in GUIDES for command in commands(path)}
    assert sorted(found - {*RUN, *LONG}) == [], "commands of documents that no list of this file has"
    assert sorted({*RUN, *LONG} - found) == [], "commands of this file that no document has"


@pytest.mark.parametrize("command", LONG)
def test_long_commands_name_what_exists(command, monkeypatch):
    """Targets, modules, subcommands and a recipe's overrides, where running them takes too long."""
    monkeypatch.chdir(ROOT)
    program, *words = shlex.split(command)
    if program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
    elif command.startswith("python -m tools"):
        assert importlib.util.find_spec(words[1])
    elif command.startswith("gspo-megatron train"):
        load_recipe(words[1:])
    elif program == "gspo-megatron":
        assert words[0] in COMMANDS


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder in which the documents' placeholders are files: a recipe, a dense model, and the repository's tools."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name in ("examples", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "examples/recipes/moe_gspo.yaml", tmp_path / "my_recipe.yaml")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=320, **sizes)).save_pretrained(tmp_path / "DENSE_FOLDER")
    monkeypatch.chdir(tmp_path)
    for name, value in {"NPROC": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    return tmp_path


def prepare(command: str, folder: Path) -> None:
    """Take away what a command writes, and put the training's checkpoint where it reads one."""
    words = command.split()
    if words[1].startswith(("convert", "tools/convert")):
        shutil.rmtree(folder / words[-1], ignore_errors=True)
        if "CHECKPOINT" in words[:-1] and not (folder / "CHECKPOINT").exists():
            shutil.copytree(folder / "runs/moe_gspo/checkpoints/step_000001", folder / "CHECKPOINT")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_run(workplace):
    """RUN, one after the other. What a command leaves is read by a later one, so none may fail."""
    programs = {"gspo-megatron": [sys.executable, "-m", "gspo_megatron.cli"], "python": [sys.executable]}
    for command, more in RUN.items():
        prepare(command, workplace)
        program, *words = shlex.split(f"{command.replace('runs/NAME', 'runs/moe_gspo')} {more}")
        done = subprocess.run([*programs.get(program, [program]), *words], capture_output=True, text=True,
                              env=os.environ | {"VIRTUAL_ENV": sys.prefix})  # fmt: skip
        fine = {0, 1} if command.startswith(MAY_FAIL) else {0}
        assert done.returncode in fine, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
