"""Quantised releases, turned into plain numbers as they are read.

DeepSeek-V3's weights are FP8 (e4m3) with a factor for each block of 128 x 128: next to `NAME` stands `NAME_scale_inv`,
and a number is the stored one times its block's factor (DeepSeek-V3's report, arXiv 2412.19437, section 3.3). It comes
out as bf16. Left out: activation scales, other formats (MXFP4, int4), and writing any of them.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from gspo_megatron.errors import ConversionError

SCALE = "_scale_inv"
FP8 = "F8_E4M3"


@dataclass(frozen=True)
class BlockScales:
    """How a folder's FP8 tensors are scaled."""

    rows: int  # of a block; blocks at the ends may be smaller
    columns: int

    @classmethod
    def of_folder(cls, folder: Path) -> "BlockScales | None":
        """What config.json says; None: nothing is quantised in this way.

        Raises:
            ConversionError: it is quantised in another way.
        """
        path = folder / "config.json"
        told = json.loads(path.read_text(encoding="utf-8")).get("quantization_config") if path.is_file() else None
        if told is None:
            return None
        method, block = told.get("quant_method"), told.get("weight_block_size")
        if method != "fp8" or block is None:
            raise ConversionError(
                f"{path}: quantization_config has quant_method {method!r} and weight_block_size {block}; only 'fp8' "
                "with blocks is read. Give a folder of plain weights."
            )
        return cls(*block)

    def count(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Blocks of a weight of this shape."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def blocks(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """The blocks that a part of the weight touches."""
        return (slice(rows.start // self.rows, -(-rows.stop // self.rows)),
                slice(columns.start // self.columns, -(-columns.stop // self.columns)))  # fmt: skip

    def dequantise(self, part: torch.Tensor, scales: torch.Tensor, row: int, column: int) -> torch.Tensor:
        """bf16 numbers of a part of a weight.

        Args:
            part: [r, c] float8, which begins at (row, column) of the weight.
            scales: fp32, of the blocks that it touches.
        """
        down = torch.arange(row, row + part.size(0)) // self.rows - row // self.rows
        across = torch.arange(column, column + part.size(1)) // self.columns - column // self.columns
        return (part.float() * scales.float()[down][:, across]).to(torch.bfloat16)
