"""Runs a plain function on several Gloo ranks of this machine and returns what each rank returned.

Ranks are forks of a server that has imported torch, Megatron and this package, which else takes each rank 8 seconds.
The server has one thread, runs no work of its own and ends with the test process, however that ends.

Left out: CUDA (ranks see no GPU, so that a test means the same thing everywhere), several machines, and hash seeds that
differ by rank. How real launches start and end is tested in test_launch.py and test_lifecycle.py, which go through
torchrun.
"""

import faulthandler
import functools
import gc
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

ROOT = Path(__file__).resolve().parents[2]
# What ranks find imported. The backend comes first: it patches torch before anything imports Megatron.
PRELOADED = (
    "gspo_megatron.backend",
    "gspo_megatron.trainer.train",
    "gspo_megatron.hf.convert",
    "tools.validation.parity.run",
    "torch._dynamo",  # torch's optimizers import it when they are made
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "hypothesis",
    "pytest",
)
# A fork lacks its parent's threads, so OpenMP and OpenBLAS must start none. The safe path leaves out the working
# directory, which would come before this checkout.
SERVER = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONSAFEPATH": "1"}


class RankError(RuntimeError):
    """One rank failed or did not return; the message carries that rank's traceback."""


def spawn(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call fn(rank, world_size, *args) on `world_size` fresh processes that share a Gloo group.

    `fn` must be importable (top level of a module); arguments and results travel by pickle. Ranks have the caller's
    environment and working directory. The answer is the list of results by rank. The first failure raises RankError
    and ends the other ranks, and so does running longer than `timeout` seconds, start-up included: a rank that hangs
    prints its stack to stderr first.
    """
    context = forks()
    # Pickled here and not by Process: that would share tensors through file descriptors that outlive this call.
    payload = pickle.dumps((fn, args))
    deadline = time.monotonic() + timeout
    ranks, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="gloo_ranks_") as folder:
        try:
            for rank in range(world_size):
                receive, send = context.Pipe(duplex=False)
                place = (rank, world_size, f"{folder}/store", timeout)
                process = context.Process(target=_rank_main, args=(*place, payload, dict(os.environ), send))
                process.start()
                send.close()  # only the child keeps it, so that its death reads as end of file
                ranks.append(process)
                pipes.append(receive)
            return _collect(pipes, ranks, deadline, timeout)
        finally:
            _end(ranks, pipes)


@functools.cache
def forks() -> Any:
    """A context whose processes are forks of this process's server, which is there and has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with mock.patch.dict(os.environ, SERVER | {"PYTHONPATH": paths}):
        forkserver.ensure_running()
    check = context.Process(target=_check_server)
    check.start()
    check.join()
    if check.exitcode:
        raise RuntimeError(f"the server of ranks is not ready, exit code {check.exitcode} (traceback on stderr)")
    return context


def _check_server() -> None:
    """In a fork: what the server failed to import fails again, where it is seen, and the server has one thread."""
    for name in PRELOADED:
        importlib.import_module(name)
    threads = psutil.Process(os.getppid()).num_threads()
    assert threads == 1, f"importing {PRELOADED} started {threads - 1} threads, which a fork would lack"


def _collect(pipes: list[Connection], ranks: list[Any], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = set(wait(waiting, timeout=max(0.0, deadline - time.monotonic())))
        if not ready:
            late = [rank for rank in range(len(pipes)) if rank not in results]
            raise RankError(f"ranks {late} of {len(pipes)} did not return within {timeout:g} s (stacks on stderr)")
        failures = []
        for rank, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            try:
                moment, error, result = pickle.loads(pipe.recv_bytes())
            except EOFError:
                ranks[rank].join(5)
                moment, error = 0.0, f"died without a report, exit code {ranks[rank].exitcode}"
            if error is None:
                results[rank] = result
            else:
                failures.append((moment, rank, error))
        if failures:
            # A death or else the earliest is the cause; the others are mostly the broken connections it left behind.
            _, rank, error = min(failures)
            raise RankError(f"rank {rank} of {len(pipes)} failed:\n{error}")
    return [results[rank] for rank in range(len(pipes))]


def _end(ranks: list[Any], pipes: list[Connection]) -> None:
    """Leave no process behind: ranks that reported get a moment, all others and their children are killed."""
    for process in ranks:
        process.join(0 if sys.exc_info()[0] else 2)
    for process in ranks:
        try:
            # Each rank leads a process group of its own, which holds the writers of a checkpoint as well.
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()  # already gone, or not yet leader of its group
        process.join(5)
    for pipe in pipes:
        pipe.close()


def _rank_main(
    rank: int, world_size: int, store: str, timeout: float, payload: bytes, environment: dict, report: Connection
) -> None:
    gc.freeze()  # else every collection looks through all that was imported, and so copies the server's memory
    os.setsid()
    _die_with_parent()
    # Before the parent gives up, and one rank after the other so that their stacks do not mix.
    faulthandler.dump_traceback_later(max(timeout - 2.0, 0.8 * timeout) + 0.1 * rank, file=sys.__stderr__ or 2)
    os.environ.clear()
    os.environ |= environment
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else Gloo looks the host's name up, which can fail
    result, error = None, None
    try:
        result = _call(rank, world_size, store, timeout, payload)
    except BaseException:
        error = traceback.format_exc()
    report.send_bytes(pickle.dumps((time.monotonic(), error, result)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if error is None else 1)  # destructors of a broken process group can hang or abort


def _call(rank: int, world_size: int, store: str, timeout: float, payload: bytes) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    fn, args = pickle.loads(payload)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
    )
    result = fn(rank, world_size, *args)
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early closes connections which others still read from
        dist.destroy_process_group()
    return result


def _die_with_parent() -> None:
    """End this rank when the test process is killed, which skips its clean-up."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
