"""Reads the numbers of a distributed checkpoint where they stand in its files, without copies.

torch.save has made a zip archive of each shard (shards.py): its directory says where the bytes are, the pickle that
describes the tensor is read as data (inert_pickle.py), and the tensor is a view of the file.

Left out: zip's checksums (the manifest has better ones), and files of a machine with the other order of bytes.
"""

import io
import mmap
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from gspo_megatron.backend.checkpoint import inert_pickle
from gspo_megatron.backend.checkpoint.index import Place, Shape, StoredTensor
from gspo_megatron.backend.checkpoint.inert_pickle import Made, Named, Persistent
from gspo_megatron.errors import CheckpointError

TAIL = 4096  # bytes at an archive's end that have its directory: some records of 50 to 100 bytes
LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of name and extra field, which stand between header and contents
BAD_ARCHIVE = (zipfile.BadZipFile, NotImplementedError, OverflowError)  # what zipfile raises of a directory
REBUILD = Named("torch._utils", "_rebuild_tensor_v2")
STORAGES = {
    Named("torch", name): dtype
    for name, dtype in (
        ("DoubleStorage", torch.float64),
        ("FloatStorage", torch.float32),
        ("BFloat16Storage", torch.bfloat16),
        ("HalfStorage", torch.float16),
        ("LongStorage", torch.int64),
        ("IntStorage", torch.int32),
        ("ShortStorage", torch.int16),
        ("CharStorage", torch.int8),
        ("ByteStorage", torch.uint8),
        ("BoolStorage", torch.bool),
    )
}
PICKLE_NAMES = frozenset({REBUILD, Named("collections", "OrderedDict"), *STORAGES})
PICKLE_STEPS = 1000  # of a tensor's pickle; 40 are usual


class ShardReader:
    """Reads regions of a checkpoint's tensors, whatever the shards that they were saved in.

    Args:
        folder: of the checkpoint.
        tensors: what index.read gave.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, StoredTensor]):
        self.tensors = tensors
        self._folder = folder
        self._files: dict[str, mmap.mmap] = {}

    def part(self, part: ShardedTensor) -> torch.Tensor:
        """Read what a sharded tensor of Megatron's stands for: in the type that it is stored in, on the CPU.

        Raises:
            CheckpointError: as read(), or the tensor has another shape in the whole model. Embedding and LM head may
                have more rows there, as Megatron pads a vocabulary.
        """
        stored, wanted = self._stored(part.key), tuple(part.global_shape)
        is_padded = part.allow_shape_mismatch and stored.shape[:1] > wanted[:1] and stored.shape[1:] == wanted[1:]
        if stored.shape != wanted and not is_padded:
            raise CheckpointError(
                f"{self._folder}: {part.key} has shape {list(stored.shape)}, and this model makes it {list(wanted)}. "
                "Give a checkpoint of this model."
            )
        shape = (*([1] * part.prepend_axis_num), *part.local_shape)  # experts have one dimension more
        return self.read(part.key, tuple(part.global_offset), shape).reshape(part.local_shape)

    def read(self, key: str, offset: Shape, shape: Shape) -> torch.Tensor:
        """Read a region of a tensor, in its own type: a view of the file where one shard is just that, else a copy.

        Raises:
            CheckpointError: a part is missing, of another type, or its file is lost or damaged.
        """
        stored = self._stored(key)
        exact = stored.shards.get(offset)
        if exact is not None and exact[0] == shape:
            return self._shard(key, exact[1], shape, stored.dtype)
        # Zeros, because shards that overlap could hide that a part is missing.
        found, filled = torch.zeros(shape, dtype=stored.dtype), 0
        for at, (size, place) in stored.shards.items():
            first = [max(a, b) for a, b in zip(at, offset, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(at, size, offset, shape, strict=True)]
            if all(a < b for a, b in zip(first, last, strict=True)):
                theirs, ours = (
                    tuple(slice(a - o, b - o) for a, b, o in zip(first, last, origin, strict=True))
                    for origin in (at, offset)
                )
                found[ours] = self._shard(key, place, size, stored.dtype)[theirs]
                filled += prod(b - a for a, b in zip(first, last, strict=True))
        if filled != found.numel():
            raise CheckpointError(f"{self._folder}: damaged, only a part of {key} is stored. Copy it again.")
        return found

    def _stored(self, key: str) -> StoredTensor:
        if key not in self.tensors:
            raise CheckpointError(f"{self._folder}: has no {key}, which this model has. Give a checkpoint of this one.")
        return self.tensors[key]

    def _shard(self, key: str, place: Place, shape: Shape, dtype: torch.dtype) -> torch.Tensor:
        path = self._folder / place.file
        try:
            mapped = self._mapped(path)
            archive = memoryview(mapped)[place.start : place.start + place.length]
            if archive.nbytes != place.length:
                raise ValueError(f"it ends before {key} does")
            records = _records(bytes(archive[-min(TAIL, place.length) :]), place.length)
            begin, size = _span(archive, *records["data.pkl"])
            layout = _described(bytes(archive[begin : begin + size]))
            begin, size = _span(archive, *records["data/0"])
            if (layout.dtype, layout.shape) != (dtype, shape) or size != layout.numbers * dtype.itemsize:
                raise ValueError(f"{key} is not stored as {dtype} of {list(shape)}")
            if size == 0:
                return torch.empty(shape, dtype=dtype)
            found = torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=place.start + begin)
        except (OSError, ValueError, KeyError, IndexError, struct.error, *BAD_ARCHIVE) as error:
            raise CheckpointError(f"{path}: damaged or incomplete ({error}). Copy it again.") from None
        aligned = found if found.data_ptr() % dtype.itemsize == 0 else found.clone()
        return aligned.view(dtype).as_strided(shape, layout.strides, layout.first)

    def _mapped(self, path: Path) -> mmap.mmap:
        if path.name not in self._files:
            with path.open("rb") as file:
                # Private and writable, because torch warns of memory that is not.
                self._files[path.name] = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        return self._files[path.name]


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in its archive's bytes."""

    dtype: torch.dtype
    numbers: int  # that are stored
    first: int
    shape: Shape
    strides: Shape


def _described(pickled: bytes) -> _Layout:
    """What a tensor's pickle says. Raises ValueError where it is none that torch.save writes for a plain tensor."""
    made = inert_pickle.read(pickled, PICKLE_NAMES, PICKLE_STEPS)
    if not isinstance(made, Made) or made.kind != REBUILD or len(made.arguments) < 4:
        raise ValueError("what stands there is no tensor")
    storage, first, shape, strides = made.arguments[:4]
    key = storage.key if isinstance(storage, Persistent) else None
    if type(key) is not tuple or len(key) != 5 or key[2] != "0" or not isinstance(key[1], Named):
        raise ValueError("its numbers are not in the archive")
    dtype, numbers = STORAGES.get(key[1]), key[4]
    if dtype is None or not _are_sizes((first, numbers)) or not (_are_sizes(shape) and _are_sizes(strides)):
        raise ValueError("its shape is none")
    last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and last >= numbers:
        raise ValueError("it is larger than its numbers")
    return _Layout(dtype, numbers, first, shape, strides)


def _are_sizes(values: object) -> TypeGuard[Shape]:
    return type(values) is tuple and all(type(value) is int and value >= 0 for value in values)


def _span(archive: memoryview, header: int, size: int) -> tuple[int, int]:
    """(Where a record's contents begin, their size). Raises ValueError where that is not in the archive."""
    if not 0 <= header <= archive.nbytes - LOCAL_HEADER.size:
        raise ValueError("its directory is wrong")
    begin = _contents(archive, header)
    if begin + size > archive.nbytes:
        raise ValueError("its directory is wrong")
    return begin, size


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
