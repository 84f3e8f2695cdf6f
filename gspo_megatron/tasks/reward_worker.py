"""A rank's side of the process in which users' reward functions run; what happens in there is in reward_process.py.

Every wait has an end: a process that hangs, that reads nothing or that is gone is told as `Lost`, and ended with all
that it has started in its group.
"""

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from typing import Any

from gspo_megatron.process.lifecycle import SIGNALS
from gspo_megatron.tasks.isolation import ONE_THREAD, PASSED_ON
from gspo_megatron.tasks.reward_process import LENGTH
from gspo_megatron.tasks.reward_values import too_slow

PROGRAM = "gspo_megatron.tasks.reward_process"
PART = 1 << 20
LOOK = 0.5  # seconds between two looks at whether the process is there: what it forked may hold its pipes open
ENDING = 5.0  # seconds for a killed process to go; one in a dead file system does not


class Lost(Exception):
    """The process is gone, or said nothing in time; then it is ended. The text goes on after the function's name."""

    def __init__(self, reason: str, is_late: bool):
        super().__init__(reason)
        self.is_late = is_late


class RewardProcess:
    """A process for the functions of one task.

    `program`: the module that runs in it. `memory`: bytes of address space, where it is behind walls and has nothing of
    the rank's environment; 0: it has all that the rank has. The kernel ends it with the thread that started it.
    """

    def __init__(self, memory: int, program: str = PROGRAM):
        self.memory, self.program = memory, program
        self.number = 0  # of processes that were started
        self._child: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def start(self) -> None:
        """Returns at once; the process comes up in the background. One from before is ended."""
        self.close()
        # With -P the working directory is searched only for a reward function that is named as a module.
        command = [sys.executable, "-P", "-m", self.program, str(os.getpid()), str(self.memory)]
        # A scheduler signals every process of a step. The rank answers, by a checkpoint; until that is written the
        # functions are needed. A child inherits what is blocked.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self._environment(), process_group=0
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        assert self._child.stdin is not None  # a pipe
        os.set_blocking(self._child.stdin.fileno(), False)
        self._buffer = b""
        self.number += 1

    def _environment(self) -> dict[str, str]:
        passed = dict(os.environ)
        if self.memory:
            passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | ONE_THREAD
        return passed | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    @property
    def is_running(self) -> bool:
        """Tell whether it was started and is there."""
        return self._child is not None and self._ended() is None

    def send(self, request: tuple, seconds: float) -> None:
        """Send a request.

        Raises:
            Lost: the process is gone, or has not read it after so many seconds.
        """
        child, deadline = self._child, time.monotonic() + seconds
        assert child is not None and child.stdin is not None  # start() was called
        body = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        for part in (LENGTH.pack(len(body)), body):
            rest = memoryview(part)
            while rest:
                self._wait(child.stdin.fileno(), select.POLLOUT, deadline, seconds)
                try:
                    rest = rest[os.write(child.stdin.fileno(), rest[:PART]) :]
                except BlockingIOError:  # less than a page is free
                    time.sleep(0.001)
                except BrokenPipeError:
                    raise self._lost(None) from None

    def answers(self, deadline: float, seconds: float) -> list[dict[str, Any]]:
        """Wait for answers, and return all that have come.

        Args:
            deadline: of time.monotonic().
            seconds: that are told as the limit.

        Raises:
            Lost: the process is gone, or has said nothing until the deadline.
        """
        child = self._child
        assert child is not None and child.stdout is not None  # start() was called
        while b"\n" not in self._buffer:
            self._wait(child.stdout.fileno(), select.POLLIN, deadline, seconds)
            part = os.read(child.stdout.fileno(), PART)
            if not part:
                raise self._lost(None)
            self._buffer += part
        whole, _, self._buffer = self._buffer.rpartition(b"\n")
        lines, found = whole.split(b"\n"), []
        for number, line in enumerate(lines):
            try:
                found.append(dict(json.loads(line)))
            except (ValueError, TypeError):  # of some other writer in the process
                if not found:
                    self.close()
                    raise Lost("wrote into its process's answers", False) from None
                self._buffer = b"\n".join([*lines[number:], self._buffer])  # what came before counts
                break
        return found

    def _wait(self, fd: int, event: int, deadline: float, seconds: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        while not poll.poll(1000 * max(min(deadline - time.monotonic(), LOOK), 0.0)):
            if self._ended() is not None:
                raise self._lost(None)
            if time.monotonic() >= deadline:
                raise self._lost(seconds)

    def _ended(self) -> str | None:
        """How the process ended, None while it runs. It stays a zombie, so that its group's number is no other's."""
        assert self._child is not None
        found = os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        if found.si_code == os.CLD_EXITED:
            return f"status {found.si_status}"
        return signal.Signals(found.si_status).name

    def _lost(self, seconds: float | None) -> Lost:
        """End the process and say in words why there is no answer; `seconds` where there was none in time."""
        deadline = time.monotonic() + LOOK
        while seconds is None and self._ended() is None and time.monotonic() < deadline:  # its pipes close before it
            time.sleep(0.01)
        ended = self._ended()
        self.close()
        if ended is None and seconds is not None:
            return Lost(too_slow(seconds), True)
        return Lost(f"ended its process ({ended or 'it closed its files'})", False)

    def close(self) -> None:
        """End the process and what it started in its group, if there is one."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(ENDING)
