"""Weights & Biases' view of a run.

The id of the W&B run is in wandb.json of the run folder, so that a run which goes on does so under the same id. W&B
numbers its history by calls and takes no smaller number; so the step is a metric of its own here, the x-axis of all
others. Steps that a resumed run repeats are in the history twice, at the same x.

Left out: rows of the last seconds before a kill (W&B's own process writes them down in bundles), samples, files.
"""

import json
from pathlib import Path
from typing import Any

import wandb

from gspo_megatron.metrics.sink import WANDB_FILE, Row
from gspo_megatron.utils import plain_json
from gspo_megatron.utils.small_files import replace

UPLOAD_SECONDS = 60.0  # at the end of a run; without an end of it W&B tries on and on


class WandbSink:
    """Logs to a W&B run, to that of wandb.json where it is of this project.

    Args:
        recipe: the run's config at W&B; that of the newest start counts.
        earlier: what a new W&B run gets first.
    """

    def __init__(self, folder: Path, project: str, recipe: dict[str, Any], earlier: list[Row]):
        known = _known(folder / WANDB_FILE, project)
        # Silent also means that nobody is asked for a key: a rank has no one to answer.
        wandb.setup(wandb.Settings(silent=True, console="off"))
        self._run = wandb.init(
            project=project,
            id=known,
            name=folder.name,
            dir=folder,
            resume="allow",
            settings=wandb.Settings(finish_timeout=UPLOAD_SECONDS, finish_timeout_raises=True),
        )
        self._run.config.update(recipe, allow_val_change=True)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        if known is None and not self._run.disabled:
            saved = {"project": project, "id": self._run.id, "url": self._run.url}
            replace(folder / WANDB_FILE, json.dumps(saved).encode())
            for row in earlier:
                self.log(*row)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Hand the numbers to W&B's own process."""
        self._run.log({"step": step, **numbers})

    def close(self, patience: float) -> None:
        """End the W&B run, which a resumed run opens again. Waits at most UPLOAD_SECONDS."""
        self._run.finish()


def _known(path: Path, project: str) -> str | None:
    """Return the id that this run has at W&B; None where it has none, or one of another project."""
    try:
        saved = plain_json.read_object(path)
    except (OSError, ValueError):
        return None
    return str(saved["id"]) if saved.get("project") == project and "id" in saved else None
