"""The program in which users' environments live: one child process of each rank that scores, for each task.

It speaks with the rank as the program of reward functions does (reward_process.py), and its episodes are held by number
until the next ones are opened. What one of them raises, or that it takes longer than faults.reward_timeout, is told of
that one alone. Methods that are not async run in threads, so that one that waits holds up no other.
"""

import asyncio
import importlib.util
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gspo_megatron.tasks import environment_class
from gspo_megatron.tasks.environment_class import EnvironmentClass
from gspo_megatron.tasks.reward_functions import LoadError
from gspo_megatron.tasks.reward_process import Crowd, Tell, serve
from gspo_megatron.tasks.reward_values import WrongValue, one_line


class Program:
    """What the process knows between two requests: the class, and the episodes."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._known: EnvironmentClass | None = None
        self._episodes: dict[int, Any] = {}
        self._seconds, self._concurrency = 0.0, 1
        # One for all calls: an environment may keep connections, which belong to a loop.
        self._loop = asyncio.new_event_loop()

    def answer(self, request: str, *arguments: Any) -> None:
        """Do as a request says: load, open, turn or reward."""
        does: dict[str, Callable[..., None]] = {
            "load": self._load,
            "open": self._open,
            "turn": self._turn,
            "reward": self._reward,
        }
        does[request](*arguments)

    def _load(self, targets: Sequence[str], seconds: float, concurrency: int) -> None:
        """Find the class, and tell what it has. A task has one."""
        (target,) = targets
        self._seconds, self._concurrency = seconds, concurrency
        self._loop.set_default_executor(ThreadPoolExecutor(concurrency))
        try:
            self._known = known = environment_class.found(target)
            told = {name: getattr(known, name) for name in ("is_game", "has_reward", "takes", "required", "tools")}
            self._tell(loaded=told | {"schemas": known.schemas()})
        except LoadError as error:
            self._tell(target=target, refused=str(error))

    def _open(self, rows: Sequence[tuple[int, dict[str, Any]]]) -> None:
        """Begin episodes, in place of those before. Columns of one row are one object in `rows`."""
        self._episodes = {}
        columns = dict(rows)

        async def opened(place: int) -> dict[str, Any]:
            self._episodes[place], text = await environment_class.reset(self._of_loaded, columns[place])
            return {"observation": text}

        self._all(opened, list(columns))

    def _turn(self, texts: Sequence[tuple[int, str]]) -> None:
        """Hand each of these episodes a response of the model."""
        said = dict(texts)

        async def answered(place: int) -> dict[str, Any]:
            turn = await environment_class.turn(self._of_loaded, self._episodes[place], said[place])
            return {"messages": turn.messages, "done": turn.done, "reward": turn.reward}

        self._all(answered, list(said))

    def _reward(self, places: Sequence[int]) -> None:
        async def rewarded(place: int) -> dict[str, Any]:
            return {"reward": await environment_class.reward(self._episodes[place])}

        self._all(rewarded, places)

    @property
    def _of_loaded(self) -> EnvironmentClass:
        assert self._known is not None  # it is loaded first
        return self._known

    def _all(self, call: Callable[[int], Awaitable[dict[str, Any]]], places: Sequence[int]) -> None:
        async def outcome(place: int) -> dict[str, Any]:
            try:
                return await call(place)
            except WrongValue as error:
                return {"error": str(error)}
            except BaseException as error:  # asyncio would let SystemExit end the loop
                return {"error": f"raised {one_line(error)}"}

        self._loop.run_until_complete(Crowd(outcome, self._tell, self._seconds, self._concurrency).run(places))


def main(parent: int, memory: int) -> None:
    """Answer requests for environments until stdin ends; the arguments are serve's."""
    # Describing tools imports torch, that dill where it is installed, and that opens /dev/null for writing; behind
    # walls it could not. (torch is imported in there: a text game has no need of it, and it may be larger than one.)
    if importlib.util.find_spec("dill"):
        importlib.import_module("dill")
    serve(parent, memory, lambda tell: Program(tell).answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
