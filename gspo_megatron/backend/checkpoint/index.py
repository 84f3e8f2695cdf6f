"""What a checkpoint's .metadata says of its tensors, as plain records: which shards there are, and where they stand.

torch and Megatron write .metadata as a pickle. Here it is read as data (inert_pickle.py), and every number in it is
held against the files that are there.

Left out: items that are no tensors. They are layers' _extra_state, which says something in FP8 training alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

from gspo_megatron.backend.checkpoint import inert_pickle
from gspo_megatron.backend.checkpoint.inert_pickle import Made, Malformed, Named, Pairs, Refused
from gspo_megatron.errors import CheckpointError

METADATA = ".metadata"
# A small folder is read in a second whatever its index is. Beyond that, an index may be as long as the files of tensors
# suggest: a shard takes over 1000 bytes there (torch.save's frame), and here about 150 instructions.
STEPS, BYTES_A_STEP = 1 << 19, 4
BYTES = 16  # of .metadata an instruction; 3 are usual
DIMENSIONS, LARGEST = 16, 1 << 48
TYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
DCP = "torch.distributed.checkpoint"
SIZE, INFO = Named("torch", "Size"), Named(f"{DCP}.filesystem", "_StorageInfo")
METADATA_CLASS, INDEX, TENSOR, ITEM, PROPERTIES, CHUNK = (
    Named(f"{DCP}.metadata", name)
    for name in (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
    )
)
DTYPES = {Named(*str(dtype).split(".")): dtype for dtype in TYPES}
# What stands there too and is not looked at: the plans that it was written by, and where it was written to.
OTHERS = {
    Named(f"{DCP}.metadata", "StorageMeta"),
    Named(f"{DCP}.metadata", "_MEM_FORMAT_ENCODING"),
    *(Named(f"{DCP}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
    Named(f"{DCP}.filesystem", "_StoragePrefix"),
    Named("torch.serialization", "_get_layout"),
    *(Named("pathlib", name) for name in ("Path", "PosixPath")),
}
NAMES = frozenset({SIZE, INFO, METADATA_CLASS, INDEX, TENSOR, ITEM, PROPERTIES, CHUNK, *DTYPES, *OTHERS})
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where torch.save's archive of one shard stands."""

    file: str  # a name without folders
    start: int
    length: int  # bytes


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the whole model, and the shards that it was saved in."""

    dtype: torch.dtype
    shape: Shape
    shards: dict[Shape, tuple[Shape, Place]]  # by the offset of each: its shape, its place


def read(folder: Path) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by their keys.

    Raises:
        CheckpointError: .metadata is missing or damaged, names what no checkpoint holds, or tells of places that are
            not in the folder's files.
    """
    path = folder / METADATA
    try:
        sizes = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
        length = sizes.pop(METADATA)
        steps = STEPS + sum(sizes.values()) // BYTES_A_STEP
        if length > BYTES * steps:
            raise Malformed(f"{length} bytes are more than these files of tensors need")
        return _tensors(inert_pickle.read(path.read_bytes(), NAMES, steps), sizes)
    except Refused as error:
        raise CheckpointError(
            f"{path}: refused, because {error}, which no checkpoint of this project does: it may be made to do harm. "
            "Get the checkpoint from where you trust it."
        ) from None
    except (KeyError, OSError, Malformed) as error:
        reason = "it is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path}: damaged or incomplete ({reason}). Copy it again.") from None


def _tensors(metadata: object, sizes: dict[str, int]) -> dict[str, StoredTensor]:
    whole = _fields(metadata, METADATA_CLASS)
    places = dict(_places(whole.get("storage_data"), sizes))
    found: dict[str, StoredTensor] = {}
    left = len(places)
    for key, stored in _pairs(whole.get("state_dict_metadata")):
        if type(stored) is Made and stored.kind == ITEM:
            continue
        fields = _fields(stored, TENSOR)
        chunks = fields.get("chunks")
        if type(chunks) is not list or len(chunks) > left:
            # One list that many tensors share would take more time than its bytes suggest.
            raise Refused(f"it tells of more shards than places, at {key[:100]!r}")
        left -= len(chunks)
        found[key] = _tensor(key, fields, chunks, places)
    return found


def _tensor(key: str, fields: dict[str, object], chunks: list, places: dict) -> StoredTensor:
    shape, shards = _shape(fields.get("size")), {}
    for chunk in chunks:
        told = _fields(chunk, CHUNK)
        at, size = _shape(told.get("offsets")), _shape(told.get("sizes"))
        if len(at) != len(shape) or len(size) != len(shape) or any(map(_is_past, at, size, shape)):
            raise Malformed(f"a shard of {key[:100]!r} is outside of the tensor")
        if (key, at) not in places:
            raise Malformed(f"a shard of {key[:100]!r} has no place")
        shards[at] = size, places[key, at]
    return StoredTensor(_dtype(fields.get("properties")), shape, shards)


def _places(storage: object, sizes: dict[str, int]) -> Iterator[tuple[tuple[str, Shape | None], Place]]:
    """Yield ((key, offset), place); the offset of what is no tensor is None."""
    if type(storage) is not Pairs:
        raise Refused(f"its places are a {type(storage).__name__}")
    for index, info in storage:
        told, place = _fields(index, INDEX), _fields(info, INFO)
        key, offset = told.get("fqn"), told.get("offset")
        file, start, length = (place.get(name) for name in ("relative_path", "offset", "length"))
        if type(key) is not str or type(file) is not str:
            raise Refused("a name in it is no text")
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise Refused(f"it tells of the file {file[:100]!r} outside of the folder")
        if place.get("transform_descriptors") is not None:
            raise Refused(f"it tells of a transformation of {file[:100]!r}")
        if not (_is_number(start) and _is_number(length) and start + length <= sizes.get(file, -1)):
            raise Malformed(f"{file[:100]} is missing, or ends before {key[:100]!r} does")
        yield (key, None if offset is None else _shape(offset)), Place(file, start, length)


def _fields(value: object, kind: Named) -> dict[str, object]:
    """The fields of a record that must be of this class."""
    if type(value) is not Made or value.kind != kind or value.arguments:
        raise Refused(f"a {kind.name} in it is something else")
    return dict(_pairs(value.state)) if value.state is not None else {}


def _pairs(value: object) -> Iterator[tuple[str, object]]:
    """The entries of a dictionary by text."""
    if type(value) is not Pairs:
        raise Refused(f"a dictionary in it is a {type(value).__name__}")
    for key, entry in value:
        if type(key) is not str:
            raise Refused(f"a dictionary in it has a key that is a {type(key).__name__}")
        yield key, entry


def _shape(value: object) -> Shape:
    if type(value) is Made and value.kind == SIZE and len(value.arguments) == 1:
        (numbers,) = value.arguments
        if type(numbers) is tuple and len(numbers) <= DIMENSIONS and all(map(_is_number, numbers)):
            return numbers
    raise Refused("a torch.Size in it is something else")


def _is_past(start: int, size: int, end: int) -> bool:
    return start + size > end


def _is_number(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < LARGEST


def _dtype(properties: object) -> torch.dtype:
    if type(properties) is Made and properties.kind == PROPERTIES and type(properties.state) is tuple:
        kind = properties.state[0] if properties.state else None
        if type(kind) is Named and kind in DTYPES:
            return DTYPES[kind]
    raise Refused("a tensor's type in it is something else")
