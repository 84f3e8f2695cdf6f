"""Does training survive what goes wrong? Breaks one thing in each of many real trainings, and prints a row each.

    python -m tools.validation.fault_matrix [--only 'kill|full'] [--markdown FILE] [--keep FOLDER]

Each row is a short training of the example recipe on two ranks of this machine under torchrun, in which one thing
breaks (tests/faults). "As if undisturbed" means that the last checkpoint's tensors are the same to the bit as those of
a training in which nothing broke, and that metrics.jsonl has each step once with the same numbers. Two rows need root,
who may mount a small disk. All rows take about 25 minutes.

Exit status: 0 all rows are as expected, 1 a row is not, 2 bad input.
"""

import argparse
import re
import sys
import tempfile
import textwrap
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.validation.faults.disks import CannotMount
from tools.validation.faults.rows import ROWS, Row
from tools.validation.faults.scenarios import Whole, undisturbed

COLUMNS = ("what breaks", "expected", "seen", "seconds", "what the user reads")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="rows whose name has this regular expression")
    parser.add_argument("--list", action="store_true", help="print the names of the rows and stop")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to this file")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep runs and logs there (must not exist)")
    return parser.parse_args()


def cells(row: Row, folder: Path, whole: Whole) -> tuple[list[str], str | None]:
    """(the row of the table, what was wrong)."""
    began, problem = time.monotonic(), None
    try:
        seen, reads = "as expected", row.run(folder, whole)
    except CannotMount as error:
        seen, reads = "not run", f"a small disk cannot be mounted: {error}"
    except Exception as error:  # whatever it is, the other rows are tried
        seen, reads, problem = "NOT AS EXPECTED", type(error).__name__, f"{row.fault}: {error}"
    reads = textwrap.shorten(reads.replace("|", "\\|").replace(f"{folder}/", ""), 170, placeholder=" ...")
    return [row.fault, row.expected, seen, f"{time.monotonic() - began:.0f}", reads], problem


def markdown(table: list[list[str]]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *table]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> int:
    options = arguments()
    try:
        rows = [row for row in ROWS if re.search(options.only, row.fault)]
    except re.error as problem:
        print(f"error: --only {options.only}: {problem}", file=sys.stderr)
        return 2
    if not rows:
        print("error: no row fits; --list names them all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(row.fault for row in rows))
        return 0
    if options.keep and options.keep.exists():
        print(f"error: --keep {options.keep}: exists already. Name a new folder.", file=sys.stderr)
        return 2
    if options.keep:
        return run(rows, options.keep.absolute(), options.markdown)
    with tempfile.TemporaryDirectory(prefix="faults_") as name:
        return run(rows, Path(name), options.markdown)


def run(rows: list[Row], folder: Path, target: Path | None) -> int:
    console = Console(width=None if sys.stdout.isatty() else 200)
    table = Table(title="one fault in one training")
    for name in COLUMNS:
        table.add_column(name)
    found, problems, began = [], [], time.monotonic()
    with console.status("a training in which nothing breaks") as status:
        whole = undisturbed(folder / "undisturbed")
        for number, row in enumerate(rows):
            status.update(f"{number + 1} of {len(rows)}: {row.fault}")
            line, problem = cells(row, folder / f"{number:02d}", whole)
            found.append(line)
            problems += [problem] if problem else []
            table.add_row(*line, style="bold red" if problem else None)
            if not sys.stdout.isatty():
                print(f"{line[2]}: {line[0]} ({line[3]} s)", flush=True)
    console.print(table)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(markdown(found))
    for problem in problems:
        print(f"FAIL {problem}", file=sys.stderr)
    print(
        f"{len(found)} rows in {time.monotonic() - began:.0f} s, {len(problems)} not as expected, "
        f"{sum(line[2] == 'not run' for line in found)} not run"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
