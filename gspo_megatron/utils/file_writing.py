"""Large files are written while the caller goes on: a thread copies to the system, and the end waits for the disk.

Left out: several threads that copy (one fills what a disk takes, and other work needs the cores), and asking the disk
early: fdatasync in the middle was seen to cost up to half as much again, and Linux begins by itself where much waits.
"""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from gspo_megatron.errors import ConversionError
from gspo_megatron.utils.tensor_bytes import memory

Result = TypeVar("Result")

AHEAD = 16  # writes that may wait; their tensors are held meanwhile


class Ahead:
    """Makes calls one after another in a thread of its own. What one raises is raised by a later submit, or by
    finish."""

    def __init__(self, name: str, depth: int):
        self._thread = ThreadPoolExecutor(1, name)
        self._waiting: deque[Future] = deque()
        self._depth = depth

    def submit(self, call: Callable, *args: object) -> None:
        """Hand over a call; waits while `depth` calls are waiting."""
        while self._waiting and (len(self._waiting) >= self._depth or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._thread.submit(call, *args))

    def finish(self) -> None:
        """Wait for all calls and end the thread."""
        while self._waiting:
            self._waiting.popleft().result()
        self._thread.shutdown()

    def abandon(self) -> None:
        """End the thread after the call that runs now; nothing is raised."""
        self._thread.shutdown(cancel_futures=True)
        self._waiting.clear()


class FileWriter:
    """Writes bytes to their places in files of one folder.

    Every method raises OSError with the file's name, for example because the disk is full; also of an earlier write.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._open: dict[str, int] = {}
        self._copies = Ahead("copies", AHEAD)

    def create(self, file: str, size: int = 0) -> None:
        """Make an empty file, or one of zeros, so that a disk that is too small is found out here."""
        self._open[file] = os.open(self._folder / file, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        if size:
            self._call(file, os.posix_fallocate, self._open[file], 0, size)

    def join(self, file: str) -> None:
        """Open a file that another process has created, to write other places of it."""
        self._open[file] = os.open(self._folder / file, os.O_RDWR)

    def write(self, file: str, parts: Sequence[bytes | torch.Tensor], offset: int) -> int:
        """Write parts one behind the other from `offset` on. Returns where they end.

        Args:
            parts: contiguous CPU tensors, which nobody changes any more, stand for their memory.
        """
        self._copies.submit(self._write, file, parts, offset)
        return offset + sum(part.nbytes if isinstance(part, torch.Tensor) else len(part) for part in parts)

    def _write(self, file: str, parts: Sequence[bytes | torch.Tensor], offset: int) -> None:
        for part in parts:
            view = memory(part) if isinstance(part, torch.Tensor) else memoryview(part)
            while view.nbytes:
                written = self._call(file, os.pwrite, self._open[file], view, offset)
                view, offset = view[written:], offset + written

    def _call(self, file: str, call: Callable[..., Result], *args: object) -> Result:
        try:
            return call(*args)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder / file)) from None

    def close(self, file: str) -> None:
        """Say that no more is written to this file: it is closed once it is on the disk, while the caller goes on."""
        self._copies.submit(self._sync, file)

    def _sync(self, file: str) -> None:
        self._call(file, os.fsync, self._open[file])
        os.close(self._open.pop(file))

    def finish(self) -> None:
        """Wait until everything is on the disk, and close the files."""
        self._copies.finish()
        for file in list(self._open):
            self._sync(file)

    def abandon(self) -> None:
        """Stop where it is, and close the files. Nothing is raised."""
        self._copies.abandon()
        while self._open:
            os.close(self._open.popitem()[1])


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block into a ConversionError that names the folder to be written, and the file."""
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
        file = f" ({Path(error.filename).name})" if error.filename else ""
        raise ConversionError(
            f"{folder}: cannot be written, {reason}{file}. Nothing was left behind; give another folder."
        ) from None
