"""Processes of their own for what one process cannot see of itself: what an import brings, who outlives a kill."""

import os
import signal
import subprocess
import sys
import time

from tools.validation.launching import ROOT, gone


def imported_by(code: str, *packages: str) -> set[str]:
    """Return those of the packages that a fresh Python has imported after this code."""
    code += f"\nimport sys; print(*({set(packages)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def is_gone_with_its_rank(code: str) -> bool:
    """Run code that prints the pid of a child of its own, kill it outright, and tell whether the child is gone within 5
    seconds."""
    rank = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(rank.stdout.readline())
    time.sleep(0.3)
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    return gone([child], 5)
