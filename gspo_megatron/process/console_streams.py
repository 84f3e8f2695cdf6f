"""Standard output and error of a process that outlives whoever reads them.

A reader may leave (`| head -1`), a terminal may close, a log file's disk may fill up: none of that is a reason to end a
training. Here such writes are dropped. A descriptor that was closed before the start (`>&-`) is given to /dev/null, for
the next file that is opened would get its number, and what is printed would be written into that.

Left out: output of C++, which asks for no success; and log files that are meant to last (metrics.jsonl).
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO


class _Forgiving(io.FileIO):
    """A descriptor to which a write always succeeds."""

    def write(self, data, /) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None also where a terminal takes nothing at the moment


@contextlib.contextmanager
def forgiving() -> Iterator[None]:
    """Make sys.stdout and sys.stderr forgiving, where they are the process's own (and not a test's or notebook's).

    They are put back at a normal end. Call `fill_closed` before.
    """
    old = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _wrapped(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _wrapped(sys.stderr, 2)
    yield
    # After an error they stay: the process ends, and must not wait here for a reader that stands still.
    for stream in {sys.stdout, sys.stderr} - set(old):
        stream.flush()
    sys.stdout, sys.stderr = old


def fill_closed() -> None:
    """Open /dev/null for each of stdin, stdout and stderr that is closed, before another file gets its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is fd
            os.set_inheritable(null, True)


def _wrapped(stream: TextIO | None, fd: int) -> TextIO:
    raw = _Forgiving(fd, "wb", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):  # None: it was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "replace")
    with contextlib.suppress(OSError):
        stream.flush()
    binary = raw if stream.write_through else io.BufferedWriter(raw)  # the first with PYTHONUNBUFFERED
    return io.TextIOWrapper(
        binary, stream.encoding, stream.errors, line_buffering=stream.line_buffering, write_through=stream.write_through
    )
