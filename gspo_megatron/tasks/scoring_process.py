"""The program in which scorers run: one child process of each rank that scores, with limits on time and memory.

A response is text that a model wrote, and some of reasoning-gym's scorers hand it to eval(). Here that happens in a
process without the trainer's environment, which may not grow beyond its memory limit, and which the kernel ends when
one response takes too long, even if the rank that asked is gone. Requests come pickled from the rank; an answer is one
line of JSON, because nothing that this process sends is trusted.

What is refused to the scorers (REFUSED) stops accidents and simple attacks. It is no wall: a determined one needs
a container around the whole job. Left out: network namespaces and seccomp, which need rights that a job seldom has.

Nothing of torch or Megatron is imported, so the process is up in a second. The rank's side is isolation.py.
"""

import builtins
import json
import math
import os
import pickle
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from reasoning_gym.factory import create_dataset

LENGTH = struct.Struct("<I")  # before each request
# Audit events (Python's "Audit events table") that no scorer has a use for.
REFUSED = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen", "os.kill",
           "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
           "os.chown", "shutil.rmtree", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo",
           "ctypes.dlopen", "signal.pthread_kill")  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


def main(memory: int, seconds: float) -> None:
    """Answer requests until stdin ends.

    Args:
        memory: bytes of address space.
        seconds: that one request may take.
    """
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)  # what a scorer prints is no answer
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process, also inside C code
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)
    datasets: dict[str, Any] = {}
    while (request := _read(requests)) is not None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        print(json.dumps(_answer(datasets, *request)), file=answers, flush=True)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _read(requests: BinaryIO) -> tuple | None:
    head = requests.read(LENGTH.size)
    return pickle.loads(requests.read(*LENGTH.unpack(head))) if head else None


def _answer(datasets: dict[str, Any], spec: dict, text: str, entry: dict) -> dict:
    """{"score": a number} or {"error": what the scorer raised}."""
    try:
        if spec["name"] not in datasets:
            datasets[spec["name"]] = create_dataset(**spec)
        value = float(datasets[spec["name"]].score_answer(text, entry))
    except BaseException as error:  # a response may well call exit()
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"score": value if math.isfinite(value) else str(value)}


def _refuse(event: str, arguments: tuple) -> None:
    if event in REFUSED or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
        raise builtins.PermissionError(f"a scorer must not do this: {event}")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
