"""Folders of safetensors files: read by slices, written tensor by tensor in any order.

The format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, begin and end of its bytes), then
the bytes. A writer therefore knows every file's layout from names, shapes and types alone: it writes headers first and
each tensor, or a part of its rows, to its place. Nothing is held in memory, and the folder gets its name at the end.

FP8 with block scales is read as bf16 (quantised.py). Left out: other quantised types (MXFP4 blocks and integers are
refused by name).
"""

import ctypes
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.operators import Piece
from gspo_megatron.hf.quantised import FP8, SCALE, BlockScales
from gspo_megatron.hf.table import some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NAMES = {dtype: name for name, dtype in TYPES.items()}


class SafetensorsFolder:
    """The tensors of a folder, by name. Only headers are read at first.

    Raises:
        ConversionError: there is no safetensors file, the index is wrong, or a file is missing, damaged or cut short.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._files: dict[str, safe_open] = {}
        self._scales = BlockScales.of_folder(self.folder)
        self._home = self._indexed() if (self.folder / INDEX).is_file() else self._of_file(SINGLE)

    @property
    def names(self) -> set[str]:
        """Without the scales of quantised tensors."""
        return {name for name in self._home if not self._is_scale(name)}

    def _is_scale(self, name: str) -> bool:
        return self._scales is not None and name.endswith(SCALE) and name.removesuffix(SCALE) in self._home

    def _is_quantised(self, name: str) -> bool:
        """Raises ConversionError where its scales are missing or of another shape."""
        if self._slice(name).get_dtype() != FP8 or self._scales is None:
            return False
        file = self.folder / self._home[name]
        if name + SCALE not in self._home:
            raise ConversionError(f"{file}: {name} is {FP8} and has no {name + SCALE}. Download the folder again.")
        found, wanted = self.shape(name + SCALE), self._scales.count(self.shape(name))
        if found != wanted:
            raise ConversionError(
                f"{file}: {name + SCALE} has shape {list(found)}, and blocks of {self._scales.rows} x "
                f"{self._scales.columns} make it {list(wanted)}. Correct weight_block_size in config.json."
            )
        return True

    def _of_file(self, file: str) -> dict[str, str]:
        path = self.folder / file
        if not path.is_file():
            raise ConversionError(f"{path}: no such file. Give a folder that has it, or all the files of {INDEX}.")
        try:
            self._files[file] = safe_open(path, "pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{path}: damaged or cut short ({error}). Download it again.") from None
        return dict.fromkeys(self._files[file].keys(), file)

    def _indexed(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            listed = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConversionError(f"{path}: no index of safetensors files ({error}). Download it again.") from None
        found: dict[str, str] = {}
        for file in sorted(set(listed.values())):
            here = self._of_file(file)
            if twice := here.keys() & found.keys():
                raise ConversionError(f"{self.folder / file}: {some(twice)} also in another file. Keep one of them.")
            found |= here
        if lost := {name for name, file in listed.items() if found.get(name) != file}:
            raise ConversionError(f"{path}: {some(lost)} not in the file that it names. Download the folder again.")
        if unlisted := found.keys() - listed.keys():
            raise ConversionError(f"{path}: {some(unlisted)} in the files but not listed. Download the folder again.")
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Raises ConversionError for a type that holds no plain floating-point numbers."""
        kind = self._slice(name).get_dtype()
        if self._is_quantised(name):
            return torch.bfloat16
        if kind not in TYPES:
            raise ConversionError(
                f"{self.folder / self._home[name]}: {name} has type {kind}, and quantised tensors are not supported. "
                f"Give a folder in one of: {', '.join(TYPES)}."
            )
        return TYPES[kind]

    def read(self, piece: Piece, cut_dim: int | None = None, rank: int = 0, cuts: int = 1) -> torch.Tensor:
        """One of `cuts` equal slices of a piece along cut_dim; nothing else is read from the disk."""
        stored = self._slice(piece.tensor)
        shape = stored.get_shape()[piece.expert is not None :]
        bounds = [(0, size) for size in shape]
        bounds[0] = _share(bounds[0], piece.part, piece.parts)
        if cut_dim is not None and cuts > 1:
            bounds[cut_dim] = _share(bounds[cut_dim], rank, cuts)
        where = tuple(slice(*bound) for bound in bounds)
        try:
            if self._is_quantised(piece.tensor):
                scales = self._slice(piece.tensor + SCALE)[self._scales.blocks(*where)]
                return self._scales.dequantise(stored[where], scales, where[0].start, where[1].start)
            return stored[where if piece.expert is None else (piece.expert, *where)]
        except (SafetensorError, OSError) as error:
            file = self.folder / self._home[piece.tensor]
            raise ConversionError(f"{file}: cannot read {piece.tensor} ({error}). Download it again.") from None

    def whole(self, name: str) -> torch.Tensor:
        return self.read(Piece(name))

    def _slice(self, name: str):
        return self._files[self._home[name]].get_slice(name)


def _share(bound: tuple[int, int], index: int, count: int) -> tuple[int, int]:
    step = (bound[1] - bound[0]) // count
    return bound[0] + index * step, bound[0] + (index + 1) * step


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes a folder that appears under its name when `finish` is called, and not at all after an error.

        with SafetensorsWriter(folder, specs, max_shard_size) as writer:
            writer.write(piece, tensor)
            writer.finish()

    Args:
        folder: must not exist yet.
        specs: every tensor, in the order of the files.
        max_shard_size: bytes of a file, unless one tensor alone is larger.

    Raises:
        ConversionError: the folder exists, or a file cannot be written (for example because the disk is full).
    """

    def __init__(self, folder: Path, specs: Iterable[TensorSpec], max_shard_size: int):
        self.folder = Path(folder)
        if self.folder.exists():
            raise ConversionError(f"{self.folder}: exists already. Give another folder, or remove it.")
        self.unfinished = self.folder.with_name(self.folder.name + ".unfinished")
        self._specs = {spec.name: spec for spec in specs}
        self._written: dict[str, set[tuple[int | None, int]]] = {name: set() for name in self._specs}
        self._left = {name: spec.size for name, spec in self._specs.items()}
        self._place: dict[str, tuple[str, int]] = {}  # name -> file, first byte
        self._open: dict[str, int] = {}
        try:
            shutil.rmtree(self.unfinished, ignore_errors=True)
            self.unfinished.mkdir(parents=True)
            shards = _shards(self._specs.values(), max_shard_size)
            for number, shard in enumerate(shards, 1):
                file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
                self._start(file, shard)
            if len(shards) > 1:
                self._write_index()
        except OSError as error:
            self.abandon()
            raise _cannot_write(self.unfinished, error) from None

    def _start(self, file: str, specs: list[TensorSpec]) -> None:
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for spec in specs:
            offsets = [end, end + spec.size]
            header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
            end += spec.size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the first tensor is aligned
        start = 8 + len(text)
        for spec in specs:
            self._place[spec.name] = (file, start + header[spec.name]["data_offsets"][0])
        descriptor = self._open[file] = os.open(self.unfinished / file, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        os.posix_fallocate(descriptor, 0, start + end)  # a disk that is too small is found out here
        _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)

    def _write_index(self) -> None:
        weight_map = {name: file for name, (file, _) in self._place.items()}
        total = sum(spec.size for spec in self._specs.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (self.unfinished / INDEX).write_text(text + "\n", encoding="utf-8")

    def write(self, piece: Piece, tensor: torch.Tensor) -> None:
        """A piece's numbers, in full; cast to the type that was announced.

        Raises:
            ConversionError: its place was written before, its shape is another than announced, or the disk is full.
        """
        spec = self._specs[piece.tensor]
        shape = spec.shape[piece.expert is not None :]
        shape = (shape[0] // piece.parts, *shape[1:])
        place = (piece.expert, piece.part)
        if tuple(tensor.shape) != shape:
            raise ConversionError(f"{piece.tensor}: has shape {tuple(tensor.shape)}, where {shape} was announced.")
        if place in self._written[spec.name]:
            raise ConversionError(f"{piece.tensor}: written twice.")
        self._written[spec.name].add(place)
        data = tensor.detach().to("cpu", spec.dtype).contiguous()
        file, start = self._place[spec.name]
        offset = start + ((piece.expert or 0) * piece.parts + piece.part) * data.nbytes
        try:
            # Its bytes in place. numpy() would forbid for ever to release the tensor's memory.
            _write_all(self._open[file], (ctypes.c_char * data.nbytes).from_address(data.data_ptr()), offset)
        except OSError as error:
            raise _cannot_write(self.unfinished / file, error) from None
        self._left[spec.name] -= data.nbytes

    def add(self, file: str, content: bytes) -> None:
        """A small file beside the tensors. Raises ConversionError where it cannot be written."""
        try:
            (self.unfinished / file).write_bytes(content)
        except OSError as error:
            raise _cannot_write(self.unfinished / file, error) from None

    def finish(self) -> None:
        """Give the folder its name.

        Raises:
            ConversionError: a tensor was not written in full, or a file could not be written.
        """
        if missing := [name for name, left in self._left.items() if left]:
            raise ConversionError(f"{self.folder}: {some(missing)} not written in full.")
        try:
            for descriptor in self._open.values():
                os.fsync(descriptor)
            self._close()
            os.rename(self.unfinished, self.folder)
        except OSError as error:
            raise _cannot_write(self.folder, error) from None

    def abandon(self) -> None:
        """Close and remove what there is."""
        self._close()
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open = {}

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.abandon()  # after finish() there is nothing left to remove


def _shards(specs: Iterable[TensorSpec], limit: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.size
    return shards


def _write_all(descriptor: int, data: bytes | ctypes.Array, offset: int) -> None:
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _cannot_write(path: Path, error: OSError) -> ConversionError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
    return ConversionError(f"{path}: cannot be written, {reason}. Nothing was left behind; give another folder.")
