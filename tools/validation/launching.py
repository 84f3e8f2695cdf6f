"""Starts real launches (a command, its ranks in other sessions) and watches all of their processes end.

Ranks announce themselves by an empty file `ready/<rank>.<pid>`, because torchrun gives each a session of its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
LIMIT = 10.0  # seconds in which every process of a failed run must be gone

# Put at the head of a test's rank program; `world()` also joins a Gloo group through a file.
PRELUDE = """
import os, sys, time
from datetime import timedelta
from pathlib import Path

RANK = int(os.environ["RANK"])

def ready():
    Path("ready").mkdir(exist_ok=True)
    Path(f"ready/{RANK}.{os.getpid()}").touch()

def world():
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=RANK,
                            world_size=int(os.environ["WORLD_SIZE"]), timeout=timedelta(seconds=120))
    dist.barrier()
    return dist

from gspo_megatron.process import lifecycle
from gspo_megatron.errors import ConfigError
"""


class Launch:
    """A running command in a session of its own, with its output in files of `folder`."""

    def __init__(self, command: list[str], folder: Path, **env: str):
        self.folder = folder
        names = ("PYTHONPATH", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
        settings = dict(zip(names, (str(ROOT), "1", "lo"), strict=True)) | env
        clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NPROC")}
        label = f"{len(list(folder.glob('*.out')))}"
        self.out, self.err = folder / f"{label}.out", folder / f"{label}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                command, cwd=folder, env=clean | settings, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()

    def ranks(self, count: int, within: float = 60) -> dict[int, int]:
        """Wait until `count` ranks are ready; rank -> pid."""
        found: dict[int, int] = {}

        def all_there() -> bool:
            found.update({int(f.stem): int(f.suffix[1:]) for f in self.folder.glob("ready/*")})
            return len(found) == count or self.process.poll() is not None

        wait_until(all_there, within)
        assert len(found) == count, f"only ranks {sorted(found)} started:\n{self.stderr}"
        return found

    def wait(self, within: float = LIMIT) -> int:
        return self.process.wait(within)


@contextlib.contextmanager
def launched(command: list[str], folder: Path, **env: str) -> Iterator[Launch]:
    """A Launch that leaves nothing behind, however the test ends."""
    launch = Launch(command, folder, **env)
    try:
        yield launch
    finally:
        family = []
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(launch.process.pid).children(recursive=True)
        pids = {member.pid for member in family} | {int(f.suffix[1:]) for f in folder.glob("ready/*")}
        for pid in {launch.process.pid, *pids} if launch.process.poll() is None else pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        launch.process.wait(LIMIT)


def wait_until(condition: Callable[[], bool], within: float) -> bool:
    """Poll; the answer is whether it came true in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    """The process runs (a zombie whose parent is slow to collect it does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def gone(pids: list[int], within: float = LIMIT) -> bool:
    """All of these processes end in time."""
    return wait_until(lambda: not any(alive(pid) for pid in pids), within)
