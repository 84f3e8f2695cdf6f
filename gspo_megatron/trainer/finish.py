"""What follows a run's last step: the Hugging Face folder, the charts, and the mark that nothing is left to do.

A run that was ended in here goes on here: the same command finds the last checkpoint, makes no step, and makes all of
this anew.
"""

import os
from pathlib import Path

from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.errors import TrainingError
from gspo_megatron.hf import export
from gspo_megatron.metrics.plots import draw
from gspo_megatron.trainer import resume
from gspo_megatron.trainer.run import Run
from gspo_megatron.utils.small_files import unwritten

REMEDY = "The last checkpoint is there. Make room, then start the same command: it makes what is missing."


def finish(run: Run) -> None:
    """Write what is wanted beside the last checkpoint. A collective over all ranks, and so is its error.

    Raises:
        ConversionError: the Hugging Face folder cannot be written.
        TrainingError: the charts cannot be written. The checkpoint is there.
    """
    if run.config.save_hf:
        with together():
            if run.runtime.is_main:
                _make_way(run.folder / "hf")
        hf, companions = run.hf_files()
        policy, target = run.policy, run.folder / "hf"
        export.export(policy.models, policy.topology, target, hf, policy.shape.architecture, companions=companions)
    with together():
        if run.runtime.is_main:
            last = run.resumed.step if run.resumed is not None and run.is_past_warm_start else 0
            epochs = run.epochs.number if run.epochs else 0
            number = complete(run.folder, max(run.config.steps, last), run.config.save_hf, epochs)
            run.reporter.note(f"done: {run.folder} has the checkpoint, metrics.jsonl and {number} plots")


def _make_way(target: Path) -> None:
    """Put a folder aside that an end with fewer steps, or one that was cut off, has left; the next start removes it."""
    try:
        if target.exists():
            resume.clear(target.with_name("hf.replaced"))
            os.rename(target, target.with_name("hf.replaced"))
    except OSError as error:
        raise TrainingError(f"{target}: cannot be replaced ({error.strerror}). {REMEDY}") from None


def complete(run_dir: Path, step: int, has_hf: bool, epochs: int = 0) -> int:
    """Draw the charts and set the mark of a run that ended with this step. Returns the number of charts.

    Args:
        epochs: that were asked for; 0 where steps were.

    Raises:
        TrainingError: one cannot be written; then there is no mark.
    """
    try:
        pictures = draw(run_dir)
        resume.clear(run_dir / "hf.replaced")
        resume.mark_finished(run_dir, step, has_hf, epochs)
    except OSError as error:
        raise TrainingError(unwritten(error, run_dir / "plots", REMEDY)) from None
    return len(pictures)
