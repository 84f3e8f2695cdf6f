"""A rank's side of the process that runs its scorers; what happens in there is in scoring_process.py."""

import contextlib
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import time

from gspo_megatron.config import FaultsConfig
from gspo_megatron.process.lifecycle import SIGNALS
from gspo_megatron.tasks.scoring_process import LENGTH

PROGRAM = "gspo_megatron.tasks.scoring_process"
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # it forks, and no scorer needs more
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "PYTHONHASHSEED", "LD_LIBRARY_PATH", "TMPDIR")  # no keys, no tokens
STARTING = 60.0  # seconds that the process may take to come up, beside those of the first request


class ScorerError(Exception):
    """A scorer raised, took too long, or ended its process; the text says which."""


class ScoringProcess:
    """The process is started at the first score (or `start`), and anew after a scorer has spoilt it."""

    def __init__(self, config: FaultsConfig):
        self.seconds, self.memory = config.reward_timeout, int(config.reward_memory_gb * 2**30)
        self._child: subprocess.Popen[bytes] | None = None
        self._fresh = True
        self._buffer = b""

    def start(self) -> None:
        """Returns at once; the process comes up in the background."""
        self._running()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None:
            paths = os.pathsep.join(path for path in sys.path if path)
            env = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | ONE_THREAD
            env["PYTHONPATH"] = paths
            command = [sys.executable, "-m", PROGRAM, str(self.memory), str(self.seconds)]
            # A scheduler signals every process of a step. The rank answers, by a checkpoint; until that is written the
            # scorers are needed, and afterwards the end of stdin ends them. A child inherits what is blocked.
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, cwd="/"
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            self._fresh, self._buffer = True, b""
        return self._child

    def score(self, spec: dict, text: str, entry: dict) -> float:
        """Return what the task's scorer gives for a response; it may be any number, a NaN too.

        Args:
            spec: keyword arguments of reasoning_gym's create_dataset.
            entry: the task generator's own record.

        Raises:
            ScorerError: it raised, or took longer than faults.reward_timeout.
        """
        child = self._running()
        assert child.stdin is not None  # a pipe
        request = pickle.dumps((spec, text, entry))
        deadline = time.monotonic() + self.seconds + (STARTING if self._fresh else 1.0)
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            child.stdin.write(LENGTH.pack(len(request)) + request)
            child.stdin.flush()
        answer = self._line(child, deadline)
        if answer is None:
            raise ScorerError(self._why_not(child))
        self._fresh = False
        found = json.loads(answer)
        if "error" in found:
            raise ScorerError(found["error"])
        return float(found["score"])

    def close(self) -> None:
        """End the process, if there is one."""
        if self._child is not None:
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):
                    pipe.close()
            self._child.wait()
            self._child = None

    def _line(self, child: subprocess.Popen[bytes], deadline: float) -> bytes | None:
        """The next line of the process, None where it ends or says nothing in time."""
        pipe = child.stdout
        assert pipe is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0.0))
            part = os.read(pipe.fileno(), 65536) if ready else b""
            if not part:
                return None
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _why_not(self, child: subprocess.Popen[bytes]) -> str:
        """Say in words why there is no answer; the process is ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.2)
        status, was_fresh = child.returncode, self._fresh
        self.close()
        if status is None or status == -14:  # SIGALRM, by which it ends itself
            return f"TimeoutError: no reward after {self.seconds:g} s (faults.reward_timeout)"
        if was_fresh and status > 0:
            return f"the process of the scorers ended with status {status} (python -m {PROGRAM})"
        return f"the scorer ended its process (status {status}; faults.reward_memory_gb = {self.memory / 2**30:g})"
