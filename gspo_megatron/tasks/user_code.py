"""A rank's side of what a user's code has in common: a process that is started, loads what the recipe names, and ends.

Left out: what is asked of it afterwards (rewards.py, environments.py).
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, NoReturn, TypeVar

from gspo_megatron.config import FaultsConfig, TaskConfig
from gspo_megatron.errors import ConfigError
from gspo_megatron.tasks.reward_calls import TAKING
from gspo_megatron.tasks.reward_worker import Lost, RewardProcess

Known = TypeVar("Known")


class UserCode(Generic[Known]):
    """What one field of a task names, loaded in a process that is started when it is needed, or by `start`.

    `field`: of the recipe, for messages. `targets`: what it names, files by their absolute paths. `program`: the module
    that loads them. `understood`: makes of what the process tells of them what the caller wants to know.
    """

    def __init__(
        self,
        field: str,
        targets: Sequence[str],
        config: TaskConfig,
        faults: FaultsConfig,
        program: str,
        understood: Callable[[Any], Known],
    ):
        memory = int(faults.reward_memory_gb * 2**30) if config.isolate == "process" else 0
        self.process = RewardProcess(memory, program)
        self._field, self._targets, self._understood = field, targets, understood
        self._request = ("load", targets, faults.reward_timeout, config.concurrency)
        self.known: Known | None = None  # None: the process has not told it

    def start(self) -> None:
        """Returns at once; the process comes up in the background."""
        if not self.process.is_running:
            with contextlib.suppress(Lost):  # the first one who needs it will see
                self._begin()

    def loaded(self) -> Known:
        """Return what is known of it; the process runs then, a new one where it had ended.

        Raises:
            ConfigError: it cannot be loaded.
        """
        try:
            if not self.process.is_running:
                self._begin()
            if self.known is None:
                answer = self.process.answers(time.monotonic() + TAKING, TAKING)[0]
                if "refused" in answer:
                    self.refuse(answer["refused"], answer["target"])
                self.known = self._understood(answer["loaded"])
        except Lost as lost:
            self.refuse(f"its import {f'took longer than {TAKING:g} s' if lost.is_late else lost}. Correct it.")
        return self.known

    def refuse(self, why: str, target: str | None = None) -> NoReturn:
        """End the process, and raise ConfigError with the field and the target, or all of them."""
        self.close()
        raise ConfigError(f"{self._field} = {target or ', '.join(self._targets)!r}: {why}") from None

    def close(self) -> None:
        """End the process and what it started."""
        self.process.close()
        self.known = None

    def _begin(self) -> None:
        self.known = None
        self.process.start()
        self.process.send(self._request, TAKING)
