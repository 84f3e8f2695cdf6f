"""Writes folders of safetensors files tensor by tensor, in any order.

The format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, begin and end of its bytes), then
the bytes. A writer therefore knows every file's layout from names, shapes and types alone: it writes headers first and
each tensor, or a part of its rows, to its place. Nothing is held in memory, and the folder gets its name at the end.
"""

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

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.operators import Piece
from gspo_megatron.hf.safetensors import INDEX, NAMES, SINGLE
from gspo_megatron.hf.table import some
from gspo_megatron.tensor_bytes import memory, write_all


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
        write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)

    def _write_index(self) -> None:
        weight_map = {name: file for name, (file, _) in self._place.items()}
        total = sum(spec.size for spec in self._specs.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (self.unfinished / INDEX).write_text(text + "\n", encoding="utf-8")

    def write(self, piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
        """A piece's numbers, in full; cast to the type that was announced. Returns what was written.

        Raises:
            ConversionError: its place was written before, its shape is another than announced, or the disk is full.
        """
        spec = self._specs[piece.tensor]
        shape = spec.shape[piece.expert is not None :]
        shape = (shape[0] * piece.count // piece.parts, *shape[1:])
        tensor = tensor.t() if piece.transposed else tensor
        place = (piece.expert, piece.part)
        if tuple(tensor.shape) != shape:
            raise ConversionError(f"{piece.tensor}: has shape {tuple(tensor.shape)}, where {shape} was announced.")
        if place in self._written[spec.name]:
            raise ConversionError(f"{piece.tensor}: written twice.")
        self._written[spec.name].add(place)
        data = tensor.detach().to("cpu", spec.dtype).contiguous()
        file, start = self._place[spec.name]
        offset = start + ((piece.expert or 0) * piece.parts + piece.part) * data.nbytes // piece.count
        try:
            write_all(self._open[file], memory(data), offset)
        except OSError as error:
            raise _cannot_write(self.unfinished / file, error) from None
        self._left[spec.name] -= data.nbytes
        return data

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


def _cannot_write(path: Path, error: OSError) -> ConversionError:
    reason = "the disk is full" if error.errno == errno.ENOSPC else (error.strerror or str(error)).lower()
    return ConversionError(f"{path}: cannot be written, {reason}. Nothing was left behind; give another folder.")
