"""The files of a checkpoint: a manifest with the size and SHA-256 of each, and one rename that makes them visible.

A folder named step_NNNNNN is complete, and a file that changed afterwards is found. Until then it is called
step_NNNNNN.unfinished, which no start goes on from.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
CHUNK = 1 << 24
Digest = tuple[int, str]  # bytes, SHA-256


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return folder.with_name(folder.name + ".unfinished")


def make_visible(folder: Path, known: dict[str, Digest]) -> None:
    """Write the manifest and give the checkpoint its name, in place of what may have it. On rank 0.

    Args:
        known: the digests of the files that their writers have hashed; the others are hashed here.
    """
    aside = unfinished(folder)
    names = [str(path.relative_to(aside)) for path in sorted(aside.rglob("*")) if path.is_file()]
    manifest = {name: known.get(name) or digest(aside / name) for name in names}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _to_disk(aside / MANIFEST)
    old = folder.with_name(folder.name + ".old.unfinished")
    if folder.exists():  # a spoiled one, which the run did not go on from
        os.rename(folder, old)
    os.rename(aside, folder)
    _to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare every file with the manifest; the ranks share the work. A collective over all ranks.

    Raises:
        CheckpointError: a file is missing, shorter or changed: on every rank, with its name.
    """
    problem = None
    try:
        wanted = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        wanted, problem = {}, f"{folder / MANIFEST}: cannot be read ({error})"
    found = (_problem(folder / name, *wanted[name]) for name in _my_share(wanted))
    problem = problem or next((text for text in found if text), None)
    raise_together(CheckpointError(problem) if problem else None)


def digest(path: Path) -> Digest:
    """Return a file's size and hash; the file is on its disk afterwards."""
    _to_disk(path)
    return path.stat().st_size, _sha256(path)


def _problem(path: Path, size: int, wanted_sha: str) -> str | None:
    """What distinguishes a file from the one that was written."""
    if not path.is_file():
        return f"{path}: missing"
    if path.stat().st_size != size:
        return f"{path}: has {path.stat().st_size} bytes, and {size} were written"
    if _sha256(path) != wanted_sha:
        return f"{path}: its contents changed after it was written (SHA-256 differs)"
    return None


def _my_share(names: Iterable[str]) -> list[str]:
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Written through to the disk: without it a machine that loses power could keep the rename and not the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
