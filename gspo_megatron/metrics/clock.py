"""A clock counts the seconds of the parts of one step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gspo_megatron.process import progress


class StepClock:
    """Adds up named parts; whatever no part covers is `other`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._parts: dict[str, float] = {}
        self._started = self._now()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = self._now()
        with progress.part(name):
            yield
        self._parts[name] = self._parts.get(name, 0.0) + self._now() - started

    def read(self) -> dict[str, float]:
        """Return time/<part>, time/other and time/step, in seconds since the clock was made."""
        total = self._now() - self._started
        times = {f"time/{name}": seconds for name, seconds in self._parts.items()}
        return times | {"time/other": total - sum(self._parts.values()), "time/step": total}

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()  # kernels run behind the host's back
        return time.perf_counter()
