"""Reads folders of safetensors files by slices. (Written by safetensors_writer.py.)

FP8 with block scales and MXFP4 are read as bf16 (quantised.py). Left out: other quantised types (integers are refused
by name).
"""

from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.quantised import (
    BLOCKS,
    EXPONENTS,
    FP8,
    PLAIN_SCALES,
    SCALE,
    SCALES,
    BlockScales,
    Mxfp4,
    of_folder,
)
from gspo_megatron.models.operators import Piece
from gspo_megatron.models.table import some
from gspo_megatron.utils import plain_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
INDEX_BYTES = 1 << 26  # of an index; that of 100,000 tensors has 10 MB
DIMENSIONS = 8
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
        self._quantised = of_folder(self.folder)
        self._home = self._indexed() if (self.folder / INDEX).is_file() else self._of_file(SINGLE)

    @property
    def names(self) -> set[str]:
        """Return the tensors' names; a quantised one has its own alone, without those of scales and blocks."""
        if isinstance(self._quantised, BlockScales):
            return {n for n in self._home if not (n.endswith(SCALE) and n.removesuffix(SCALE) in self._home)}
        if isinstance(self._quantised, Mxfp4):
            blocked = {name.removesuffix(BLOCKS) for name in self._home if name.endswith(BLOCKS)}
            return self._home.keys() - {name + part for name in blocked for part in (BLOCKS, SCALES)} | blocked
        return set(self._home)

    def _scales_of_fp8(self, name: str) -> BlockScales | None:
        """How a tensor is scaled, None where it is not FP8.

        Raises:
            ConversionError: its scales are missing or of another shape.
        """
        if not isinstance(self._quantised, BlockScales) or self._slice(name).get_dtype() != FP8:
            return None
        file = self.folder / self._home[name]
        if name + SCALE not in self._home:
            raise ConversionError(f"{file}: {name} is {FP8} and has no {name + SCALE}. Download the folder again.")
        kind = self._slice(name + SCALE).get_dtype()
        if kind not in (*PLAIN_SCALES, *EXPONENTS) or len(self.shape(name)) != 2:
            raise ConversionError(
                f"{file}: {name} is {FP8} of shape {list(self.shape(name))} with {name + SCALE} of type {kind}; only "
                f"matrices with factors in one of {', '.join((*PLAIN_SCALES, *EXPONENTS))} are read. Give a folder of "
                "plain weights."
            )
        found, wanted = self.shape(name + SCALE), self._quantised.count(self.shape(name))
        if found != wanted:
            raise ConversionError(
                f"{file}: {name + SCALE} has shape {list(found)}, and blocks of {self._quantised.rows} x "
                f"{self._quantised.columns} make it {list(wanted)}. Correct weight_block_size in config.json."
            )
        return self._quantised

    def _is_mxfp4(self, name: str) -> bool:
        """Raises ConversionError where its scales are missing, or one of the two is of another shape or type."""
        if not isinstance(self._quantised, Mxfp4) or name + BLOCKS not in self._home:
            return False
        file = self.folder / self._home[name + BLOCKS]
        if name + SCALES not in self._home:
            raise ConversionError(f"{file}: {name + BLOCKS} has no {name + SCALES}. Download the folder again.")
        blocks, scales = self._slice(name + BLOCKS), self._slice(name + SCALES)
        shapes = blocks.get_shape(), scales.get_shape()
        if shapes[0] != [*shapes[1], Mxfp4.BYTES] or {blocks.get_dtype(), scales.get_dtype()} != {"U8"}:
            raise ConversionError(
                f"{file}: {name + BLOCKS} {blocks.get_dtype()} {shapes[0]} and {name + SCALES} {scales.get_dtype()} "
                f"{shapes[1]} are not bytes in blocks of {Mxfp4.BYTES}. Download the folder again."
            )
        return True

    def _of_file(self, file: str) -> dict[str, str]:
        path = self.folder / file
        if not path.is_file():
            raise ConversionError(f"{path}: no such file. Give a folder that has it, or all the files of {INDEX}.")
        try:
            self._files[file] = safe_open(path, "pt")
        except (SafetensorError, OSError, ValueError) as error:
            raise ConversionError(f"{path}: damaged or cut short ({error!s:.200}). Download it again.") from None
        return dict.fromkeys(self._files[file].keys(), file)

    def _indexed(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            listed = _weight_map(plain_json.read_object(path, INDEX_BYTES))
        except (OSError, ValueError) as error:
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
        """Return the shape as read. Raises ConversionError for one of more dimensions than any weight has."""
        if self._is_mxfp4(name):
            return Mxfp4.shape(*self._slice(name + SCALES).get_shape())
        found = tuple(self._slice(name).get_shape())
        if len(found) > DIMENSIONS:
            raise ConversionError(
                f"{self.folder / self._home[name]}: {some([name])} has {len(found)} dimensions, and no weight has more "
                f"than {DIMENSIONS}. Download it again."
            )
        return found

    def dtype(self, name: str) -> torch.dtype:
        """Return the type as read. Raises ConversionError for one that holds no plain floating-point numbers."""
        if self._is_mxfp4(name) or self._scales_of_fp8(name) is not None:
            return torch.bfloat16
        kind = self._slice(name).get_dtype()
        if kind not in TYPES:
            raise ConversionError(
                f"{self.folder / self._home[name]}: {name} has type {kind}, and quantised tensors are not supported. "
                f"Give a folder in one of: {', '.join(TYPES)}."
            )
        return TYPES[kind]

    def read(self, piece: Piece, cut_dim: int | None = None, rank: int = 0, cuts: int = 1) -> torch.Tensor:
        """Read one of `cuts` equal slices of a piece along cut_dim, and nothing else from the disk."""
        shape = self.shape(piece.tensor)[piece.expert is not None :]
        shape = shape[::-1] if piece.transposed else shape
        bounds = [(0, size) for size in shape]
        bounds[0] = _share(bounds[0], piece.part, piece.parts, piece.count)
        if cut_dim is not None and cuts > 1:
            bounds[cut_dim] = _share(bounds[cut_dim], rank, cuts)
        where = tuple(slice(*bound) for bound in bounds)
        where, expert = where[::-1] if piece.transposed else where, () if piece.expert is None else (piece.expert,)
        try:
            found = self._part(piece.tensor, (*expert, *where))
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{self.folder}: cannot read {piece.tensor} ({error}). Download it again.") from None
        except ConversionError as error:
            raise ConversionError(f"{self.folder / self._home_of(piece.tensor)}: {piece.tensor}: {error}.") from None
        return found.t() if piece.transposed else found

    def _part(self, name: str, where: tuple) -> torch.Tensor:
        """What stands in this part of the tensor, in its own order of dimensions."""
        if self._is_mxfp4(name):
            expert, columns, rows = where
            blocks = Mxfp4.blocks(columns)
            stored = (self._slice(name + part)[expert, rows, blocks] for part in (BLOCKS, SCALES))
            first = columns.start - blocks.start * Mxfp4.NUMBERS
            return Mxfp4.dequantise(*stored)[:, first : first + columns.stop - columns.start].t()
        stored = self._slice(name)
        scaling = self._scales_of_fp8(name)
        if scaling is None:
            return stored[where]
        scales = self._slice(name + SCALE)[scaling.blocks(*where)]
        if scales.dtype is torch.float8_e8m0fnu:
            scales = scales.view(torch.uint8)
        return scaling.dequantise(stored[where], scales, where[0].start, where[1].start)

    def whole(self, name: str) -> torch.Tensor:
        return self.read(Piece(name))

    def _home_of(self, name: str) -> str:
        return self._home[name + BLOCKS if self._is_mxfp4(name) else name]

    def _slice(self, name: str):
        return self._files[self._home[name]].get_slice(name)


def _weight_map(index: dict) -> dict[str, str]:
    """{tensor: file} of an index. Raises ValueError where it is none, or names a file outside of the folder."""
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError("it has no weight_map")
    for name, file in listed.items():
        if not isinstance(file, str):
            raise ValueError(f"weight_map gives {some([name])} the file {file!r:.100}, must be text")
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts or not file.isprintable() or path.suffix != ".safetensors":
            raise ValueError(f"weight_map gives {some([name])} the file {file[:200]!r}, must be in the folder")
    return listed


def _share(bound: tuple[int, int], index: int, parts: int, count: int = 1) -> tuple[int, int]:
    step = (bound[1] - bound[0]) // parts
    return bound[0] + index * step, bound[0] + (index + count) * step
