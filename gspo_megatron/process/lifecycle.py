"""A rank ends promptly, with one message, whatever it is blocked in.

A rank spends most of its life inside C++ (a Gloo or NCCL wait), where Python runs no signal handler, and the
destructors of a process group whose peers are gone can hang. So signals are answered by a thread of their own, and
a failed rank leaves with os._exit. torchrun ends all ranks when the first one exits; a rank whose message is probably
an echo of another's waits for that before it speaks.

SIGUSR1, which a scheduler sends before its time limit, ends nothing by itself: the run asks `is_told_to_stop` after
each step, writes a checkpoint and raises StopRequested. SIGTERM does the same to a run that asks, but leaves it only
TERM_SECONDS; and it ends a rank at once where another rank of this launcher is dead, because then torchrun sends it and
the step can never be finished.

Left out: restarts (torchrun's or Slurm's), and the time limit of collectives, which the process group has itself. A
thread's own uncaught exception ends only that thread.
"""

import contextlib
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from gspo_megatron.errors import GspoError, LostRankError, StopRequested
from gspo_megatron.process.console_streams import fill_closed, forgiving

ECHO_SECONDS = 2.0  # torchrun looks every 0.1 s, but ranks of a busy machine fail up to a second apart
BAD_INPUT = 2
DEFECT = 1
TERM_SECONDS = 25.0  # torchrun, and Slurm's KillWait, send SIGKILL 30 s after SIGTERM
REQUEUE = 85  # what Slurm's RequeueExit is commonly set to
STATUS_FILE = "GSPO_MEGATRON_STATUS_FILE"  # an environment variable: where a batch script looks for REQUEUE
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# What Gloo and NCCL say when the other side of a connection has died.
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")


_told_to_stop = threading.Event()
_is_asking = threading.Event()  # something looks at the other one now and then
_before_leaving: Callable[[], None] | None = None
_owns_process = False


def is_told_to_stop() -> bool:
    """Tell whether this rank got SIGUSR1 or SIGTERM, and should write a checkpoint and end."""
    _is_asking.set()
    return _told_to_stop.is_set()


def rank() -> int:
    """Return this process's rank as its launcher says, 0 without one."""
    return int(os.environ.get("RANK", "0"))


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Run the body of one rank; everything that ends it early ends the process here.

    A GspoError prints its message and exits with status 2 (1 where another rank was lost, that of _tell_scheduler
    where the run was told to stop), every other exception prints its trace and exits with status 1, SIGINT and SIGTERM
    print one line on rank 0 and exit with 130 and 143, also while the main thread is blocked in C++. What is printed
    for nobody is dropped (console_streams.py). Must be entered on the main thread.
    """
    global _owns_process
    fill_closed()
    restore = _answer_signals()
    _owns_process = True
    try:
        with forgiving():
            yield
    except StopRequested as error:
        leave(_tell_scheduler(), str(error) if rank() == 0 else None)
    except LostRankError as error:
        _wait_for_first(True)
        leave(DEFECT, f"rank {rank()}: {error}")
    except GspoError as error:
        _wait_for_first(rank() != 0)
        where = f"rank {rank()}: " if rank() else ""
        leave(BAD_INPUT, f"{where}error: {error}")
    except SystemExit as error:  # the command line's own --help and complaints, already printed
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        _wait_for_first(status != 0 and rank() != 0)
        leave(status, error.code if isinstance(error.code, str) else None)
    except BaseException as error:
        # Gloo's and NCCL's errors are RuntimeErrors; a BrokenPipeError is of some pipe or file of this process.
        is_transport = isinstance(error, (RuntimeError, OSError)) and not isinstance(error, BrokenPipeError)
        has_peers = int(os.environ.get("WORLD_SIZE", "1")) > 1
        lost = has_peers and is_transport and any(text in str(error).lower() for text in LOST_PEER)
        _wait_for_first(lost or rank() != 0)
        if lost:
            reason = str(error).strip().splitlines()[0]
            leave(DEFECT, f"rank {rank()}: lost the connection to another rank, which ended first ({reason})")
        leave(DEFECT, f"rank {rank()} failed:\n{traceback.format_exc().rstrip()}")
    finally:
        _owns_process = False
        restore()


def owns_process() -> bool:
    """Tell whether this process is a command's own, which may end it or become another program: it is in `guard`."""
    return _owns_process


def _tell_scheduler() -> int:
    """The exit status of a run that stopped with a checkpoint to go on from.

    torchrun makes every status 1, and starts the ranks again where it may. So REQUEUE goes into a file, where the batch
    script has named one, and torchrun sees a success.
    """
    path = os.environ.get(STATUS_FILE)
    if not path:
        return REQUEUE
    if rank() == 0:
        Path(path).write_text(str(REQUEUE))
    return 0


def _wait_for_first(is_echo: bool) -> None:
    """Let the rank that failed first speak: when it exits, the launcher's SIGTERM ends this one without a word."""
    if is_echo:
        time.sleep(ECHO_SECONDS)


def before_leaving(call: Callable[[], None] | None) -> None:
    """Let this be called when the process ends early, by an error or a signal; it takes the place of the one before.

    It may run in any thread, raises nothing and is quick.
    """
    global _before_leaving
    _before_leaving = call


def tidy() -> None:
    """Do what before_leaving() was given, once."""
    call = _before_leaving
    before_leaving(None)
    if call is not None:
        call()


def leave(status: int, message: str | None = None) -> None:
    """End this process now, from any thread, whatever its main thread is blocked in."""
    tidy()
    # A reader of our output that has gone away must not keep us from ending, nor a lock that a blocked thread holds.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(1.0)
    if message:
        say(message)
    os._exit(status)


def say(message: str) -> None:
    """Print a line on stderr that no buffer holds back and no other rank's line cuts in two."""
    with contextlib.suppress(OSError):
        os.write(2, f"{message}\n".encode(errors="backslashreplace"))  # a file's name need not be UTF-8


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()


def _answer_signals() -> Callable[[], None]:
    """Start the thread that ends the process on a signal; returns what puts the old handlers back."""
    over = threading.Event()
    receive, send = socket.socketpair()
    send.setblocking(False)
    # The C part of Python's handler writes the signal's number into `send` at once, whatever Python is doing. It does
    # so only for signals that have a Python handler, so they get one that does nothing.
    old = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    old_fd = signal.set_wakeup_fd(send.fileno(), warn_on_full_buffer=False)

    def leave_to_parent() -> None:
        # A forked child (a checkpoint writer) shares the socket: ending it must not end the rank.
        if not over.is_set():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)

    os.register_at_fork(after_in_child=leave_to_parent)
    # torchrun that is killed outright cannot end its ranks; then their parent changes.
    launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
    threading.Thread(target=_watch, args=(receive, launcher), name="signals", daemon=True).start()

    def restore() -> None:
        over.set()
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            signal.signal(number, handler)
        send.close()  # ends the thread

    return restore


def _watch(receive: socket.socket, launcher: int | None) -> None:
    deadline = math.inf
    while True:
        ready, _, _ = select.select([receive], [], [], 1.0)
        if ready:
            numbers = receive.recv(1)
            if not numbers:
                return
            number = signal.Signals(numbers[0])
            if number == signal.SIGUSR1:
                _told_to_stop.set()
            elif number == signal.SIGTERM and _is_asking.is_set() and _all_ranks_live(launcher):
                # A scheduler tells every process of a job, and torchrun its ranks again: the first one counts.
                if deadline == math.inf and rank() == 0:
                    say(f"rank 0: SIGTERM: this step is finished and a checkpoint written, if {TERM_SECONDS:g} s do")
                deadline = min(deadline, time.monotonic() + TERM_SECONDS)
                _told_to_stop.set()
            elif number in SIGNALS:
                leave(128 + number, f"rank 0: ended by {number.name}" if rank() == 0 else None)
        elif launcher is not None and os.getppid() != launcher:
            leave(DEFECT, "rank 0: ended because torchrun is gone" if rank() == 0 else None)
        if time.monotonic() > deadline:
            text = f"rank 0: ended by SIGTERM: the step was not over after {TERM_SECONDS:g} s"
            leave(128 + signal.SIGTERM, text if rank() == 0 else None)


def _all_ranks_live(launcher: int | None) -> bool:
    """torchrun still has all of this machine's ranks; where nobody can tell, so it is."""
    expected = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if launcher is None:
        return True
    try:
        children = [pid for f in Path(f"/proc/{launcher}/task").glob("*/children") for pid in f.read_text().split()]
        states = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in children]
    except OSError:  # gone in this moment
        return False
    return sum(state != "Z" for state in states) >= expected
