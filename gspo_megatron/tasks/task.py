"""A task gives items and scores responses. The mixture has one of these for each name of the recipe's `tasks`."""

from collections.abc import Callable, Sequence
from typing import Protocol

from gspo_megatron.batch import Response, Score, TaskItem
from gspo_megatron.config import TaskConfig

Told = Callable[[int], None]  # called with the number of responses that have a score by now


class Task(Protocol):
    """Items by number, and scores. Nothing here keeps a position."""

    def size(self, split: str) -> int | None:
        """Return how many items a split has; None where there is no end."""

    def item(self, split: str, index: int) -> TaskItem:
        """Return item number `index` >= 0 of a split: the same one at every call and on every rank."""

    def score(self, responses: Sequence[Response], told: Told) -> list[Score]:
        """Return one score a response, in their order."""

    def close(self) -> None:
        """End what runs for it."""


def failed(config: TaskConfig, parts: dict[str, float], error: str) -> Score:
    """Return the score of a response at which something went wrong: the recipe's on_error."""
    return Score(None if config.on_error == "drop" else float(config.on_error), parts, error)
