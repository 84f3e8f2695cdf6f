"""Do the examples of the guides learn? Three seeds of each recipe, judged as docs/your_data.md says it.

    python -m tools.validation.your_data                                # the recipes of the two guides
    python -m tools.validation.your_data examples/recipes/calculator.yaml --seeds 1

Held-out accuracy must rise by more than 0.03 and by more than twice its standard error, and all that `gspo-megatron
check-learning` asks must hold. A run that is complete is not trained again, and one that was cut off goes on. The data
that a recipe names must be there: the guides say which script writes them. Exit status 1 if a run fails. 7 to 20
minutes a run on two cores.

Left out: statistics over the seeds; each is judged alone.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from gspo_megatron.metrics.learning import LearningReport, failures, summarise
from gspo_megatron.metrics.record import load_record, series
from gspo_megatron.metrics.tracker import MetricsError

RECIPES = tuple(Path(f"examples/recipes/{name}.yaml") for name in ("your_data", "retry", "calculator"))
LEAST = 0.03
TITLES = ("recipe", "seed", "accuracy after the warm start", "at the end", "rise, s.e.", "held-out reward",
          "turns, first and last step", "verdict")  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Train recipes with several seeds, and say whether each run learned."""

    recipes: tyro.conf.Positional[tuple[Path, ...]] = RECIPES
    """Recipes, whose data are there."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run each."""
    output_dir: Path = Path("runs")
    """Where the run folders are, as RECIPE_seed_N."""


def least_rise(report: LearningReport) -> float:
    """Return what held-out accuracy must rise by: 0.03, or twice its standard error where that is more."""
    return max(LEAST, 2 * (report.start_error or 0.0))


def judged(folder: Path) -> tuple[LearningReport, list[str]]:
    """Return a run's numbers, and the criteria that it does not meet. Raises MetricsError where it has none."""
    report = summarise(folder)
    return report, failures(report, min_rise=least_rise(report))


def is_complete(folder: Path) -> bool:
    """Tell whether a run has been to its last step, however it did."""
    try:
        report = summarise(folder)
    except MetricsError:
        return False
    return report.steps_planned is not None and report.steps_done >= report.steps_planned


def trained(recipe: Path, seed: int, output: Path) -> Path:
    """Return the folder of a run, after training what is missing of it."""
    name = f"{recipe.stem}_seed_{seed}"
    folder = output / name
    if not is_complete(folder):
        command = [sys.executable, "-m", "gspo_megatron.cli", "train", str(recipe), "--seed", str(seed)]
        subprocess.run([*command, "--name", name, "--output-dir", str(output)], check=False)  # it says why it failed
    return folder


def row(recipe: Path, seed: int, folder: Path) -> tuple[str, bool]:
    """Return a run's line of the table, and whether it passes."""
    if not is_complete(folder):
        return f"| {recipe.stem} | {seed} |{' - |' * (len(TITLES) - 3)} {folder} has not been to its last step |", False
    report, failed = judged(folder)
    record = load_record(folder).rl
    rewards = series(record, "eval/reward")[1]
    names = sorted({name for one in record for name in one if name.endswith("/turns")})
    turns = [series(record, name)[1] for name in names]
    cells = (
        recipe.stem,
        str(seed),
        f"{report.start:.3f}",
        f"{report.final:.3f}",
        f"{report.rise:+.3f}, {report.start_error or 0.0:.3f}",
        f"{rewards[0]:.3f} to {rewards[-1]:.3f}",
        "; ".join(f"{one[0]:.2f}, {one[-1]:.2f}" for one in turns) or "-",
        "; ".join(failed) or "pass",
    )
    return f"| {' | '.join(cells)} |", not failed


def main(options: Options) -> int:
    """Train what is missing, and print the table. Returns the exit status."""
    runs = [(recipe, seed) for recipe in options.recipes for seed in options.seeds]
    rows = [row(recipe, seed, trained(recipe, seed, options.output_dir)) for recipe, seed in runs]
    print(f"| {' | '.join(TITLES)} |\n|{' --- |' * len(TITLES)}")
    print("\n".join(line for line, _ in rows))
    return 0 if all(passes for _, passes in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
