"""Is a training that was killed the training that was not? Kills random ranks at random moments, and compares bits.

    python -m tools.validation.kill_resume [--kills 10] [--steps 40] [--window 5] [--seed 1] [--markdown FILE]

For each layout (DP2 with the distributed optimizer, TP2 x PP2, EP2 x PP2) a short training of the example recipe runs
to its end undisturbed. Then the same training is started under torchrun once, and kill -9 takes a random rank of every
start, most often within --window seconds of training, sometimes while the start imports, connects or loads. torchrun
starts the ranks again. The last checkpoint's tensors (weights, Adam's moments, fp32 copies) must have the same SHA-256,
file by file, and metrics.jsonl each step once with the same numbers. All layouts take about ten minutes.

Exit status: 0 all are the same, 1 one is not, 2 bad input.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from tools.validation.faults.random_kills import LAYOUTS, Layout, survive, undisturbed

COLUMNS = ("layout", "ranks", "kills", "last checkpoint, metrics.jsonl", "seconds", "where the kills fell")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="a layout (10)")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="RL steps of the training (40)")
    parser.add_argument("--window", type=float, default=5.0, metavar="S", help="seconds of training before a kill (5)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of moments and ranks (1)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to this file")
    options = parser.parse_args()
    for name in ("kills", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: give 1 or more")
    return options


def cells(layout: Layout, folder: Path, options: argparse.Namespace) -> tuple[list[str], bool]:
    """(the row of the table, whether all is well)."""
    try:
        whole = undisturbed(folder / "undisturbed", layout, options.steps)
        killed = survive(folder / "killed", layout, whole, options.kills, options.steps, options.seed, options.window)
    except AssertionError as problem:
        print(f"FAIL {layout.name}: {problem}", file=sys.stderr)
        return [layout.name, str(layout.ranks), str(options.kills), "NOT THE SAME", "", ""], False
    return [
        layout.name,
        str(layout.ranks),
        str(options.kills),
        f"same bits in all {len(whole.digests)} files, same {len(whole.rows)} rows",
        f"{killed.seconds:.0f}",
        "; ".join(killed.moments),
    ], True


def main() -> int:
    options = arguments()
    console, table, well = Console(), [], True
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory(prefix="kills_") as name, console.status(f"{layout.name}"):
            row, is_well = cells(layout, Path(name), options)
        table.append(row)
        well &= is_well
        print(" | ".join(row), flush=True)
    if options.markdown:
        lines = [list(COLUMNS), ["---"] * len(COLUMNS), *table]
        options.markdown.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
