"""A run that goes on with other values of its recipe: what has changed since its checkpoint.

Which values may is recipe/changes.py, and which run goes on folders.py.
"""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.config import TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.metrics.tracker import BY_HAND, METRICS_FILE, MetricsError, read_record
from gspo_megatron.recipe import changes
from gspo_megatron.recipe.load import read_saved
from gspo_megatron.trainer.resume import CONFIG_FILE, Progress


def change_after(config: TrainConfig, run_dir: Path, checkpoint: Path, progress: Progress) -> Event | None:
    """Return what the steps from here on have otherwise than those of the checkpoint; None where that is nothing.

    The checkpoint's own recipe counts, not the folder's: a start that was ended before its first checkpoint has left
    nothing of its steps or of its event.

    Raises:
        ConfigError: there is a change, and the checkpoint has no recipe.
    """
    has_recipe = (checkpoint / CONFIG_FILE).is_file()
    found = changes.noted(config, read_saved((checkpoint if has_recipe else run_dir) / CONFIG_FILE))
    if not found:
        return None
    require(
        has_recipe,
        found[0].field,
        found[0].new,
        f"is {found[0].old!r} in the run, whose newest checkpoint is of a version that kept no recipe there: the "
        "change could be lost from the record",
        "Go on with the same value to the next checkpoint, and change it there.",
    )
    values = {change.field: (change.old, change.new) for change in found}
    return Event(progress.phase, progress.step, values, progress.prompts)


def earlier_weights(
    config: TrainConfig, run_dir: Path, checkpoint: Path, progress: Progress
) -> list[tuple[int, dict[str, float]]]:
    """Return weights_before of a run whose record has been put back to this checkpoint. A collective over all ranks.

    Raises:
        ConfigError: see change_after. On every rank.
        MetricsError: the record is damaged. On every rank.
    """
    found: list = [None]
    with together():
        if dist.get_rank() == 0:
            now = change_after(config, run_dir, checkpoint, progress)
            found[0] = weights_before(config, [*read_record(run_dir)[1], *([now] if now else [])])
    dist.broadcast_object_list(found, src=0)
    return found[0]


def weights_before(config: TrainConfig, events: Sequence[Event]) -> list[tuple[int, dict[str, float]]]:
    """Return which weights of tasks held up to which prompt, in order; nothing where they never changed.

    Args:
        events: of the run's record, with that of this start.

    Raises:
        MetricsError: one has a weight that is none.
    """
    weights = {name: task.weight for name, task in config.tasks.items()}
    found = []
    for event in reversed(events):
        old = {name: event.changes.get(f"tasks.{name}.weight", (weight,))[0] for name, weight in weights.items()}
        if old != weights:
            found.append((event.prompts, old))
            weights = old
    for _, old in found:
        if not all(isinstance(weight, int | float) and weight > 0 for weight in old.values()):
            raise MetricsError(f"{METRICS_FILE}: an event has a task's weight that is none ({old}). {BY_HAND}")
    return found[::-1]
