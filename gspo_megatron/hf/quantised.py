"""Quantised releases, turned into plain numbers as they are read.

DeepSeek-V3's weights are FP8 (e4m3) with a factor for each block of 128 x 128: next to `NAME` stands `NAME_scale_inv`,
and a number is the stored one times its block's factor (DeepSeek-V3's report, arXiv 2412.19437, section 3.3). Later
releases store the factors as exponents alone: UE8M0, a byte e that means 2^(e - 127), where 255 is no number (OCP
Microscaling Formats, version 1.0, section 5.4.1).

GPT-OSS's experts are MXFP4 (OCP Microscaling Formats, version 1.0, sections 5.3 and 5.4): `NAME_blocks` has blocks of
32 numbers e2m1, two in a byte with the first one low, and `NAME_scales` a power of two for each block.

All come out as bf16, MXFP4 without any rounding. Left out: activation scales, other formats (int4, NVFP4), and writing
any of them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from gspo_megatron.errors import ConversionError
from gspo_megatron.utils import plain_json

SCALE = "_scale_inv"
FP8 = "F8_E4M3"
PLAIN_SCALES, EXPONENTS = ("F32", "BF16", "F16"), ("U8", "F8_E8M0")  # types that factors have in a file
NO_NUMBER = 255  # of UE8M0
BLOCKS, SCALES = "_blocks", "_scales"  # of MXFP4
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits; the fourth is the sign


@dataclass(frozen=True)
class BlockScales:
    """How a folder's FP8 tensors are scaled."""

    rows: int  # of a block; blocks at the ends may be smaller
    columns: int

    def count(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Count the blocks of a weight of this shape."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)

    def blocks(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """The blocks that a part of the weight touches."""
        return (
            slice(rows.start // self.rows, -(-rows.stop // self.rows)),
            slice(columns.start // self.columns, -(-columns.stop // self.columns)),
        )

    def dequantise(self, part: torch.Tensor, scales: torch.Tensor, row: int, column: int) -> torch.Tensor:
        """Return bf16 numbers of a part of a weight.

        Args:
            part: [r, c] float8, which begins at (row, column) of the weight.
            scales: of the blocks that it touches: floating point, or uint8 exponents.
        """
        if scales.dtype is torch.uint8:
            scales = powers_of_two(scales)
        down = torch.arange(row, row + part.size(0)) // self.rows - row // self.rows
        across = torch.arange(column, column + part.size(1)) // self.columns - column // self.columns
        return (part.float() * scales.float()[down][:, across]).to(torch.bfloat16)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Return what UE8M0 bytes mean, uint8 -> fp32. Raises ConversionError where one means no number."""
    if bool((exponents == NO_NUMBER).any()):
        raise ConversionError(f"a block's factor is no number (UE8M0 {NO_NUMBER}). Download the folder again")
    return exponents.view(torch.float8_e8m0fnu).float()


class Mxfp4:
    """How experts' weights [experts, rows, columns] are stored: columns in blocks. As a tensor of the folder they are
    [experts, columns, rows], which is how transformers saves them in bf16."""

    NUMBERS, BYTES = 32, 16  # of a block

    @classmethod
    def shape(cls, experts: int, rows: int, blocks: int) -> tuple[int, int, int]:
        """Return the folder's shape of a tensor, from the shape of its scales."""
        return experts, blocks * cls.NUMBERS, rows

    @classmethod
    def blocks(cls, columns: slice) -> slice:
        """The blocks that a part of the columns touches."""
        return slice(columns.start // cls.NUMBERS, -(-columns.stop // cls.NUMBERS))

    @classmethod
    def dequantise(cls, blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return plain numbers: blocks [r, b, 16] uint8, scales [r, b] uint8 -> [r, 32 b] bf16."""
        values = torch.tensor([*E2M1, *(-value for value in E2M1)])
        pairs = torch.stack([blocks & 0x0F, blocks >> 4], -1).flatten(-2)  # [r, b, 32]
        numbers = values[pairs.int()] * powers_of_two(scales).unsqueeze(-1)
        return numbers.flatten(-2).to(torch.bfloat16)


def of_folder(folder: Path) -> BlockScales | Mxfp4 | None:
    """Read what config.json says; None: nothing is quantised.

    Raises:
        ConversionError: it is quantised in a way that is not read here.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        told = plain_json.read_object(path).get("quantization_config")
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({error}). Download it again.") from None
    if told is None:
        return None
    if not isinstance(told, dict):
        raise ConversionError(f"{path}: quantization_config is a {type(told).__name__}, must be a table. Correct it.")
    method, block = told.get("quant_method"), told.get("weight_block_size")
    if method == "mxfp4":
        return Mxfp4()
    if method != "fp8" or block is None:
        raise ConversionError(
            f"{path}: quantization_config has quant_method {method!r} and weight_block_size {block}; only 'fp8' with "
            "blocks and 'mxfp4' are read. Give a folder of plain weights."
        )
    match block:
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return BlockScales(rows, columns)
    raise ConversionError(f"{path}: weight_block_size = {block!r:.100} must be two numbers above 0. Correct it.")
