"""A chat template is a program that came with a model: it gets seconds and memory of its own.

Jinja's sandbox keeps a template from files and attributes, but not from endless loops or from texts of terabytes.

Left out: several threads that render at once (the limit on memory is the process's).
"""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 3.0  # real templates take milliseconds
SPARE = 1 << 30  # bytes beside what the process has already
PAGES = Path("/proc/self/statm")  # its first number: pages of address space


@contextmanager
def limited(seconds: float = SECONDS, spare: int = SPARE) -> Iterator[None]:
    """Inside, the process's main thread may take so long and so much more memory.

    Raises:
        TimeoutError, MemoryError: it takes more.
    """
    kept = resource.getrlimit(resource.RLIMIT_AS)
    ceiling = int(PAGES.read_text().split()[0]) * resource.getpagesize() + spare if PAGES.exists() else kept[0]
    is_main = threading.current_thread() is threading.main_thread()  # which alone hears signals
    before, left, began = None, 0.0, time.monotonic()
    if is_main:
        before = signal.signal(signal.SIGALRM, _raise)
        left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        if kept[1] == resource.RLIM_INFINITY or ceiling < kept[1]:
            resource.setrlimit(resource.RLIMIT_AS, (ceiling, kept[1]))
        yield
    except _TooLong:
        raise TimeoutError("it took longer than a chat template may") from None
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
            if left:  # somebody else's timer goes on
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001))
        resource.setrlimit(resource.RLIMIT_AS, kept)


class _TooLong(BaseException):
    """No Exception, because Jinja goes on after those that its optimizer meets."""


def _raise(number: int, frame: FrameType | None) -> None:
    raise _TooLong
