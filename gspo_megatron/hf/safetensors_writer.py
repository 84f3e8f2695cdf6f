"""Writes folders of safetensors files tensor by tensor, in any order.

The format: 8 bytes with the header's length, the header (JSON: name -> dtype, shape, begin and end of its bytes), then
the bytes. A writer therefore knows every file's layout from names, shapes and types alone: it writes headers first and
each tensor, or a part of its rows, to its place. Few tensors are held in memory. The folder gets its name at the end.
"""

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.safetensors import INDEX, NAMES, SINGLE
from gspo_megatron.models.operators import Piece
from gspo_megatron.models.table import some
from gspo_megatron.utils import halves
from gspo_megatron.utils.file_writing import FileWriter, reported


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Return the bytes that it takes."""
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
        share: the tensors that this process writes; None: all of them.
        is_first: this process makes the folder and its files, before the others come, and gives it its name.

    Raises:
        ConversionError: the folder exists, or a file cannot be written (for example because the disk is full).
    """

    def __init__(
        self,
        folder: Path,
        specs: Iterable[TensorSpec],
        max_shard_size: int,
        share: Collection[str] | None = None,
        is_first: bool = True,
    ):
        self.folder, self._is_first = Path(folder), is_first
        if self.folder.exists():
            raise ConversionError(f"{self.folder}: exists already. Give another folder, or remove it.")
        self.unfinished = self.folder.with_name(self.folder.name + ".unfinished")
        self._specs = {spec.name: spec for spec in specs}
        self._written: dict[str, set[tuple[int | None, int]]] = {name: set() for name in self._specs}
        self._left = {name: spec.size for name, spec in self._specs.items() if share is None or name in share}
        self._place: dict[str, tuple[str, int]] = {}  # name -> file, first byte
        self._files = FileWriter(self.unfinished)
        try:
            with reported(self.folder):
                self._lay_out(_shards(self._specs.values(), max_shard_size))
        except ConversionError:
            self.abandon()
            raise

    def _lay_out(self, shards: list[list[TensorSpec]]) -> None:
        if self._is_first:
            halves.begin(self.unfinished)
        for number, shard in enumerate(shards, 1):
            file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._start(file, shard)
        if self._is_first and len(shards) > 1:
            self._write_index()

    def _start(self, file: str, specs: list[TensorSpec]) -> None:
        header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
        end = 0
        for spec in specs:
            offsets = [end, end + spec.size]
            header[spec.name] = {"dtype": NAMES[spec.dtype], "shape": spec.shape, "data_offsets": offsets}
            end += spec.size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the first tensor is aligned
        start = 8 + len(text)
        for spec in specs:
            self._place[spec.name] = (file, start + header[spec.name]["data_offsets"][0])
        if not self._is_first:
            self._files.join(file)
            return
        self._files.create(file, start + end)
        self._files.write(file, [len(text).to_bytes(8, "little") + text], 0)

    def _write_index(self) -> None:
        weight_map = {name: file for name, (file, _) in self._place.items()}
        total = sum(spec.size for spec in self._specs.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
        (self.unfinished / INDEX).write_text(text + "\n", encoding="utf-8")

    def write(self, piece: Piece, tensor: torch.Tensor) -> torch.Tensor:
        """Write a piece's numbers, in full, cast to the type that was announced. Returns what was written.

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
        with reported(self.folder):
            self._files.write(file, [data], offset)
        self._left[spec.name] -= data.nbytes
        return data

    def add(self, file: str, content: bytes) -> None:
        """Add a small file beside the tensors. Raises ConversionError where it cannot be written."""
        with reported(self.folder):
            (self.unfinished / file).parent.mkdir(exist_ok=True)
            (self.unfinished / file).write_bytes(content)

    def complete(self) -> None:
        """Wait until all that this process writes is on the disk.

        Raises:
            ConversionError: a tensor was not written in full, or a file could not be written.
        """
        if missing := [name for name, left in self._left.items() if left]:
            raise ConversionError(f"{self.folder}: {some(missing)} not written in full.")
        with reported(self.folder):
            self._files.finish()

    def make_visible(self) -> None:
        """Give the folder its name, once every process has completed. Raises ConversionError where that fails."""
        with reported(self.folder):
            halves.publish(self.unfinished, self.folder)

    def finish(self) -> None:
        """Complete and publish, for one process."""
        self.complete()
        self.make_visible()

    def abandon(self) -> None:
        """Close and, if this process made the folder, remove what there is."""
        self._files.abandon()
        if self._is_first:
            halves.discard(self.unfinished)

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
