"""Text of a model is evaluated here: each one in a process of its own, behind walls, which hands out data alone.

Three processes take part. The one that scores knows the question's entry and computes the verdict; it evaluates
nothing. It asks for a process by `Evaluator`, which had forked a server before the first entry came. The server forks a
process for each text, gives the other end of that one's own socket to the scorer, and ends it when told to; it sees
neither texts nor answers. The forked process confines itself (walls.confine), evaluates one text, and answers with its
value as JSON (values.py), or with what was raised.

So evaluated text can make up its own value, which it could do anyhow. It finds no gold answer in its memory, and
cannot reach the verdict, another response's process or socket, or anything else on the machine.
"""

import builtins
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import sympy

from gspo_megatron.tasks import walls
from gspo_megatron.tasks.values import from_data, to_data

LENGTH = struct.Struct("<I")
STATUS = struct.Struct("<i")
LARGEST = 8 << 20  # bytes of one answer
PART = 1 << 16
# What sympy imports inside its functions. Behind the walls no file can be read, so that is done before.
LATE = """
    sympy.assumptions.facts sympy.assumptions.handlers.calculus sympy.assumptions.handlers.matrices
    sympy.assumptions.handlers.ntheory sympy.assumptions.handlers.order sympy.assumptions.handlers.sets
    sympy.assumptions.lra_satask sympy.assumptions.satask sympy.assumptions.wrapper sympy.combinatorics.fp_groups
    sympy.combinatorics.galois sympy.combinatorics.homomorphisms sympy.concrete.delta sympy.discrete.recurrences
    sympy.integrals.heurisch sympy.integrals.manualintegrate sympy.integrals.prde sympy.integrals.risch
    sympy.logic.algorithms.dpll2 sympy.logic.algorithms.minisat22_wrapper sympy.logic.algorithms.pycosat_wrapper
    sympy.physics.units sympy.physics.units.util sympy.polys.dispersion sympy.polys.distributedmodules
    sympy.polys.domains.old_polynomialring sympy.polys.domains.quotientring sympy.polys.matrices._dfm
    sympy.polys.numberfields.resolvent_lookup sympy.sets.handlers.add sympy.sets.handlers.functions
    sympy.sets.handlers.issubset sympy.sets.handlers.mul sympy.sets.handlers.power sympy.sets.setexpr
    sympy.tensor.array.array_derivatives sympy.tensor.tensor sympy.vector
""".split()
ASK, DONE = b"a", b"d"


class EvaluationError(Exception):
    """What evaluated text raised, or a value that is no data; a scorer takes it for text that it cannot read."""


class Evaluator:
    """Evaluates texts. `failure` says why one gave no answer at all since `begin`, None where all answered."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair()
        parent = os.getpid()
        if os.fork() == 0:
            _run(_serve, theirs, parent)
        theirs.close()
        self.failure: str | None = None
        self.is_reading = False  # evaluates trusted text itself
        self._seconds = self._deadline = 0.0
        self._trusted: tuple[str, ...] = ()

    def begin(self, entry: dict, seconds: float) -> None:
        """Begin one response: its texts have so many seconds together. Strings of `entry` are trusted."""
        held = [*entry.values(), *dict(entry.get("metadata") or {}).values()]
        self._trusted = tuple(value for value in held if isinstance(value, str))
        self._seconds, self._deadline, self.failure = seconds, time.monotonic() + seconds, None

    def is_trusted(self, text: object) -> bool:
        """Tell whether the task's generator wrote this text, and not a model."""
        return text in self._trusted

    def eval(self, text: Any, *_: Any) -> Any:
        """Return what Python's eval() would, of builtins alone; the caller's variables are not seen."""
        if self.is_trusted(text):
            with self._reading():
                return builtins.eval(text, {})
        return self._ask(text, None)

    def parse_expr(self, text: Any, local_dict: dict | None = None) -> Any:
        """Return what sympy's parse_expr would; `local_dict` may hold symbols alone.

        Raises:
            EvaluationError: the text raised, has no value, or ended its process.
        """
        if self.is_trusted(text):
            with self._reading():
                return sympy.parse_expr(text, local_dict=dict(local_dict or {}))
        return self._ask(text, {name: symbol.name for name, symbol in (local_dict or {}).items()})

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self.is_reading = True
        try:
            yield
        finally:
            self.is_reading = False

    def _ask(self, text: str, symbols: dict[str, str] | None) -> Any:
        try:
            answer, status = self._exchange({"text": text, "symbols": symbols, "seconds": self._seconds})
        except (OSError, struct.error):
            os._exit(1)  # the server is gone, which is no fault of the text; the rank starts all of it anew
        return self._value(answer) if answer is not None else self._fail(self._why_not(status))

    def _exchange(self, request: dict) -> tuple[bytes | None, int]:
        """The answer to a request, None where there is none, and the exit status of the process that was to give it."""
        self._control.sendall(ASK)
        _, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        if not fds:
            raise ConnectionResetError
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            _write(fds[0], json.dumps(request).encode())
        answer = _read(fds[0], self._deadline)
        os.close(fds[0])
        self._control.sendall(DONE)
        return answer, STATUS.unpack(self._control.recv(STATUS.size, socket.MSG_WAITALL))[0]

    def _value(self, answer: bytes) -> Any:
        try:
            found = json.loads(answer)
            if "value" in found:
                return from_data(found["value"])
            reason, has_ended = str(found["raised"])[:500], bool(found["ends"])
        except Exception as error:  # nobody vouches for the answer
            raise EvaluationError(f"{type(error).__name__}: {error}"[:500]) from None
        if has_ended:
            self._fail(reason)
        raise EvaluationError(reason)

    def _fail(self, reason: str) -> None:
        self.failure = reason
        raise EvaluationError(reason)

    def _why_not(self, status: int) -> str:
        if time.monotonic() >= self._deadline:
            return f"TimeoutError: no reward after {self._seconds:g} s (faults.reward_timeout)"
        return f"the scorer ended its process (status {status}; it evaluated the response)"


def _run(body: Callable[[socket.socket], None], channel: socket.socket, parent: int) -> None:
    """Run a forked process, which ends with its parent and keeps none of its parent's files. Never returns."""
    try:
        walls.die_with_parent(parent)
        fd = os.dup2(channel.fileno(), 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        body(socket.socket(fileno=fd))
    finally:
        os._exit(0)


def _serve(control: socket.socket) -> None:
    """The server: a process for each ASK, until the scorer is gone."""
    for name in LATE:
        with contextlib.suppress(ImportError):  # of another version of sympy
            importlib.import_module(name)
    gc.freeze()  # a collection would copy every page that it shares with its children
    server = os.getpid()
    while control.recv(1) == ASK:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if pid == 0:
            _run(_evaluate_one, ours, server)
        socket.send_fds(control, [b"."], [theirs.fileno()])
        ours.close()
        theirs.close()
        control.recv(1)  # DONE, or the scorer's end
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        control.sendall(STATUS.pack(os.waitstatus_to_exitcode(status)))


def _evaluate_one(channel: socket.socket) -> None:
    """The process of one text."""
    request = json.loads(_read(channel.fileno()) or b"")
    try:
        walls.confine(request["seconds"])
        line = json.dumps({"value": to_data(_evaluated(request["text"], request["symbols"]))})
        if len(line) > LARGEST:
            raise ValueError(f"a value of {len(line)} bytes cannot be handed out of the evaluation")
    except BaseException as error:  # the text may well call exit()
        line = json.dumps({"raised": f"{type(error).__name__}: {error}"[:500], "ends": _is_told(error)})
    _write(channel.fileno(), line.encode())


def _is_told(error: BaseException) -> bool:
    """Whether what was raised is more than text that a scorer cannot read: an exit, no walls, a module not in LATE."""
    is_late = isinstance(error, ImportError) and (error.name or "").split(".")[0] in ("sympy", "mpmath")
    return is_late or not isinstance(error, Exception) or isinstance(error, walls.WallError)


def _evaluated(text: str, symbols: dict[str, str] | None) -> Any:
    if symbols is None:
        return builtins.eval(text, {})
    return sympy.parse_expr(text, local_dict={name: sympy.Symbol(symbol) for name, symbol in symbols.items()})


def _write(fd: int, message: bytes) -> None:
    rest = memoryview(LENGTH.pack(len(message)) + message)
    while rest:
        rest = rest[os.write(fd, rest) :]


def _read(fd: int, deadline: float | None = None) -> bytes | None:
    """The next message; None where it does not come in time, or whole, or is larger than LARGEST."""
    found = b""
    while len(found) < LENGTH.size or len(found) < LENGTH.size + LENGTH.unpack_from(found)[0]:
        if len(found) > LARGEST or (deadline is not None and not _is_ready(fd, deadline)):
            return None
        try:
            part = os.read(fd, PART)
        except ConnectionResetError:
            return None
        if not part:
            return None
        found += part
    return found[LENGTH.size : LENGTH.size + LENGTH.unpack_from(found)[0]]


def _is_ready(fd: int, deadline: float) -> bool:
    return bool(select.select([fd], [], [], max(deadline - time.monotonic(), 0.0))[0])
