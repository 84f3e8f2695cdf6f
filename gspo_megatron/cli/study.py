"""The command `gspo-megatron study` trains what a study still lacks, then writes its report.

torch is imported by the trainings alone, which are processes of their own.
"""

import importlib
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro

from gspo_megatron.config.constraints import require
from gspo_megatron.config.options import check_options
from gspo_megatron.recipe.load import find_file
from gspo_megatron.study import plan

PROGRAM = "gspo-megatron study"
MOST = 1000  # seeds, and ranks at the same time
USAGE = f"""\
usage: {PROGRAM} routing-replay [--seeds 5] [--folder FOLDER] [--help]
       {PROGRAM} algorithms [--seeds 3] [--folder FOLDER] [--help]

routing-replay   does GSPO need routing replay, does GRPO? {{gspo, grpo, ...}} x {{free, R2}} from the same starts
algorithms       steps, tokens and seconds that each algorithm needs to the same held-out accuracy"""


@dataclass(frozen=True)
class Options:
    """Train every arm that has no data yet, then write report.html, README.md, findings.json and plots, and pack
    the data into data.tar.xz."""

    recipe: Path = plan.RECIPE
    """What all arms share."""

    seeds: int = 5
    """Of the main arms; further arms and settings of routing-replay have 3 at most."""

    lr: tuple[float, ...] = plan.LEARNING_RATES
    """Learning rates of the main arms; they should reach from what is stable to what collapses."""

    folder: Path = Path("docs/studies/routing-replay")
    """Data and report. What is there is not trained again."""

    work: Path = Path("runs/study-routing-replay")
    """Run folders, which may be deleted afterwards."""

    slots: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Ranks that train at the same time, each on a core of its own."""

    only: str = ""
    """A regular expression: train only runs whose names match, such as '^gspo' or 'seed1$'."""

    part: str = "1/1"
    """I/N: the I-th of N parts of the runs, for the jobs of a Slurm array, which share the folder."""

    report_only: bool = False
    """Train nothing."""


@dataclass(frozen=True)
class Kind:
    """Describes one study: its runs, its report, and what it has by default."""

    runs: Callable[[int, tuple[float, ...]], list[plan.RunSpec]]
    report: str  # a module with write(folder)
    defaults: Options


KINDS = {
    "routing-replay": Kind(plan.routing_replay, "report", Options()),
    "algorithms": Kind(plan.algorithms, "algorithms", Options(
        seeds=3, lr=plan.ALGORITHM_LEARNING_RATES, folder=Path("docs/studies/algorithms"),
        work=Path("runs/study-algorithms"))),
}  # fmt: skip


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status: 1 where a run failed.

    Raises:
        ConfigError, StudyError: what cannot work.
        SystemExit: 0 for --help, 2 for a value of the wrong type.
    """
    if argv[:1] and argv[0] in KINDS:
        return _study(
            KINDS[argv[0]],
            tyro.cli(Options, prog=f"{PROGRAM} {argv[0]}", args=argv[1:], default=KINDS[argv[0]].defaults),
        )
    wants_help = argv[:1] in (["-h"], ["--help"])
    print(USAGE, file=sys.stdout if wants_help else sys.stderr)
    raise SystemExit(0 if wants_help else 2)


def _study(kind: Kind, options: Options) -> int:
    options = replace(options, recipe=find_file(options.recipe))
    specs = chosen(kind, options)
    from gspo_megatron.study import runner

    study = runner.Study(options.recipe, options.folder, options.work, options.slots)
    failures = [] if options.report_only else runner.run_all(study, specs)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print(importlib.import_module(f"gspo_megatron.study.{kind.report}").write(options.folder))
    return int(bool(failures))


def chosen(kind: Kind, options: Options) -> list[plan.RunSpec]:
    """Return the runs of this call.

    Raises:
        ConfigError: an option cannot work.
    """
    check_options(options)
    require(options.recipe.is_file(), "--recipe", str(options.recipe), "is no file", "Give a YAML recipe.")
    for name in ("seeds", "slots"):
        value = getattr(options, name)
        require(value > 0, f"--{name}", value, "must be above 0", "Give 1 or more.")
        require(value <= MOST, f"--{name}", value, f"must be at most {MOST:,}", "Give a smaller number.")
    require(options.seeds >= 2, "--seeds", options.seeds, "gives no interval", "Give 2 or more; the report wants 5.")
    require(
        all(lr > 0 for lr in options.lr) and len(options.lr) > 0, "--lr", options.lr, "must be above 0", "Give 4e-4."
    )
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", options.part)
    number, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    require(1 <= number <= parts, "--part", options.part, "is no part of a whole", "Write 1/8 to 8/8.")
    try:
        pattern = re.compile(options.only)
    except re.error as error:
        require(False, "--only", options.only, f"is no regular expression ({error})", "Write '^gspo' or 'seed1$'.")
    specs = kind.runs(options.seeds, options.lr)
    return [spec for spec in specs[number - 1 :: parts] if pattern.search(spec.name)]
