"""Can the run folder be written? Found out before the ranks start, by making a folder there and removing it.

Names and lengths of their parts are held in config/names.py. Left out: how much room there is. A checkpoint's is
checked before each (backend/checkpoint/saver.py).
"""

import os
import tempfile
from pathlib import Path

from gspo_megatron.config import TrainConfig
from gspo_megatron.config.constraints import require

INSIDE = 120  # bytes of the longest path inside a run folder


def check_output(config: TrainConfig) -> None:
    """Raise ConfigError where no run folder can be made in output_dir, and leave nothing there.

    A run folder that exists and cannot be written is refused where it is chosen (trainer/folders.py).
    """
    folder = config.output_dir.absolute()
    place = folder  # or the nearest folder above that exists
    while not os.path.lexists(place):
        place = place.parent
    dangles = not place.exists()
    _require(not dangles, folder, f"{place} is a link to nowhere")
    _require(place.is_dir(), folder, f"{place} is a file")
    size, limit = len(os.fsencode(folder / config.name)) + INSIDE, os.pathconf(place, "PC_PATH_MAX")
    _require(size <= limit, folder, f"the paths of a run's files would have up to {size} bytes, of {limit}")
    try:
        with tempfile.TemporaryDirectory(prefix=".gspo-megatron-", dir=place):
            pass
    except OSError as error:
        _require(False, folder, f"nothing can be written in {place} ({(error.strerror or str(error)).lower()})")


def _require(ok: bool, folder: Path, why: str) -> None:
    require(ok, "output_dir", str(folder), why, "Give a folder that can be made, or written to.")
