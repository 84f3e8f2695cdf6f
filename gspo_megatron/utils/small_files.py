"""Small files are written whole: a kill, a loss of power or a full disk leaves the old contents or the new, no part.

Left out: large files (file_writing.py).
"""

import os
from contextlib import suppress
from io import FileIO
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Put `content` in the place of what the file holds, if there is one. A link stays one: its target is replaced.

    Raises OSError that names the file, which is then as it was.
    """
    target = Path(os.path.realpath(path))
    aside = target.with_name(target.name + ".new")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, target)
        to_disk(target.parent)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def append(file: FileIO, content: bytes) -> None:
    """Write to the end of a file that was opened for that, without a buffer: all of it, or nothing and OSError."""
    size, view = os.fstat(file.fileno()).st_size, memoryview(content)
    try:
        while view.nbytes:
            view = view[file.write(view) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(file.fileno(), size)
        raise


def unwritten(error: OSError, place: Path, remedy: str) -> str:
    """Say what could not be written: the file that the error names, else `place`."""
    return f"{error.filename or place}: cannot be written ({error.strerror}). {remedy}"


def to_disk(path: Path) -> None:
    """Write a file or a folder's names through to the disk: without it a machine that loses power could keep a rename
    and not the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
