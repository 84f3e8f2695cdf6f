"""`gspo-megatron plot` draws a run's charts again, from its metrics.jsonl."""

from pathlib import Path
from typing import Annotated

import tyro

from gspo_megatron.config.names import check_length
from gspo_megatron.metrics.plots import draw
from gspo_megatron.metrics.tracker import MetricsError
from gspo_megatron.utils.small_files import unwritten

PROGRAM = "gspo-megatron plot"


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status 0.

    Raises:
        MetricsError: the run has no metrics that can be read, or its charts cannot be written.
    """
    run = tyro.cli(_run, prog=PROGRAM, args=argv)
    check_length("RUN", run)
    try:
        paths = draw(run)
    except OSError as error:
        remedy = "Make room or make it writable, then draw them again."
        raise MetricsError(unwritten(error, run / "plots", remedy)) from None
    for path in paths:
        print(path)
    return 0


def _run(run: Annotated[Path, tyro.conf.Positional]) -> Path:
    """Draw every chart the run has data for into its plots folder and print their paths.

    Args:
        run: Run folder with a metrics.jsonl; it may still be running.
    """
    return run
