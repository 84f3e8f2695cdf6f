"""Redraw a run's charts from its metrics.jsonl: `python tools/plot_run.py runs/moe_gspo`."""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics.plots import draw


def main(run: Annotated[Path, tyro.conf.Positional]) -> int:
    """Draw every chart the run has data for into its plots folder and print their paths.

    Args:
        run: Run folder with a metrics.jsonl; it may still be running.
    """
    try:
        paths = draw(run)
    except GspoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
