"""Numbers of a run go to sinks: TensorBoard's file, and trackers of other libraries (W&B, MLflow).

One interface for all, and a thread that stands between the training and those that may wait for a network.

Left out: numbers that a sink missed while it was out of order. metrics.jsonl has them all.
"""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Protocol

from gspo_megatron.config import TrainConfig
from gspo_megatron.recipe.load import plain_values

WANDB_FILE, MLFLOW_FILE = "wandb.json", "mlflow.json"  # ids of this run elsewhere
# What sinks leave in a run folder.
LEFT = {"tensorboard", "wandb", WANDB_FILE, "mlflow", MLFLOW_FILE}

Row = tuple[int, dict[str, float]]  # a step, and what was measured at it


class Sink(Protocol):
    """A sink shows a run's numbers. Whatever it raises costs the run a warning, and what would have been shown."""

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Show what was measured at a step."""

    def close(self, patience: float) -> None:
        """End it. It may wait so many seconds for what is under way."""


# Gets the rows that the record has already, for a sink that has nothing of this run yet.
Opener = Callable[[list[Row]], Sink]


def tracker_sinks(folder: Path, config: TrainConfig) -> dict[str, Opener]:
    """Return what opens the trackers that a recipe asks for, by the names of its fields.

    Their libraries are imported by the caller's thread, since imports of two threads can get into each other's way;
    from then on another thread has the waiting.
    """
    recipe = plain_values(config)

    def wandb(earlier: list[Row]) -> Sink:
        from gspo_megatron.metrics.wandb_sink import WandbSink

        return Background(partial(WandbSink, folder, config.tracking.project, recipe), earlier)

    def mlflow(earlier: list[Row]) -> Sink:
        from gspo_megatron.metrics.mlflow_sink import MlflowSink

        return Background(partial(MlflowSink, folder, config.tracking, recipe), earlier)

    wanted = {"tracking.wandb": (config.tracking.wandb, wandb), "tracking.mlflow": (config.tracking.mlflow, mlflow)}
    return {name: opener for name, (is_wanted, opener) in wanted.items() if is_wanted}


class Background:
    """A sink that works in a thread of its own, from its opening on: no network holds up a step.

    Its first error ends it. Every call from then on raises that error.
    """

    def __init__(self, opener: Opener, earlier: list[Row]):
        self._rows: SimpleQueue[Row | float] = SimpleQueue()  # at last the patience of close()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(opener, earlier), name="tracker", daemon=True)
        self._thread.start()

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Hand the numbers over; returns at once."""
        self._check()
        self._rows.put((step, numbers))

    def close(self, patience: float) -> None:
        """Wait until all is shown. Raises TimeoutError where that takes longer than `patience` seconds."""
        self._rows.put(patience)
        self._thread.join(patience)
        self._check()
        if self._thread.is_alive():
            raise TimeoutError(f"not all was sent within {patience:g} seconds")

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, opener: Opener, earlier: list[Row]) -> None:
        try:
            sink = opener(earlier)
            while isinstance(row := self._rows.get(), tuple):
                sink.log(*row)
            sink.close(row)
        except Exception as error:
            self._error = error
