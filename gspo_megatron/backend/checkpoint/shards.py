"""The numbers of a distributed checkpoint where they stand in its files: written and read without copies.

torch.save makes a zip archive of each shard: a pickle that describes the tensor, and its bytes as they are. What stands
around the bytes depends on shape and type alone. Writing: torch.save makes that once for each shape, and the bytes go
to the file from where they are. Reading: the archive's directory says where the bytes are, the pickle must be the one
that torch.save writes for this shape and type, and the tensor is a view of the file.

Left out: zip's checksums of what is written here (they are 0, and torch.load does not look at them).
"""

import io
import mmap
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from gspo_megatron.errors import CheckpointError
from gspo_megatron.utils.file_writing import FileWriter

ALIGNMENT = 64  # of an archive in its file, so that its numbers are aligned too
NAME = "__{}_{}.distcp"
OPEN = 32  # files that are written and not yet closed; the system lets a process have some hundreds
TAIL = 4096  # bytes at an archive's end that have its directory: some records of 50 to 100 bytes
LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field, which stand between header and contents
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Frame:
    """What torch.save writes around a contiguous tensor's bytes."""

    before: bytes
    after: bytes
    pickle: bytes  # the record that describes the tensor; a part of `before`


@lru_cache(maxsize=256)
def frame(dtype: torch.dtype, shape: Shape) -> Frame:
    """Let torch.save itself make it. The tensor's memory is allocated and never touched."""
    tensor, kept = torch.empty(shape, dtype=dtype), torch.serialization.get_crc32_options()
    catcher = _Catcher(tensor)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, cast(IO[bytes], catcher))  # it asks a stream for write and flush alone
    finally:
        torch.serialization.set_crc32_options(kept)
    before, after = (b"".join(part) for part in catcher.parts)
    header, size = _records(after, len(before) + tensor.nbytes + len(after))["data.pkl"]
    start = _contents(before, header)
    return Frame(before, after, before[start : start + size])


class _Catcher:
    """A stream for torch.save that keeps all but the tensor's own bytes, which come in one piece."""

    def __init__(self, tensor: torch.Tensor):
        self.parts: list[list[bytes]] = [[]]
        self._wanted = (tensor.data_ptr(), tensor.nbytes)

    def write(self, data: memoryview) -> int:
        view = np.frombuffer(data, np.uint8)
        if (view.ctypes.data, view.nbytes) == self._wanted:
            self.parts.append([])
        else:
            self.parts[-1].append(view.tobytes())
        return view.nbytes

    def flush(self) -> None:
        """torch.save wants it."""


def _records(tail: bytes, length: int) -> dict[str, tuple[int, int]]:
    """{name in an archive of `length` bytes that ends so: (where its header is, size of its contents)}."""
    with zipfile.ZipFile(io.BytesIO(tail)) as archive:  # takes what is missing in front for a negative offset
        return {
            entry.filename.partition("/")[2]: (entry.header_offset + length - len(tail), entry.file_size)
            for entry in archive.infolist()
        }


def _contents(archive: bytes | memoryview, header: int) -> int:
    """Where a record's contents begin."""
    return header + 30 + sum(LOCAL_HEADER.unpack_from(archive, header))


class ShardWriter:
    """Writes shards one behind the other into files of about `file_bytes`, named as torch's.

    Every method raises OSError, also of an earlier write.

    Args:
        rank: of the process, where several write into one folder.
    """

    def __init__(self, folder: Path, file_bytes: int, rank: int = 0):
        self._files, self._limit, self._rank = FileWriter(folder), file_bytes, rank
        self._name, self._end, self._count = "", file_bytes, 0  # of the last file; the first one is to be opened

    def write(self, index: MetadataIndex, shape: Shape, blocks: Sequence[torch.Tensor]) -> WriteResult:
        """Write a shard of this shape with the blocks' numbers, end to end; nobody changes them any more."""
        around = frame(blocks[0].dtype, shape)
        return self._append(index, [around.before, *blocks, around.after])

    def write_item(self, index: MetadataIndex, item: io.BytesIO) -> WriteResult:
        """Write what is no tensor."""
        return self._append(index, [item.getvalue()])

    def _append(self, index: MetadataIndex, parts: Sequence[bytes | torch.Tensor]) -> WriteResult:
        if self._end >= self._limit:
            self._name, self._end = NAME.format(self._rank, self._count), 0
            self._count += 1
            self._files.create(self._name)
            if self._count > OPEN:
                self._files.close(NAME.format(self._rank, self._count - 1 - OPEN))
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._end = self._files.write(self._name, parts, start)
        place = _StorageInfo(self._name, start, self._end - start)
        return WriteResult(index=index, size_in_bytes=self._end - start, storage_data=place)

    def finish(self) -> None:
        """Wait until all is on the disk."""
        self._files.finish()

    def abandon(self) -> None:
        """Stop where it is. Nothing is raised."""
        self._files.abandon()


class ShardReader:
    """Reads regions of a checkpoint's tensors, whatever the shards that they were saved in.

    Args:
        folder: of the checkpoint.
        metadata: what safe_loading.check gave.
    """

    def __init__(self, folder: Path, metadata: Metadata):
        self._folder = folder
        self._files: dict[str, mmap.mmap] = {}
        self._chunks: dict[str, dict[Shape, tuple[Shape, _StorageInfo]]] = {}
        places = {(i.fqn, tuple(i.offset)): info for i, info in metadata.storage_data.items() if i.offset is not None}
        for key, stored in metadata.state_dict_metadata.items():
            if isinstance(stored, TensorStorageMetadata):
                found = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in stored.chunks}
                self._chunks[key] = {at: (size, places[key, at]) for at, size in found.items() if (key, at) in places}

    def read(self, key: str, offset: Shape, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        """Read a region of a tensor: a view of the file where one shard is just that, else a copy.

        Raises:
            CheckpointError: a part is missing, of another type, or its file is lost or damaged.
        """
        chunks = self._chunks.get(key, {})
        exact = chunks.get(offset)
        if exact is not None and exact[0] == shape:
            return self._shard(key, exact[1], shape, dtype)
        found, filled = torch.empty(shape, dtype=dtype), 0
        for at, (size, place) in chunks.items():
            first = [max(a, b) for a, b in zip(at, offset, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(at, size, offset, shape, strict=True)]
            if all(a < b for a, b in zip(first, last, strict=True)):
                theirs, ours = (
                    tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))
                    for origin in (at, offset)
                )
                found[ours] = self._shard(key, place, size, dtype)[theirs]
                filled += prod(b - a for a, b in zip(first, last, strict=True))
        if filled != found.numel():
            raise CheckpointError(f"{self._folder}: damaged, only a part of {key} is stored. Copy it again.")
        return found

    def _shard(self, key: str, place: _StorageInfo, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        path = self._folder / place.relative_path
        try:
            archive = memoryview(self._mapped(path))[place.offset : place.offset + place.length]
            if archive.nbytes != place.length:
                raise ValueError(f"it ends before {key} does")
            tail = bytes(archive[-min(TAIL, place.length) :])
            records = _records(tail, place.length)
            (header, size), (data, room) = records["data.pkl"], records["data/0"]
            start = _contents(archive, header)
            wanted = prod(shape) * dtype.itemsize
            if archive[start : start + size] != frame(dtype, shape).pickle or room != wanted:
                raise ValueError(f"{key} is not stored as {dtype} of {list(shape)}")
            start = place.offset + _contents(archive, data)
            found = torch.frombuffer(self._mapped(path), dtype=torch.uint8, count=wanted, offset=start)
        except (OSError, ValueError, KeyError, IndexError, struct.error, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: damaged or incomplete ({error}). Copy it again.") from None
        aligned = found if found.data_ptr() % dtype.itemsize == 0 else found.clone()
        return aligned.view(dtype).view(shape)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path.name not in self._files:
            with path.open("rb") as file:
                # Private and writable, because torch warns of memory that is not.
                self._files[path.name] = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        return self._files[path.name]
