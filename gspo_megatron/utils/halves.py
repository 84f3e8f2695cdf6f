"""A folder is written beside its name, as NAME.unfinished, and gets it when it is complete.

What an earlier end has left there is written over; a mark tells it from a folder of somebody else's that has this name.
"""

import errno
import os
import shutil
from pathlib import Path

MARK = ".gspo-megatron-unfinished"


def begin(half: Path) -> None:
    """Make an empty folder, in place of a half that was left there.

    Raises OSError: it cannot be made, or another folder is there.
    """
    if half.exists():
        if not (half / MARK).is_file():
            raise FileExistsError(errno.EEXIST, "a folder of this name is there, and it is no half of ours", str(half))
        shutil.rmtree(half)
    half.mkdir(parents=True)
    (half / MARK).touch()


def publish(half: Path, target: Path) -> None:
    """Give it its name. Raises OSError."""
    os.rename(half, target)
    (target / MARK).unlink(missing_ok=True)


def discard(half: Path) -> None:
    """Remove a half, if there is one of ours."""
    if (half / MARK).is_file():
        shutil.rmtree(half, ignore_errors=True)
