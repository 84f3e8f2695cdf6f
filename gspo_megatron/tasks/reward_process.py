"""The program in which users' reward functions run: one child process of each rank that scores, for each task.

Requests come pickled from the rank, and answers go back one line of JSON each, as they come. A function may print (that
goes to the rank's stderr), change the working directory, fork, raise SystemExit, or hang; where it ends the process or
takes too long, the rank starts another one.

The rank's side is reward_worker.py. Left out: several processes, so that functions that are not async share one core
unless they start processes of their own.
"""

import asyncio
import functools
import json
import os
import pickle
import signal
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

from gspo_megatron.process.lifecycle import SIGNALS
from gspo_megatron.tasks import walls
from gspo_megatron.tasks.reward_functions import TRL, LoadError, RewardFunction, Row, load
from gspo_megatron.tasks.reward_values import IN_A_ROW, IN_ALL, listed, score, too_slow, untried

LOOK = 0.5  # seconds between two looks for responses that take too long, at most
LENGTH = struct.Struct("<Q")  # before each request


Tell = Callable[..., None]  # writes one line of JSON to the rank


def main(parent: int, memory: int) -> None:
    """Answer requests for reward functions until stdin ends; the arguments are serve's."""
    serve(parent, memory, lambda tell: Program(tell).answer)


def serve(parent: int, memory: int, program: Callable[[Tell], Callable[..., None]]) -> None:
    """Answer requests until stdin ends.

    Args:
        parent: the rank, with which this process ends.
        memory: bytes of address space, behind walls; 0: no walls.
        program: is given what tells the rank, and returns what does as a request says.
    """
    walls.die_with_parent(parent)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.dup(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a function prints is no answer
    _answer_no_signal()
    sys.dont_write_bytecode = True  # beside the user's files
    if memory:
        walls.fence(memory)
    answer = program(_teller(answers))
    while (request := _read(requests)) is not None:
        answer(*request)
    os._exit(0)  # a thread of a function must not keep it


def _teller(answers: int) -> Tell:
    pid = os.getpid()

    def tell(**line: Any) -> None:
        if os.getpid() != pid:
            os._exit(0)  # a function forked, and returned there too
        rest = memoryview(json.dumps(line).encode() + b"\n")
        while rest:
            rest = rest[os.write(answers, rest) :]

    return tell


def _read(requests: BinaryIO) -> tuple | None:
    head = requests.read(LENGTH.size)
    return pickle.loads(requests.read(*LENGTH.unpack(head))) if head else None


def _answer_no_signal() -> None:
    """Let a scheduler's signals, which were blocked at the start, pass by; what a function forks gets Python's own."""
    own = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # a program that is started gets the default

    def restore() -> None:
        for number, handler in own.items():
            signal.signal(number, handler)

    os.register_at_fork(after_in_child=restore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


class Program:
    """What the process knows between two requests: the functions, and the responses of this call."""

    def __init__(self, tell: Tell):
        self._tell = tell
        self._functions: list[RewardFunction] = []
        self._rows: Sequence[Row] = ()
        self._columns: tuple[str, ...] = ()
        self._seconds, self._concurrency = 0.0, 1
        # One for all calls: a function may keep connections, which belong to a loop.
        self._loop = asyncio.new_event_loop()

    def answer(self, request: str, *arguments: Any) -> None:
        """Do as a request says: load, take or ask."""
        does: dict[str, Callable[..., None]] = {"load": self._load, "take": self._take, "ask": self._ask}
        does[request](*arguments)

    def _load(self, targets: Sequence[str], seconds: float, concurrency: int) -> None:
        """Find the functions, and tell their forms."""
        self._seconds, self._concurrency = seconds, concurrency
        self._loop.set_default_executor(ThreadPoolExecutor(concurrency))  # of asyncio.to_thread; made when needed
        for target in targets:
            try:
                self._functions.append(load(target))
            except LoadError as error:
                self._tell(target=target, refused=str(error))
                return
        told = ("form", "is_async", "takes", "required")
        self._tell(loaded=[{name: getattr(function, name) for name in told} for function in self._functions])

    def _take(self, rows: Sequence[Row]) -> None:
        """Keep the responses for what is asked next."""
        self._rows = rows
        self._columns = tuple(dict.fromkeys(name for row in rows for name in row.columns))
        self._tell(taken=len(rows))

    def _ask(self, number: int, places: Sequence[int], together: bool) -> None:
        """Tell the scores of these responses: of all together, or of one after the other, in this order."""
        function = self._functions[number]
        if function.is_async:
            call = functools.partial(self._outcome, function)
            crowd = Crowd(call, self._tell, self._seconds, self._concurrency if together else 1)
            self._loop.run_until_complete(crowd.run(places))
        elif together and function.form == TRL:
            self._ask_once(function, places)
        else:
            for place in places:
                self._tell(index=place, **self._outcome_of_one(function, place))

    def _ask_once(self, function: RewardFunction, places: Sequence[int]) -> None:
        """One call for all of them. Where it raises, nobody knows at which."""
        try:
            returned = function.many([self._rows[place] for place in places], self._columns)
        except BaseException as error:
            self._tell(raised=function.why(error))
            return
        try:
            values = listed(returned, len(places))
        except BaseException as error:
            values = [error] * len(places)
        for place, value in zip(places, values, strict=True):
            self._tell(index=place, **_outcome_of_value(function, value))

    def _outcome_of_one(self, function: RewardFunction, place: int) -> dict[str, Any]:
        try:
            return _scored(*function.judged(function.one(self._rows[place], self._columns)))
        except BaseException as error:  # it may well call exit()
            return {"error": function.why(error)}

    async def _outcome(self, function: RewardFunction, place: int) -> dict[str, Any]:
        try:
            return _scored(*function.judged(await function.one(self._rows[place], self._columns)))
        except BaseException as error:  # asyncio would let SystemExit end the loop
            return {"error": function.why(error)}


class Crowd:
    """Async calls, some at a time, by workers that share the responses.

    A worker whose response takes too long is given up, and another takes its place. A task and a time limit for each
    response (asyncio.wait_for) would cost twice as much, and would wait for a function that cannot be cancelled.

    `call`: returns the outcome of a place, and raises nothing. `tell`: gets each outcome, once.
    """

    def __init__(
        self, call: Callable[[int], Awaitable[dict[str, Any]]], tell: Callable[..., None], seconds: float, at_once: int
    ):
        self._call, self._tell, self._seconds, self._at_once = call, tell, seconds, at_once
        self._todo: Iterator[int] = iter(())
        self._begun: dict[asyncio.Task, tuple[int, float]] = {}  # worker -> its response, and since when
        self._late = self._in_a_row = 0

    async def run(self, places: Sequence[int]) -> None:
        """Return when the outcome of each place is told."""
        self._todo = iter(places)
        workers = {asyncio.create_task(self._work()) for _ in range(min(self._at_once, len(places)))}
        while workers:
            done, workers = await asyncio.wait(workers, timeout=min(self._seconds / 10, LOOK))
            for task in done:
                task.result()  # raises what is our own fault
            now = time.monotonic()
            for task in [task for task, (_, since) in self._begun.items() if now - since > self._seconds]:
                self._give_up(task)
                workers.remove(task)
                workers.add(asyncio.create_task(self._work()))

    async def _work(self) -> None:
        me = asyncio.current_task()
        assert me is not None
        for place in self._todo:
            self._begun[me] = (place, time.monotonic())
            outcome = await self._call(place)
            if self._begun.pop(me, None) is None:
                return  # it was given up
            self._in_a_row = 0
            self._tell(index=place, **outcome)

    def _give_up(self, task: asyncio.Task) -> None:
        """Tell that its response takes too long; after too many of them the rest is not tried."""
        self._late, self._in_a_row = self._late + 1, self._in_a_row + 1
        self._tell(index=self._begun.pop(task)[0], error=too_slow(self._seconds), late=True)
        task.cancel()
        if self._in_a_row >= IN_A_ROW * self._at_once or self._late >= IN_ALL * self._at_once:
            for place in self._todo:
                self._tell(index=place, error=untried(too_slow(self._seconds), self._late), late=True, untried=True)


def _outcome_of_value(function: RewardFunction, value: Any) -> dict[str, Any]:
    """The outcome of one entry of what a call for all returned, or of what was raised in its place."""
    try:
        if isinstance(value, BaseException):
            raise value
        return _scored(score(value), {})
    except BaseException as error:
        return {"error": function.why(error)}


def _scored(value: float | None, extra: dict[str, float]) -> dict[str, Any]:
    return {"score": value, "extra": extra} if extra else {"score": value}


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
