"""Writing checkpoints while the training goes on, whole or not there at all.

begin() copies what this rank writes to the host's memory and leaves the files to a thread; finish(), called by all
ranks after the same step, makes the checkpoint visible once every rank's files are there. One is under way at a time.
The thread makes no collective, so that it cannot get between the training's own.

Megatron plans who writes what. Its own writers are not used: they are forked processes, which outlive a rank that is
killed and go on writing into a folder that the next start uses.

Left out: sharing a tensor's bytes among the replicas of data parallelism (the first one writes what they all have).
"""

import inspect
import json
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from gspo_megatron.backend.checkpoint import files, sharded
from gspo_megatron.backend.checkpoint.files import Digest
from gspo_megatron.backend.checkpoint.optimizer_state import ParameterState
from gspo_megatron.backend.engine.network import Network
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.errors import CheckpointError
from gspo_megatron.process import progress

SPARE = 1 << 24  # bytes beside the tensors: metadata, tokenizer
POLL_SECONDS = 0.05

# Megatron turns Python's garbage collector off while it writes, which a forked process needs and a thread must not do.
write_file = inspect.unwrap(filesystem_async.FileSystemWriterAsync.write_preloaded_data)
# megatron-core 0.19 has two kinds of requests, and means nvidia-resiliency-ext's if it is not told.
HAS_KINDS = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
OF_MEGATRON = {"async_strategy": "mcore"} if HAS_KINDS else {}


@dataclass
class _Job:
    """A checkpoint under way, on one rank."""

    folder: Path
    request: AsyncRequest
    files: list[tuple]  # Megatron's write buckets, in host memory
    digests: dict[str, Digest] = field(default_factory=dict)
    error: Exception | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    @property
    def is_writing(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def _write(self) -> None:
        try:
            results = {}
            for number, file in enumerate(self.files):
                results[number] = _written(self.request, number, file)
                self.digests[file[1]] = files.digest(Path(file[0]))
            if self.files:
                self.request.async_fn_args[2].put(results)  # where Megatron's finalize function looks for them
        except Exception as error:  # told by finish(), on every rank
            self.error = error
        self.files = []  # gives the memory back


class Saver:
    """Writes a run's checkpoints. All ranks call begin() and finish() alike."""

    def __init__(self):
        self._job: _Job | None = None

    @property
    def is_begun(self) -> bool:
        """A checkpoint is not visible yet. The same on all ranks."""
        return self._job is not None

    @property
    def is_writing(self) -> bool:
        """This rank's files are not all there yet."""
        return self._job is not None and self._job.is_writing

    def begin(
        self,
        networks: Mapping[str, Network],
        folder: Path,
        progress: dict | None = None,
        reference: FrozenReference | None = None,
        add: Callable[[Path], None] = lambda unfinished: None,
    ) -> None:
        """Take everything as it is now, to be written to `folder`, in place of what may be there. A collective.

        Args:
            networks: by the prefix of their tensors' names: "" the policy, "critic." PPO's critic. The state of those
                with an optimizer goes with them.
            progress: numbers and words that sharded.read_progress() gives back (JSON).
            reference: its weights, where the run has one.
            add: puts further files into the folder that it is given. Called on rank 0.

        Raises:
            CheckpointError: too little room on the disk; the folder cannot be written. On every rank.
        """
        if self._job:
            raise RuntimeError(f"finish {self._job.folder} before {folder}")
        unfinished, is_main = files.unfinished(folder), dist.get_rank() == 0
        if is_main:
            shutil.rmtree(unfinished, ignore_errors=True)
        state = sharded.sharded(networks, reference, ParameterState.read)
        _ensure_room(folder, sharded.bytes_written(state), _device(networks))
        _on_main(lambda: unfinished.mkdir(parents=True))
        # Megatron would start a server process for this queue. Here both its ends are in this process.
        filesystem_async._results_queue = queue.Queue()
        request = dist_checkpointing.save(state, str(unfinished), async_sharded_save=True, **OF_MEGATRON)
        counters = {name: sharded.counters_of(network) for name, network in networks.items() if network.optimizer}

        def add_small_files() -> None:
            text = json.dumps({"counters": counters, "progress": progress or {}})
            (unfinished / "progress.json").write_text(text)
            add(unfinished)

        _on_main(add_small_files)
        self._job = _Job(folder, request, _in_host_memory(request))
        self._job.start()

    def finish(self) -> Path | None:
        """Wait for all ranks' files and make the checkpoint visible. A collective.

        Returns the folder, or None where none was begun.

        Raises:
            CheckpointError: a rank could not write (a full disk); what it wrote is removed. On every rank.
        """
        job = self._job
        if job is None:
            return None
        while _any(job.is_writing):
            progress.detail(f"until {job.folder.name} is written")
            time.sleep(POLL_SECONDS)
        self._job = None
        with _removed_if_it_fails(files.unfinished(job.folder)):
            raise_together(_cannot_write(job.folder, job.error) if job.error else None)
        for finalize in job.request.finalize_fns:
            _finalized(job.folder, finalize)
        known = {name: digest for part in gather_objects(job.digests) for name, digest in part.items()}
        with _removed_if_it_fails(files.unfinished(job.folder)):
            _on_main(lambda: files.make_visible(job.folder, known))
        return job.folder


def save(networks: Mapping[str, Network], folder: Path, *args: Any, **options: Any) -> None:
    """Begin and finish at once: the checkpoint is there when this returns."""
    saver = Saver()
    saver.begin(networks, folder, *args, **options)
    saver.finish()


def _in_host_memory(request: AsyncRequest) -> list[tuple]:
    """This rank's write buckets (path, name, (bytes, tensors)) in memory that the training does not change."""
    if request.async_fn is None:
        return []  # nothing of the whole model is this rank's to write
    files = []
    for live, copied in zip(request.async_fn_args[1], request.preload_fn(), strict=True):
        path, name, (contents, tensors) = copied
        pairs = zip(live[2][1], tensors, strict=True)
        own = [(item, copy.clone() if copy is source else copy) for (_, source), (item, copy) in pairs]
        files.append((path, name, (contents, own)))
    return files


def _written(request: AsyncRequest, number: int, file: tuple) -> list:
    """Megatron's record of what it wrote to one file."""
    transforms = request.async_fn.args[0]
    results: queue.Queue[tuple[int, Any]] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    count.put(number)
    write_file(transforms, number, file, results, count, use_fsync=True)
    _, found = results.get_nowait()
    if isinstance(found, Exception):
        raise found
    return found


def _ensure_room(folder: Path, mine: int, device: torch.device) -> None:
    """Refuse to begin what the disk cannot hold. A collective."""
    total = torch.tensor([mine], dtype=torch.int64, device=device)
    dist.all_reduce(total)
    needed = int(total) + SPARE
    error = None
    if dist.get_rank() == 0:
        there = next(parent for parent in folder.absolute().parents if parent.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            error = CheckpointError(
                f"{folder}: a checkpoint takes {needed / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free. Make "
                "room, or keep fewer (checkpoint.keep_last, keep_every), then start the same command: it goes on from "
                "the newest checkpoint."
            )
    raise_together(error)


def _on_main(write: Callable[[], None]) -> None:
    """Let rank 0 write; an error of its disk is raised on every rank. A collective."""
    error = None
    if dist.get_rank() == 0:
        try:
            write()
        except OSError as caught:
            error = CheckpointError(f"the checkpoint cannot be written ({caught}). The ones before it are kept.")
    raise_together(error)


@contextmanager
def _removed_if_it_fails(unfinished: Path) -> Iterator[None]:
    """Remove the half checkpoint where the block raises an error, which it does on every rank."""
    try:
        yield
    except CheckpointError:
        _on_main(lambda: shutil.rmtree(unfinished, ignore_errors=True))
        raise


def _finalized(folder: Path, finalize: Callable[[], None]) -> None:
    """Let Megatron write its small files, on rank 0 between its collectives.

    An error there is raised on rank 0 alone, for the others wait in a collective that it can no longer join; they end
    when it does.
    """
    try:
        finalize()
    except OSError as error:
        shutil.rmtree(files.unfinished(folder), ignore_errors=True)
        raise _cannot_write(folder, error) from None


def _cannot_write(folder: Path, error: Exception) -> CheckpointError:
    """torch's writer hides the disk's answer behind its own ("unexpected pos"), so that is looked for."""
    reason: BaseException | None = error
    while reason is not None and not isinstance(reason, OSError):
        reason = reason.__cause__ or reason.__context__
    free = shutil.disk_usage(folder.parent).free / 1e6
    return CheckpointError(
        f"{folder}: rank {dist.get_rank()} cannot write it ({reason or error}; {free:.0f} MB of the disk are free). "
        "The checkpoints before it are kept. Make room, then start the same command: it goes on from the newest."
    )


def _any(flag: bool) -> bool:
    """Ask whether the flag is up on any rank. A collective."""
    return any(gather_objects(flag))


def _device(networks: Mapping[str, Network]) -> torch.device:
    return next(next(iter(networks.values())).models[0].parameters()).device
