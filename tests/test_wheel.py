"""The source distribution and the wheel made of it hold all that a user outside the repository needs."""

import os
import site
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tools.validation.launching import ROOT

TRAINING = [
    "train", "--device", "cpu", "--steps", "2", "--eval-interval", "2", "--data.num-eval-prompts", "4",
    "--data.eval-samples", "1", "--warm-start.steps", "2", "--warm-start.num-examples", "32",
    "--warm-start.batch-size", "16", "--rollout.num-prompts", "4",
]  # fmt: skip
# Python takes the place of the C++ library, which other tests build: compiling it takes a minute.
ENV = os.environ | {"GSPO_MEGATRON_NATIVE": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NPROC": "2"}


def run(*command: object, cwd: Path) -> str:
    env = {name: value for name, value in ENV.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, text=True, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    run("git", "clone", "--quiet", ROOT, source, cwd=folder)
    run("git", "-C", ROOT, "diff", "HEAD", "--binary", f"--output={folder / 'change'}", cwd=folder)
    if (folder / "change").stat().st_size:
        run("git", "apply", folder / "change", cwd=source)
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", program, cwd=source)
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory) -> Path:
    """A virtual environment that sees this one's packages, but for the project itself, which it has from the sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    python = folder / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation",
        "--quiet", sdist, cwd=folder)  # fmt: skip
    return folder


def test_sources_of_the_library_are_in_the_sdist(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert sources <= names and "gspo_megatron/py.typed" in names


@pytest.mark.slow
def test_the_installed_command_trains_from_another_folder(installed):
    """Without a recipe: the default model comes with the package. Its place tells that the wheel is what runs."""
    python = installed / "venv/bin/python"
    place = run(python, "-c", "import gspo_megatron; print(gspo_megatron.__file__)", cwd=installed).strip()
    assert Path(place).is_relative_to(installed / "venv")
    run(installed / "venv/bin/gspo-megatron", *TRAINING, cwd=installed)
    rows = (installed / "runs/moe_gspo/metrics.jsonl").read_text().splitlines()
    assert len(rows) == 2 + 1 + 2  # the warm start's, the evaluation before RL, and two steps
    assert "routing-replay" in run(installed / "venv/bin/gspo-megatron", "--help", cwd=installed)
