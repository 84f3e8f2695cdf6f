"""A BLAKE3 hash of every tensor, beside the weights that a conversion writes: tensors.json.

Both sides of a conversion name published tensors and hash their bytes as safetensors has them, so the two files are the
same where no type is changed; and what comes out of a checkpoint is compared with what went in, because Megatron's
checkpoints have no checksums of their own. One thread hashes while another one writes; BLAKE3 takes it less than
half of SHA-256's time. The command b3sum knows it too.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from blake3 import blake3

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.safetensors import NAMES
from gspo_megatron.models.operators import Piece
from gspo_megatron.models.table import some
from gspo_megatron.utils import plain_json
from gspo_megatron.utils.file_writing import Ahead
from gspo_megatron.utils.tensor_bytes import memory

FILE = "tensors.json"
LARGEST = 1 << 28  # bytes of it; a tensor takes about 150
TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
AHEAD = 16  # tensors that may wait to be hashed, and are held meanwhile


class TensorHashes:
    """Hashes pieces as they come; those of one tensor in the order in which the tensor has them."""

    def __init__(self) -> None:
        self._calls = Ahead("hashes", AHEAD)
        self._found: dict[str, blake3] = {}
        self._told: dict[str, tuple[int, str]] = {}  # places that were hashed, type

    def add(self, piece: Piece, data: torch.Tensor) -> None:
        """Take a piece's numbers, contiguous and in the stored order of dimensions."""
        place = (piece.expert or 0) * piece.parts + piece.part
        done, _ = self._told.get(piece.tensor, (0, ""))
        assert place == done, f"{piece.tensor}: part {place} comes after {done} parts"
        self._told[piece.tensor] = (done + piece.count, str(data.dtype).removeprefix("torch."))
        found = self._found.setdefault(piece.tensor, blake3())
        self._calls.submit(_update, found, data)

    def finish(self) -> dict[str, dict[str, str]]:
        """Return {tensor: {dtype, blake3}}."""
        self._calls.finish()
        return {
            name: {"dtype": self._told[name][1], "blake3": found.hexdigest()}
            for name, found in sorted(self._found.items())
        }


def _update(found: "blake3", data: torch.Tensor) -> None:
    found.update(memory(data))  # which releases Python's lock


def content(found: dict[str, dict[str, str]]) -> bytes:
    """Return the contents of tensors.json."""
    return (json.dumps(found, indent=1) + "\n").encode()


@dataclass(frozen=True)
class Recorded:
    """What tensors.json says of one tensor."""

    dtype: torch.dtype
    blake3: str


def recorded(folder: Path) -> dict[str, Recorded]:
    """Return what the tensors.json that a folder may have says, by tensor.

    Raises:
        ConversionError: it is damaged.
    """
    path = folder / FILE
    try:
        told = plain_json.read_object(path, LARGEST)
        return {name: Recorded(TYPES[one["dtype"]], one["blake3"]) for name, one in told.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{path}: no table of hashes ({type(error).__name__}: {error}). Convert the original again, or remove the "
            "file: then nothing is compared."
        ) from None


def compare(found: dict[str, dict[str, str]], told: dict[str, Recorded], folder: Path) -> None:
    """Compare what was written with what was recorded: tensors of the same name and type must be the same.

    Args:
        folder: where the record is, for messages.

    Raises:
        ConversionError: names those that are not.
    """
    same = [(name, own) for name, own in found.items() if name in told and TYPES[own["dtype"]] is told[name].dtype]
    if wrong := [name for name, own in same if own["blake3"] != told[name].blake3]:
        raise ConversionError(
            f"{folder.parent}: {some(wrong)} not what was converted: the hash in {folder / FILE} is another one. The "
            "checkpoint is damaged. Copy it again, or convert the original again."
        )
