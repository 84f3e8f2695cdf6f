"""A folder is held by one process until that ends, however it ends, by a lock of the operating system on a file in it.

Locks are flock's, which Linux carries over NFS. A file system without them (Lustre unless it is mounted with `flock`)
lets every process have the folder, and the holder is told so.
"""

import fcntl
import os
import re
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from gspo_megatron.errors import CheckpointError
from gspo_megatron.utils.small_files import unwritten

LOCK = ".lock"


@dataclass(frozen=True)
class Hold:
    """A folder is this process's until the hold is closed or the process ends."""

    folder: Path
    file: TextIO
    is_exclusive: bool  # False: the file system has no locks

    @property
    def notes(self) -> tuple[str, ...]:
        """Say what a user should know of it."""
        if self.is_exclusive:
            return ()
        return (f"{self.folder}: its file system has no locks, so nothing keeps a second start out of it",)

    def close(self) -> None:
        """Let others have the folder."""
        self.file.close()


def held(folder: Path) -> Hold | None:
    """Take a folder for this process. None where another process has it, or where it is gone.

    Raises:
        CheckpointError: its lock file cannot be written.
    """
    path = folder / LOCK
    try:
        file = path.open("a+")
    except FileNotFoundError:
        return None
    except OSError as error:
        remedy = "Make the folder writable, or give another name."
        raise CheckpointError(unwritten(error, path, remedy)) from None
    is_exclusive = True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        is_exclusive = False
    if not _is_there(file, path):  # a start that ended early has removed the folder meanwhile
        file.close()
        return None
    with suppress(OSError):  # for people alone; a full disk keeps nobody from training
        file.truncate(0)
        file.write(f"{socket.gethostname()}, pid {os.getpid()}\n")
        file.flush()
    return Hold(folder, file, is_exclusive)


def holder(folder: Path) -> str:
    """Say in parentheses who has a folder, as its lock file tells; empty where it does not."""
    try:
        who = (folder / LOCK).read_text().strip()
    except (OSError, ValueError):
        return ""
    return f" ({who})" if re.fullmatch(r"[\w.-]+, pid \d+", who) else ""


def _is_there(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
