"""How one reward function is asked for all responses of a call, so that one that hangs costs one response.

An async function has faults.reward_timeout for each response, and so has one that is called for one response at a time.
One call of TRL's form for n responses may take reward_timeout * max(1, n / concurrency). A call that takes longer,
raises or ends the process is made anew for one response at a time, so that only those are lost that do it alone. After
3 in a row that hang or end the process, or 16 in all, the rest is not tried; of an async function 3 or 16 times as
many as are asked at a time.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from gspo_megatron.tasks.reward_functions import TRL
from gspo_megatron.tasks.reward_values import IN_A_ROW, IN_ALL, untried
from gspo_megatron.tasks.reward_worker import Lost, RewardProcess

TAKING = 300.0  # seconds for the user's imports, which may be large, and for the process to take the responses
GRACE = 2.0  # seconds that an answer may be on its way on a busy machine
PAUSE = 0.005  # seconds between two looks at answers: waking for each one would take the functions' core


@dataclass(frozen=True)
class Loaded:
    """A function as the process has found it."""

    number: int
    target: str
    name: str
    weight: float
    form: str
    is_async: bool
    takes: tuple[str, ...] | None  # its parameters; None: everything
    required: tuple[str, ...]  # columns

    @property
    def is_for_all(self) -> bool:
        """Tell whether it is asked for all responses together."""
        return self.is_async or self.form == TRL

    def note(self, concurrency: int) -> str:
        """Say how it is called."""
        how = "all responses in one call" if self.is_for_all else "one response at a time"
        how = f"async, {concurrency} at a time" if self.is_async else how
        return f"{self.name}: {self.form}{' form' if self.form.endswith('s') else ''}, {how}"


@dataclass(frozen=True)
class Request:
    """Responses that the process is asked for, by their places in the call."""

    places: list[int]
    together: bool = False
    until: float = math.inf  # time.monotonic() after which the rest fails with `reason`
    reason: str = ""


@dataclass
class Asking:
    """One function is asked for responses.

    `ready`: returns the process with functions and responses in it, a new one where it has ended.
    `take`: gets the place of each response and {"score", "extra"} or {"error"}, once.
    """

    function: Loaded
    seconds: float
    concurrency: int
    ready: Callable[[], RewardProcess]
    take: Callable[[int, dict[str, Any]], None]

    def run(self, places: list[int]) -> None:
        """Return when each has been taken."""
        self._left = dict.fromkeys(places)
        self._in_a_row = self._in_all = self._rounds = 0
        todo = deque([Request(places, self.function.is_for_all)])
        while todo:
            request = todo.popleft()
            left = [place for place in request.places if place in self._left]
            if left:
                request = replace(request, places=left, together=request.together and len(left) > 1)
                todo.extendleft(reversed(self._asked(request)))

    def _asked(self, request: Request) -> list[Request]:
        """Ask, and return what is to be asked instead where answers are missing."""
        try:
            raised = self._answered(request)
        except Lost as lost:
            left = [place for place in request.places if place in self._left]
            return self._after_all(left, lost) if request.together else self._after_one(request, left, lost)
        self._in_a_row = 0
        if raised is None:
            return []
        reason = f"{raised} in a call for {len(request.places)} responses"
        until = time.monotonic() + self._allowed(request) + IN_ALL * self.seconds
        return [Request(request.places, until=until, reason=reason)]

    def _answered(self, request: Request) -> str | None:
        """Take answers until all are there; returns what a call for all has raised."""
        process = self.ready()
        process.send(("ask", self.function.number, request.places, request.together), TAKING)
        allowed, missing = self._allowed(request), set(request.places)
        is_clogged = False
        while missing:
            deadline = min(time.monotonic() + allowed + GRACE, request.until)
            for answer in process.answers(deadline, allowed):
                if "raised" in answer:
                    return answer["raised"]
                is_clogged |= answer.pop("untried", False)
                if (place := answer.pop("index", None)) in missing:
                    missing.remove(place)
                    self._taken(place, answer)
            time.sleep(PAUSE if missing else 0.0)
        if is_clogged:
            process.close()  # threads of those that hang would be in the way of the next call
        return None

    def _allowed(self, request: Request) -> float:
        """Seconds until the next answer."""
        is_one_call = request.together and not self.function.is_async
        return self.seconds * max(1.0, len(request.places) / self.concurrency) if is_one_call else self.seconds

    def _after_all(self, left: list[int], lost: Lost) -> list[Request]:
        """After a call for all: those at which it was are asked alone. An async one had begun the first of them."""
        self._rounds += 1
        if self._rounds == IN_A_ROW:
            return self._fail(self._left, str(lost))
        count = self.concurrency if self.function.is_async else len(left)
        return [Request(left[:count]), Request(left[count:], together=True)]

    def _after_one(self, request: Request, left: list[int], lost: Lost) -> list[Request]:
        """One at a time: it was at the first one."""
        if time.monotonic() >= request.until:
            return self._fail(left, request.reason)
        self._in_a_row = self._in_a_row + 1 if left == request.places else 1
        self._in_all += 1
        self._fail(left[:1], str(lost))
        if self._in_a_row == IN_A_ROW or self._in_all == IN_ALL:
            return self._fail(self._left, untried(str(lost), self._in_all))
        return [replace(request, places=left[1:])]

    def _fail(self, places: Iterable[int], reason: str) -> list[Request]:
        """Take these for failed; there is nothing to ask instead."""
        for place in list(places):
            self._taken(place, {"error": reason})
        return []

    def _taken(self, place: int, answer: dict[str, Any]) -> None:
        del self._left[place]
        self.take(place, answer)
