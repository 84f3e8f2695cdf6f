"""The files of a checkpoint: a manifest with the size and SHA-256 of each, and one rename that makes them visible.

A folder named step_NNNNNN is complete, and a file that changed afterwards is found. Until then it is called
step_NNNNNN.unfinished, which no start goes on from.

The manifest says which format the checkpoint has:
1. A manifest without a number: {file: [bytes, SHA-256]} alone. Written by 0.1.0.
2. {"format": 2, "files": {...}}; the other files are the same. Extra states and common.pt are no longer read.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch.distributed as dist

from gspo_megatron.backend.checkpoint.index import METADATA
from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.errors import CheckpointError
from gspo_megatron.utils import plain_json
from gspo_megatron.utils.small_files import to_disk

MANIFEST = "manifest.json"
FORMAT = 2
NEEDED = {METADATA, "metadata.json", "progress.json"}
LARGEST = 1 << 28  # bytes of a manifest; that of a million files is smaller
SHA256 = re.compile("[0-9a-f]{64}")
CHUNK = 1 << 24
Digest = tuple[int, str]  # bytes, SHA-256


class NewerFormatError(CheckpointError):
    """Raised for a checkpoint of a later version's format. It is not damaged, so an older one is no answer."""


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
    (aside / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": manifest}, indent=1))
    to_disk(aside / MANIFEST)
    old = folder.with_name(folder.name + ".old.unfinished")
    if folder.exists():  # a spoiled one, which the run did not go on from
        os.rename(folder, old)
    os.rename(aside, folder)
    to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify(folder: Path) -> None:
    """Compare every file with the manifest; the ranks share the work. A collective over all ranks.

    Raises:
        CheckpointError: a file is missing, shorter or changed: on every rank, with its name.
    """
    with together():
        wanted = manifest(folder)
        found = (_problem(folder / name, *wanted[name]) for name in _my_share(wanted))
        if problem := next((text for text in found if text), None):
            raise CheckpointError(problem)


def manifest(folder: Path) -> dict[str, Digest]:
    """Return what a checkpoint's manifest says of each file.

    Raises:
        NewerFormatError: the checkpoint is of a later version.
        CheckpointError: the manifest is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        told = plain_json.read_object(path, LARGEST)
        number = told.get("format", 1)
        if type(number) is int and number > FORMAT:
            raise NewerFormatError(
                f"{path}: format = {number}: this version of gspo-megatron reads formats up to {FORMAT}. Use the newer "
                "version that wrote it."
            )
        files = told if number == 1 else told.get("files")
        if number not in (1, FORMAT) or not isinstance(files, dict):
            raise ValueError("it lists no files of a checkpoint")
        # One that names too little would let a damaged checkpoint pass.
        if unnamed := sorted((NEEDED | {path.name for path in folder.glob("*.distcp")}) - files.keys()):
            raise ValueError(f"it does not name {unnamed[0]}")
        return {name: _digest_of(name, entry) for name, entry in files.items()}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def check_format(folder: Path) -> None:
    """Look at the manifest, where there is one: what a conversion writes has none. Raises CheckpointError."""
    if (folder / MANIFEST).exists():
        manifest(folder)


def _digest_of(name: str, entry: object) -> Digest:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"it lists {name[:100]!r}, which is not in the folder")
    match entry:
        case [int(size), str(sha)] if SHA256.fullmatch(sha):
            return size, sha
    raise ValueError(f"no size and SHA-256 of {name[:100]!r}")


def digest(path: Path) -> Digest:
    """Return a file's size and hash; the file is on its disk afterwards."""
    to_disk(path)
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
