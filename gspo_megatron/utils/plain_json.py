"""JSON from files of others is read within limits, and what is wrong with it is said in a few words."""

import json
from pathlib import Path
from typing import Any

LARGEST = 1 << 24  # bytes of a file, or of one line of a JSONL file; a config.json has some thousands


def parse(data: bytes, largest: int = LARGEST) -> Any:
    """Return what JSON text in UTF-8 says; a byte-order mark may stand before it, as some editors write.

    Raises:
        ValueError: says why it is none: too large, nested too deep, not UTF-8, a number of thousands of digits.
    """
    if len(data) > largest:
        raise ValueError(f"over {largest >> 20} MB, which is more than is read")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_object(path: Path, largest: int = LARGEST) -> dict:
    """Return the JSON object that a file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: as parse(), or it holds something else than an object.
    """
    with path.open("rb") as file:
        value = parse(file.read(largest + 1), largest)  # of a larger one no more is held
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, must be a JSON object")
    return value
