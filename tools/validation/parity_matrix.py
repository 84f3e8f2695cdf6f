"""Is the loss and its whole gradient the same in every parallel layout? Prints one row a case.

    python -m tools.validation.parity_matrix [--only 'TP2.*gspo '] [--ranks 4] [--dtype fp64] [--markdown
    docs/parity.md]

One optimizer step of a small MoE on one awkward batch (parity/fixture.py), by the plain formula in fp64
in one process and by Megatron on 1, 2 and 4 Gloo ranks of this machine. Columns:

    loss       |loss - truth| / mean |A|
    gradient   norm of the difference / norm of the truth, over all parameters and every copy of them
    ratio      largest |s - truth| of a sequence

Limits in fp32: 1e-6, 1e-5, 1e-5; in fp64: 1e-11 each. The gradient norm that Megatron reports must be right to 1e-5 (it
adds it up in fp32), every clip decision and every count of trained tokens must be the same. bf16 has no limit; its
ratio error stands beside epsilon = 3e-4. It is the model's bf16 body against old log-probs of the fp64 model, on random
weights; in training both come from the same arithmetic, so most of it cancels (gspo-megatron doctor --noise-floor).

Exit status: 0 all within the limits, 1 a limit is broken or a case did not run, 2 bad input.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.validation.parity.cases import Case, matrix
from tools.validation.parity.run import EPSILON, LIMITS, Errors

COLUMNS = (
    "layout",
    "ranks",
    "microbatches",
    "batch",
    "recompute",
    "head",
    "algorithm",
    "dtype",
    "options",
    "loss",
    "gradient",
    "ratio",
    "seconds",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name has this regular expression (see --list)")
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4), help="cases of this many ranks")
    parser.add_argument("--dtype", choices=("fp32", "fp64", "bf16"), help="cases in this type")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table to this file")
    return parser.parse_args()


def selected(options: argparse.Namespace) -> list[Case]:
    cases = matrix()
    if options.only:
        cases = [case for case in cases if re.search(options.only, case.name)]
    if options.ranks:
        cases = [case for case in cases if case.layout.ranks == options.ranks]
    return [case for case in cases if options.dtype in (None, case.dtype)]


def row(case: Case, errors: Errors | None) -> list[str]:
    """The cells of COLUMNS."""
    choice = [case.layout.name, str(case.layout.ranks), str(case.microbatches)]
    choice += ["padded" if case.padded else "packed", "yes" if case.recompute else "no"]
    choice += ["chunked" if case.chunked else "whole", case.algorithm, case.dtype, case.options]
    if errors is None:
        return choice + ["not run", "", "", ""]
    beside = f" ({errors.ratio / EPSILON:.0f} epsilon)" if case.dtype not in LIMITS else ""
    numbers = [f"{errors.loss:.0e}", f"{errors.gradient:.0e}", f"{errors.ratio:.0e}{beside}", f"{errors.seconds:.1f}"]
    return choice + numbers


def launch(ranks: int, folder: Path) -> Iterator[tuple[str, Errors] | str]:
    """Errors of each case as it ends; a string when the launch failed: the end of what it wrote to stderr."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "tools.validation.parity.worker",
        str(folder),
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else Gloo looks the host's name up, which can fail
    results, log = folder / f"results.{ranks}.jsonl", folder / f"stderr.{ranks}"
    results.write_text("")
    with log.open("wb") as stderr, results.open() as lines:
        process = subprocess.Popen(command, env=env, stderr=stderr, stdout=stderr)
        try:
            ended = False
            while not ended:
                ended = process.poll() is not None  # asked first, so that nothing written before is missed
                for line in lines:
                    found = json.loads(line)
                    yield found.pop("case"), Errors(**found)
                time.sleep(0 if ended else 0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if process.returncode:
        yield f"{ranks} ranks ended with status {process.returncode}:\n{log.read_text()[-4000:]}"


def run_all(cases: list[Case], console: Console) -> tuple[dict[str, Errors], list[str]]:
    """(errors by the case's name, accounts of launches that failed). A case that ends its launch is left behind."""
    found: dict[str, Errors] = {}
    broken: list[str] = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with tempfile.TemporaryDirectory(prefix="parity_") as scratch, bar:
        folder = Path(scratch)
        task = bar.add_task("truth by the formula, one rank", total=len(cases))
        torch.save(cases, folder / "plan.pt")
        # One rank always: it computes the truths.
        for ranks in sorted({1} | {case.layout.ranks for case in cases}):
            rest, failed = [case for case in cases if case.layout.ranks == ranks], True
            while failed and (rest or ranks == 1):
                failed = False
                for result in launch(ranks, folder):
                    if isinstance(result, str):
                        failed = True
                        broken.append(result)
                        continue
                    name, errors = result
                    found[name] = errors
                    bar.update(task, advance=1, description=name)
                if failed and not (folder / "truths.pt").exists():
                    return found, broken
                rest = [case for case in rest if case.name not in found][1:]
                torch.save([case for case in cases if case.layout.ranks != ranks] + rest, folder / "plan.pt")
    return found, broken


def print_table(cases: list[Case], found: dict[str, Errors], console: Console) -> None:
    table = Table(title="one step against the plain formula in fp64")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name in ("ranks", "microbatches", "seconds") else "left")
    for case in cases:
        errors = found.get(case.name)
        bad = errors is None or errors.failures(case.dtype)
        table.add_row(*row(case, errors), style="bold red" if bad else None)
    console.print(table)


def markdown(cases: list[Case], found: dict[str, Errors]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)] + [row(case, found.get(case.name)) for case in cases]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that ranks and folder are not left behind
    console = Console(width=None if sys.stdout.isatty() else 180)
    try:
        cases = selected(options)
    except re.error as problem:
        print(f"error: --only {options.only}: {problem}", file=sys.stderr)
        return 2
    if not cases:
        print("error: no case fits; --list names them all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    began = time.monotonic()
    found, broken = run_all(cases, console)
    print_table(cases, found, console)
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(markdown(cases, found))
    failures = [
        f"{case.name}: {sentence}"
        for case in cases
        if case.name in found
        for sentence in found[case.name].failures(case.dtype)
    ]
    failures += [f"{case.name}: did not run" for case in cases if case.name not in found]
    for sentence in broken + failures:
        print(f"FAIL {sentence}", file=sys.stderr)
    print(f"{len(found)} of {len(cases)} cases in {time.monotonic() - began:.0f} s, {len(failures)} failures")
    return 1 if failures or broken else 0


if __name__ == "__main__":
    sys.exit(main())
