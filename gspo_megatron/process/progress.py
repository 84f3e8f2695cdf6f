"""This says where the main thread is, in the words of the training loop; the watchdog tells it of a rank that hangs.

One process is in one place, so this is a module and no object that every layer would have to hand on. Written by the
main thread alone; other threads read it.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Place:
    """Says what the main thread does."""

    phase: str = "start"  # one of metrics.tracker.PHASES once training runs
    step: int | None = None
    part: str = ""  # rollout, reward, old_logprobs, update, checkpoint, ...
    detail: str = ""  # microbatch 2 of 4, token 17, ...

    def __str__(self) -> str:
        step = "" if self.step is None else f" step {self.step}"
        return ", ".join(word for word in (self.phase + step, self.part, self.detail) if word)


_here = Place()
_moves = 0


def here() -> Place:
    return _here


def moves() -> int:
    """Return what grows when the main thread comes to another place: equal numbers mean that it did not get on."""
    return _moves


def step(phase: str, number: int) -> None:
    """Note that the main thread begins a step of the training loop."""
    _go(Place(phase, number))


def detail(text: str) -> None:
    """Note that it got on within the part."""
    _go(replace(_here, detail=text))


@contextlib.contextmanager
def part(name: str) -> Iterator[None]:
    """Note that it does this inside the block."""
    before = _here
    _go(replace(before, part=name, detail=""))
    yield  # an error leaves the place as it is, for whoever asks where it came from
    _go(before)


def _go(place: Place) -> None:
    global _here, _moves
    _here, _moves = place, _moves + 1
