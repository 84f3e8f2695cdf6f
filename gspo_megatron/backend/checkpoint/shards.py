"""The numbers of a distributed checkpoint, written to its files from where they are. (Read by shard_reader.py.)

torch.save makes a zip archive of each shard: a pickle that describes the tensor, and its bytes as they are. What stands
around the bytes depends on shape and type alone, so torch.save makes that once for each shape.

Left out: zip's checksums of what is written here (they are 0, and torch.load does not look at them).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from gspo_megatron.backend.checkpoint.index import Shape
from gspo_megatron.utils.file_writing import FileWriter

ALIGNMENT = 64  # of an archive in its file, so that its numbers are aligned too
NAME = "__{}_{}.distcp"
OPEN = 32  # files that are written and not yet closed; the system lets a process have some hundreds


@dataclass(frozen=True)
class Frame:
    """What torch.save writes around a contiguous tensor's bytes."""

    before: bytes
    after: bytes


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
    return Frame(before, after)


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
