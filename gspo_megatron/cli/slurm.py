"""`gspo-megatron slurm` writes a batch script for a recipe, checked against the nodes before it waits in a queue."""

import shutil
import subprocess
import sys
from pathlib import Path

import tyro

from gspo_megatron.config.constraints import require
from gspo_megatron.recipe import check as recipe_check
from gspo_megatron.recipe import lint
from gspo_megatron.recipe.layout import resolve_layout
from gspo_megatron.recipe.load import load_recipe
from gspo_megatron.slurm import job as jobs
from gspo_megatron.slurm.job import Job
from gspo_megatron.slurm.script import PROGRAM, render
from gspo_megatron.utils.small_files import replace


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status: 0, or sbatch's.

    Raises:
        ConfigError: the recipe does not fit the nodes, or an option cannot work.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    job, rest = tyro.cli(Job, prog=PROGRAM, args=argv, return_unknown_args=True)
    config = load_recipe([str(job.recipe), *rest], program=PROGRAM)
    jobs.check(job, config)
    jobs.check_overrides(rest)
    layout = resolve_layout(config, job.world_size, has_cuda=config.device != "cpu")
    on_gpus = recipe_check.uses_transformer_engine(config, has_gpu=True)
    recipe_check.check(config, layout, job.world_size, on_gpus)
    target = job.output or Path(f"{config.name}.sbatch")
    require(
        job.overwrite or not target.exists(),
        "--output",
        str(target),
        "exists already",
        "Give --overwrite to replace it, or another name.",
    )
    require(
        target.absolute().parent.is_dir(),
        "--output",
        str(target),
        "its folder does not exist",
        "Make the folder first.",
    )
    require(
        not target.exists() or target.is_file(), "--output", str(target), "is no file", "Give the name of a script."
    )
    can_submit = not job.submit or shutil.which("sbatch") is not None
    require(can_submit, "--submit", True, "there is no sbatch here", "Leave it out, and submit where Slurm is.")
    _write(job.logs, target, render(job, config, rest))
    for sentence in [*jobs.warnings(job, layout), *lint.warnings(config)]:
        print(f"warning: {sentence}", file=sys.stderr)
    print(jobs.summary(job, config, layout, target))
    if job.submit:
        return subprocess.run(["sbatch", str(target.absolute())]).returncode
    print(f"submit it with: sbatch {target}")
    return 0


def _write(logs: Path, target: Path, script: str) -> None:
    """Make the folder of logs, and the script: whole, or nothing. Raises ConfigError where that fails."""
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        require(False, "--logs", str(logs), f"cannot be made ({error.strerror})", "Give another folder.")
    try:
        replace(target, script.encode(errors="surrogateescape"))  # a path may have bytes that are no UTF-8
    except OSError as error:
        require(False, "--output", str(target), f"cannot be written ({error.strerror})", "Give another place.")
