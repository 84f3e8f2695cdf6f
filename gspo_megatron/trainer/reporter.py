"""A run tells people by the console and trackers, and programs by metrics.jsonl. It does so from rank 0 alone."""

from collections.abc import Callable
from pathlib import Path

from gspo_megatron.config import TrainConfig
from gspo_megatron.metrics.console import Console
from gspo_megatron.metrics.recipe_event import Event
from gspo_megatron.metrics.sink import tracker_sinks
from gspo_megatron.metrics.tracker import PATIENCE, MetricsError, Tracker


class Reporter:
    """A reporter has the console, metrics.jsonl and the recipe's trackers on rank 0; it does nothing on the others.

    Raises:
        MetricsError: on rank 0, where the run's files cannot be opened.
    """

    def __init__(self, run_dir: Path, is_main: bool, config: TrainConfig):
        self.error: MetricsError | None = None  # the record could not be written; every rank must hear of it
        self.console: Console | None = None
        self.tracker: Tracker | None = None
        if is_main:
            self.console = Console()
            self.tracker = Tracker(run_dir, self.console.warn, tracker_sinks(run_dir, config))

    def header(self, lines: dict[str, str]) -> None:
        if self.console:
            self.console.header(lines)

    def phase(self, name: str, total: int, done: int = 0) -> None:
        if self.console:
            self.console.phase(name, total, done)

    def row(self, row: dict) -> None:
        if self.console and self.tracker:
            try:
                self.tracker.log(row)
            except MetricsError as error:
                self.error = error
            self.console.step(row)

    def event(self, event: Event) -> None:
        """Put a change of the recipe into the record, and tell. Raises MetricsError on rank 0."""
        if self.console and self.tracker:
            self.tracker.event(event)
            self.console.note(f"goes on with other values after {event.phase} step {event.step}: {event}")

    def sample(self, row: dict) -> None:
        if self.tracker:
            self.tracker.sample(row)

    def note(self, text: str) -> None:
        if self.console:
            self.console.note(text)

    def warn(self, text: str) -> None:
        if self.console:
            self.console.warn(text)

    def tell(self, step: int, sentences: list[str]) -> None:
        for sentence in sentences:
            self.warn(f"step {step}: {sentence}")

    def scored(self, total: int) -> Callable[[int], None]:
        """Return what tells people, now and then, how many of the responses have a reward by now."""
        return self.console.counter("rewards", total) if self.console else lambda done: None

    def close(self, patience: float = PATIENCE) -> None:
        """Close files and trackers, which have so many seconds each for what they have not sent."""
        if self.console and self.tracker:
            self.console.close()
            self.tracker.close(patience)
