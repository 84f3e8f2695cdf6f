"""Finds a rank that hangs, within a configured time, and ends the run with its name.

A thread of every rank writes a heartbeat into the store by which the ranks found each other, and reads its successor's:
a ring, so that the work does not grow with the number of ranks. Two things are taken for a hang: a successor whose
heartbeat does not change (its process is stopped, or its machine gone), and the own main thread waiting in one
collective (some rank does not take part). Whoever finds one writes a verdict with what all heartbeats said last. Every
rank that reads the verdict prints where its main thread is and that thread's stack, and leaves with status 1; torchrun
then ends those that cannot.

Silence is counted in the watcher's own looks, never by a clock alone: a machine that was suspended as a whole has seen
nothing. What a rank waits in is read off its main thread's Python frames, so no call is wrapped.

Left out: the stack of a thread in C++ (py-spy shows it), and a rank that holds Python's lock in C++ for too long, which
looks like a stopped one. One rank alone has no watchdog. On GPUs the host waits in torch.cuda.synchronize or where a
number is read, not in the collective itself; a rank that reads a number looks as if it worked, and NCCL's own time
limit ends it (not seen: there was no GPU).
"""

import json
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from gspo_megatron.config import FaultsConfig
from gspo_megatron.process import lifecycle, progress

# Files whose innermost frame means waiting for another rank, and wrappers within them that say nothing.
WAITING = (
    "torch/distributed/",
    "pipeline_parallel/p2p_communication.py",
    "distributed/param_and_grad_buffer.py",
    "gspo_megatron/ops/collectives.py",
    "torch/cuda/",
)
WRAPPERS = ("wrapper", "_communicate", "_p2p_ops", "wait")
LOOKS = 10  # in the shorter of the two timeouts
LONGEST_PAUSE = 5.0  # seconds between two looks
VERDICT = "watchdog/verdict"


@dataclass(frozen=True)
class Heartbeat:
    """This is what one rank last said of itself."""

    count: int  # grows with every heartbeat
    clock: str  # of its own machine
    name: str  # its coordinates in the layout
    process: str  # host and pid
    place: str
    waits_in: str | None  # a collective
    seconds: float  # that it has been in that place
    is_over: bool = False  # it has ended in order, and will say no more

    def __str__(self) -> str:
        doing = f"waiting in {self.waits_in}" if self.waits_in else "in no collective"
        return f"{self.place}, {doing} for {self.seconds:.0f} s"


class Watchdog:
    """A watchdog is two threads of one rank: one talks to the store, the other looks at the main thread and at the
    first."""

    def __init__(self, name: str, config: FaultsConfig):
        """Start them, unless the recipe wants none or the rank is alone. The process group must exist.

        Args:
            name: this rank's coordinates, for people.
        """
        self.name, self.config = name, config
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        shortest = min(config.heartbeat_timeout, config.collective_timeout)
        self.pause = min(shortest / LOOKS, LONGEST_PAUSE)
        self._stopped = threading.Event()
        main = threading.main_thread().ident
        assert main is not None  # it has started
        self._main = main
        self._waits_in: str | None = None
        self._seconds = 0.0  # in the same place
        self._answered = 0  # times that the store did
        self._threads: list[threading.Thread] = []
        if config.heartbeat_timeout and self.world_size > 1:
            # A client of its own: the main thread's may block in a wait.
            store = dist.distributed_c10d._get_default_store()
            self._store = store.clone()  # type: ignore[attr-defined]  # torch's own stubs leave it out
            for target in (self._talk, self._look):
                self._threads.append(threading.Thread(target=target, name=f"watchdog{target.__name__}", daemon=True))
                self._threads[-1].start()

    def stop(self) -> None:
        """Say that the rank ends in order, before the process group is left."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(LONGEST_PAUSE)

    # ---- The thread that talks to the store ----

    def _talk(self) -> None:
        """Ends quietly where the store is gone: then its host is, and the launcher ends this rank."""
        try:
            self._heartbeats()
        except (RuntimeError, OSError):
            self._stopped.set()

    def _heartbeats(self) -> None:
        successor = (self.rank + 1) % self.world_size
        count, heard, silence, last = 0, -1, 0.0, time.monotonic()
        while not self._stopped.wait(self.pause):
            count += 1
            self._say(count)
            if self._store.check([VERDICT]):
                self._end(self._store.get(VERDICT).decode(), is_first=False)
            beat, now = self._hear(successor), time.monotonic()
            number = -1 if beat is None else beat.count
            is_new = number != heard or (beat is not None and beat.is_over)
            silence = 0.0 if is_new else silence + min(now - last, 2 * self.pause)
            heard, last = number, now
            self._answered += 1
            if silence > self.config.heartbeat_timeout:
                self._accuse_silent(silence)
            elif self._waits_in and self._seconds > self.config.collective_timeout:
                self._accuse_absent()
        self._say(count + 1, is_over=True)

    def _say(self, count: int, is_over: bool = False) -> None:
        host = f"{socket.gethostname()}, pid {os.getpid()}"
        beat = Heartbeat(
            count,
            time.strftime("%H:%M:%S"),
            self.name,
            host,
            str(progress.here()),
            self._waits_in,
            self._seconds,
            is_over,
        )
        self._store.set(f"watchdog/{self.rank}", json.dumps(asdict(beat)))

    def _hear(self, rank: int) -> Heartbeat | None:
        key = f"watchdog/{rank}"
        return Heartbeat(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def _accuse_silent(self, silence: float) -> None:
        """Name every rank that says nothing now, not the successor alone: a whole machine may be gone."""
        before = [self._hear(rank) for rank in range(self.world_size)]
        time.sleep(3 * self.pause)
        after = [self._hear(rank) for rank in range(self.world_size)]
        lines = [
            f"rank {rank} ({beat.name}; {beat.process}) is silent. Its last heartbeat, at {beat.clock} of its clock: "
            f"{beat}"
            if beat
            else f"rank {rank} has never said anything"
            for rank, beat in enumerate(after)
            if rank != self.rank and beat == before[rank] and not (beat and beat.is_over)
        ]
        if lines:  # else it has come back in the meantime
            remedy = "Its process is stopped or swapping, or its machine is gone: look there before starting again."
            self._accuse([f"nothing was heard for {silence:.0f} s (faults.heartbeat_timeout)", *lines, remedy])

    def _accuse_absent(self) -> None:
        beats = {rank: beat for rank in range(self.world_size) if (beat := self._hear(rank)) and not beat.is_over}
        absent = [f"rank {r} ({b.name}; {b.process}) is in {b}" for r, b in beats.items() if not b.waits_in]
        if not absent:
            absent = [f"rank {rank} ({beat.name}): {beat}" for rank, beat in beats.items()]
            absent.insert(0, "all ranks wait, so they do not agree on what to do next, or the network is cut:")
        waited = f"rank {self.rank} has waited in {self._waits_in} for {self._seconds:.0f} s"
        self._accuse([f"{waited} (faults.collective_timeout)", *absent])

    def _accuse(self, lines: list[str]) -> None:
        mine = "watchdog: " + "\n  ".join(lines)
        verdict = self._store.compare_set(VERDICT, "", mine).decode()
        self._end(verdict, is_first=verdict == mine, patience=2 * self.pause)

    # ---- The thread that looks at the main thread ----

    def _look(self) -> None:
        before, answered, unanswered, last = None, 0, 0.0, time.monotonic()
        while not self._stopped.wait(self.pause):
            now = time.monotonic()
            elapsed, last = min(now - last, 2 * self.pause), now
            frame = sys._current_frames().get(self._main)
            same = (progress.moves(), position(frame))
            self._waits_in = waits_in(frame)
            self._seconds = self._seconds + elapsed if same == before else 0.0
            before = same
            unanswered = unanswered + elapsed if answered == self._answered else 0.0
            answered = self._answered
            del frame  # it would keep its tensors
            if unanswered > self.config.heartbeat_timeout:
                self._end(
                    f"watchdog: the store at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} has not "
                    f"answered for {unanswered:.0f} s (faults.heartbeat_timeout). The process that holds it, torchrun "
                    "on the first node or rank 0, is stopped, or the network to it is cut.",
                    is_first=True,
                )

    def _end(self, verdict: str, is_first: bool, patience: float = 0.0) -> None:
        """Print where this rank is, after the verdict if nobody else has printed it, and leave once all could do so."""
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)).rstrip()
        doing = f"waits in {self._waits_in}" if self._waits_in else "is in no collective"
        text = f"rank {self.rank} ({self.name}) {doing}, {progress.here()}:\n{stack}"
        lifecycle.say(f"{verdict}\n{text}" if is_first else text)
        time.sleep(patience + 2 * self.pause)
        lifecycle.leave(lifecycle.DEFECT)


def waits_in(frame: FrameType | None) -> str | None:
    """Return the name of the collective or transfer that a thread at this frame waits in; None: it works."""
    innermost = frame
    while frame is not None:
        code = frame.f_code
        file = Path(code.co_filename).as_posix()
        if not any(part in file for part in WAITING):
            return None if frame is innermost else code.co_qualname
        if code.co_name not in WRAPPERS:
            return code.co_name
        frame = frame.f_back
    return None


def position(frame: FrameType | None) -> tuple[tuple[int, int], ...]:
    """Return where in the code a thread is: the instruction of every frame."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)
