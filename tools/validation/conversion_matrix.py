"""Every family in every layout: from transformers into Megatron and back. `python -m
tools.validation.conversion_matrix`

A cell is the largest difference to transformers' logits in fp32 if every tensor came back to the bit, else the number
of tensors that did not. Exit status 1 if a cell is bad. Takes about two minutes on 2 cores.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RANKS = 4


def main(markdown: Annotated[Path | None, tyro.conf.arg(help="also write the table to this file")] = None) -> int:
    """Run all cases on four Gloo ranks and print one table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is not left behind
    from tools.validation.round_trip import LAYOUTS, TINY, Outcome, write_model

    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="conversion_") as name:
        folder = Path(name)
        for model, config in TINY.items():
            write_model(folder / model, config)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(RANKS),
            "-m",
            "tools.validation.round_trip",
            str(folder),
        ]
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
        with console.status(f"{len(TINY)} models in {len(LAYOUTS)} layouts"):
            done = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        results = folder / "results.jsonl"
        lines = results.read_text().splitlines() if results.exists() else []
    found = {(row.pop("model"), row.pop("layout")): Outcome(**row) for row in map(json.loads, lines)}
    rows = [[model, *(cell(found.get((model, layout))) for layout in LAYOUTS)] for model in TINY]
    table = Table("model", *LAYOUTS)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if markdown:
        head = ["model", *LAYOUTS]
        marked = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        markdown.write_text("\n".join(marked) + "\n", encoding="utf-8")
    bad = [key for key, outcome in found.items() if not outcome.is_good]
    print(f"{len(found)} of {len(TINY) * len(LAYOUTS)} cases, {len(bad)} bad")
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
    return int(bool(bad) or len(found) < len(TINY) * len(LAYOUTS))


def cell(outcome) -> str:
    if outcome is None:
        return "did not run"
    if outcome.differing:
        return f"{len(outcome.differing)} of {outcome.tensors} tensors differ"
    return f"{outcome.logits:.1e}" + ("" if outcome.is_good else " too large")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
