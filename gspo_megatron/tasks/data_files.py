"""Rows of a data set from a JSONL file, a Parquet file, or a folder that the library datasets saved.

All three give plain Python values, so one data set gives the same rows in each form; what JSON has no word for (dates,
decimals) becomes text. JSONL needs no package; pyarrow and datasets are imported where a file needs them.

Left out: compressed files, data sets of several files or splits, downloads, and any look at what columns mean
(dataset.py).
"""

import hashlib
import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from gspo_megatron.config.constraints import require
from gspo_megatron.errors import ConfigError
from gspo_megatron.utils import plain_json

BadRows = Literal["error", "drop"]
JSON_LINES = (".jsonl", ".ndjson", ".json")
LINE = 1 << 22  # bytes of a line; the longest context has some millions of characters
FOLDER_MARKS = ("state.json", "dataset_info.json")  # that save_to_disk writes beside the rows
FORM = 'Write one {"prompt": ..., "answer": ...} a line.'
KINDS = "Give a .jsonl or .parquet file, or a folder that datasets.Dataset.save_to_disk wrote."
PLAIN = (str, int, float, bool, bytes, type(None))


class BadRow(ValueError):
    """A row cannot be used; the recipe's bad_rows says what follows."""

    def __init__(self, constraint: str, remedy: str):
        super().__init__(constraint)
        self.constraint = constraint
        self.remedy = remedy

    def refuse(self, setting: str, where: str) -> None:
        """Raise the ConfigError for this row."""
        require(False, setting, where, self.constraint, self.remedy)


@dataclass(frozen=True)
class Row:
    """A row is one record of a data set."""

    where: str  # "train.jsonl, line 3", "train.parquet, row 3": for messages
    columns: dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table is what a file holds."""

    rows: list[Row]
    bad: list[str]  # one sentence a row that was left out
    digest: str  # of the bytes of the file, or of the folder's files


def read_table(path: Path, setting: str, bad_rows: BadRows, form: str = FORM, longest: int = LINE) -> Table:
    """Return every row of a data set, in its order.

    Args:
        setting: the recipe's name for the path, for messages.
        bad_rows: whether a line that is no JSON object is an error or is left out.
        form: what a line should be, for messages.
        longest: bytes of a line.

    Raises:
        ConfigError: with the file, the line where there is one, and what is wrong.
    """
    bad: list[str] = []
    with _readable(path, setting):
        digest = _digest(_files(path, setting))
        if path.is_dir():
            rows = list(_saved_rows(path, setting))
        elif path.suffix.lower() == ".parquet":
            rows = list(_parquet_rows(path, setting))
        else:
            rows, bad = _json_rows(path, setting, bad_rows, form, longest)
    check_left(len(rows), bad, path, setting, form)
    return Table(rows, bad, digest)


def count_rows(path: Path, setting: str) -> int:
    """Return how many rows a JSONL or Parquet file has, without a look at what they hold.

    Raises:
        ConfigError: it cannot be read.
    """
    with _readable(path, setting):
        if path.suffix.lower() != ".parquet":
            return sum(1 for line in _lines(path, LINE) if _text(line))
        parquet = _package("pyarrow.parquet", path, setting)
        with _undamaged(path, setting):
            return int(parquet.ParquetFile(path).metadata.num_rows)


def first_row(path: Path, setting: str, form: str, longest: int) -> Row:
    """Return the first row of a JSONL or Parquet file that has one. Arguments and errors are those of read_table."""
    with _readable(path, setting):
        if path.suffix.lower() == ".parquet":
            return next(_parquet_rows(path, setting))
        return _json_rows(path, setting, "error", form, longest, most=1)[0][0]


@contextmanager
def _readable(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        require(False, setting, str(path), (error.strerror or str(error)).lower(), f"{KINDS} Nothing is downloaded.")


def check_left(count: int, bad: list[str], path: Path, setting: str, remedy: str) -> None:
    """Raise ConfigError where a file has no row, or none that can be used."""
    constraint = f"none of its {len(bad)} rows can be used, the first is {bad[0]}" if bad else "holds no row"
    require(count > 0, setting, str(path), constraint, remedy)


def shortened(value: Any) -> str:
    """Return a value as it is written in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _files(path: Path, setting: str) -> list[Path]:
    """The files that the rows are in. Raises ConfigError for what is no data set."""
    if not path.is_dir():
        known = path.suffix.lower() in (*JSON_LINES, ".parquet")
        require(known or not path.exists(), setting, str(path), f"has the unknown suffix {path.suffix!r}", KINDS)
        return [path]
    splits = path / "dataset_dict.json"
    if splits.exists():
        names = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        given = " or ".join(str(path / name) for name in names)
        require(False, setting, str(path), f"holds several data sets: {', '.join(names)}", f"Give {given}.")
    is_saved = all((path / mark).exists() for mark in FOLDER_MARKS)
    require(is_saved, setting, str(path), "is a folder without a data set", KINDS)
    # What `map` and `filter` leave behind there is no part of the data.
    return sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("cache-"))


def _digest(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _json_rows(
    path: Path, setting: str, bad_rows: BadRows, form: str, longest: int, most: int | None = None
) -> tuple[list[Row], list[str]]:
    rows: list[Row] = []
    bad: list[str] = []
    for number, line in enumerate(_lines(path, longest), 1):
        if len(rows) == most:
            break
        if text := _text(line):
            is_array = not rows and not bad and text.startswith(b"[")
            require(not is_array, setting, str(path), "begins as a JSON array", "Write one object a line.")
            where = f"{path}, line {number}"
            try:
                rows.append(Row(where, _record(line, form, longest)))
            except BadRow as error:
                if bad_rows == "error":
                    error.refuse(setting, where)
                bad.append(f"{where}: {error}")
    return rows, bad


def _lines(path: Path, longest: int) -> Iterator[bytes]:
    """The lines of a file. Of one that is too long no more is held than shows that."""
    with path.open("rb") as file:
        while line := file.readline(longest + 1):
            yield line
            while len(line) > longest and not line.endswith(b"\n"):
                line = file.readline(longest + 1)


def _text(line: bytes) -> bytes:
    """What stands in a line, b"" where it is empty."""
    return line.removeprefix(b"\xef\xbb\xbf").strip()


def _record(line: bytes, form: str, longest: int) -> dict[str, Any]:
    try:
        record = plain_json.parse(line, longest)
    except ValueError as error:
        raise BadRow(f"not valid JSON ({error})", form) from None
    if not isinstance(record, dict):
        raise BadRow(f"holds {shortened(record)}, must be a JSON object", form)
    # Python's reader takes these words, which JSON does not have; a text may well hold them.
    if (b"NaN" in line or b"Infinity" in line) and not _is_finite(record):
        raise BadRow("holds NaN or Infinity, which JSON does not have", "Write null.")
    return record


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    if isinstance(value, list):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def _parquet_rows(path: Path, setting: str) -> Iterator[Row]:
    parquet = _package("pyarrow.parquet", path, setting)
    return _arrow_rows(path, setting, lambda: parquet.ParquetFile(path).iter_batches(1000))


def _saved_rows(path: Path, setting: str) -> Iterator[Row]:
    datasets = _package("datasets", path, setting)
    # In Arrow's own form, whatever form the data set was saved to be read in; pictures stay bytes.
    return _arrow_rows(path, setting, lambda: datasets.load_from_disk(str(path)).with_format("arrow").iter(1000))


def _package(name: str, path: Path, setting: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        remedy = f"pip install 'gspo-megatron[data]', or write the rows as JSONL ({error})."
        raise ConfigError(
            f"{setting} = {str(path)!r}: is read by the package {package}, which cannot be imported. {remedy}"
        ) from error


def _arrow_rows(path: Path, setting: str, batches: Callable[[], Any]) -> Iterator[Row]:
    number = 0
    with _undamaged(path, setting):
        for batch in batches():
            for columns in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", _plain(columns))


@contextmanager
def _undamaged(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of damaged files; other packages raise many types
        reason = f"cannot be read ({type(error).__name__}: {shortened(str(error))})"
        require(False, setting, str(path), reason, "It may be damaged: write it again.")


def _plain(value: Any) -> Any:
    """The value without the types of pandas and numpy."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value)  # dates, times, decimals
