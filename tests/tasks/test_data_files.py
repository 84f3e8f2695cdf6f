"""Data files: three kinds give the same rows, and every way in which a file can be wrong is named."""

import datetime
import decimal
import hashlib
import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from gspo_megatron.errors import ConfigError
from gspo_megatron.tasks.data_files import LINE, Table, read_table
from tests.processes import imported_by

SETTING = "tasks.gsm8k.data"
ROWS = [
    {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "4", "level": 1, "extra": {"tags": ["a", "b"]}},
    {"prompt": [{"role": "user", "content": "é\u2028?"}], "answer": None, "level": 2, "extra": {"tags": []}},
]


@pytest.fixture(autouse=True)
def quiet():
    datasets.disable_progress_bars()


def lines(path: Path, *given: str | bytes) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in given))
    return path


def saved(folder: Path, rows: list[dict]) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))
    return folder


def written(path: Path, rows: list[dict]) -> Path:
    """Rows in the form that the path's suffix says."""
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    return saved(path, rows) if path.suffix == "" else lines(path, *map(json.dumps, rows))


def columns(table: Table) -> list[dict]:
    return [row.columns for row in table.rows]


@pytest.mark.parametrize(
    ("name", "second"),
    [("a.jsonl", "line 2"), ("a.json", "line 2"), ("a.ndjson", "line 2"), ("a.PARQUET", "row 2"), ("folder", "row 2")],
)
def test_all_kinds_of_files_give_the_same_rows(tmp_path, name, second):
    path = written(tmp_path / name.lower(), ROWS).rename(tmp_path / name)
    table = read_table(path, SETTING, "error")
    assert columns(table) == ROWS and table.bad == []
    assert table.rows[1].where == f"{path}, {second}"


def test_a_file_as_people_write_it(tmp_path):
    """Byte-order mark, CRLF, empty lines, no newline at the end; places are counted with the empty lines."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n \n{"prompt": "NaN, Infinity"}')
    table = read_table(path, SETTING, "error")
    assert columns(table) == [{"prompt": "a"}, {"prompt": "NaN, Infinity"}]
    assert [row.where for row in table.rows] == [f"{path}, line 1", f"{path}, line 4"]


def test_values_of_arrow_become_plain(tmp_path):
    """Dates and decimals are text; nanoseconds, which pyarrow hands out as pandas' Timestamp, too."""
    path = tmp_path / "a.parquet"
    day = datetime.datetime(2024, 5, 6)
    table = pyarrow.table(
        {
            "day": pyarrow.array([day], pyarrow.timestamp("ns")),
            "cost": [decimal.Decimal("1.50")],
            "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "picture": [b"\x00"],
            "inner": [[{"when": day}]],
        }
    )
    parquet.write_table(table, path)
    (row,) = columns(read_table(path, SETTING, "error"))
    when = "2024-05-06 00:00:00"
    assert row == {"day": when, "cost": "1.50", "map": [["a", 1]], "picture": b"\x00", "inner": [{"when": when}]}
    assert type(row["day"]) is str


def test_a_folder_that_was_saved_in_another_form(tmp_path):
    """A data set that gives numpy arrays, of chosen rows: 2 of 3, the last first."""
    rows = datasets.Dataset.from_dict({"x": [[1, 2], [3], [4]]}).with_format("numpy").select([2, 0])
    rows.save_to_disk(str(tmp_path / "a"))
    assert columns(read_table(tmp_path / "a", SETTING, "error")) == [{"x": [4]}, {"x": [1, 2]}]


def test_the_digest_is_of_the_bytes(tmp_path):
    path = lines(tmp_path / "a.jsonl", '{"a": 1}')
    first = read_table(path, SETTING, "error").digest
    assert first == hashlib.blake2b(b'{"a": 1}\n', digest_size=16).hexdigest()
    folder = saved(tmp_path / "f", ROWS)
    before = read_table(folder, SETTING, "error").digest
    names = ("data-00000-of-00001.arrow", "dataset_info.json", "state.json")
    together = b"".join((folder / name).read_bytes() for name in names)
    assert before == hashlib.blake2b(together, digest_size=16).hexdigest()
    (folder / "cache-12.arrow").write_bytes(b"what map() leaves behind")
    assert read_table(folder, SETTING, "error").digest == before
    (folder / "dataset_info.json").write_text("{}")
    assert read_table(folder, SETTING, "error").digest != before


BAD_LINES = {
    "no JSON": ("{", "not valid JSON"),
    "not text": (b'{"prompt": "\xff"}', "not valid JSON ('utf-8' codec"),
    "array": ('["a"]', "holds ['a'], must be a JSON object"),
    "number": ("7", "holds 7, must be a JSON object"),
    "NaN": ('{"prompt": "a", "x": [{"y": NaN}]}', "holds NaN or Infinity"),
    "infinity": ('{"prompt": "a", "x": -Infinity}', "holds NaN or Infinity"),
    "deep": ("[" * 100_000, "not valid JSON (nested too deep)"),
    "long": ('{"prompt": "' + "a" * 2 * LINE + '"}', "not valid JSON (over 4 MB, which is more than is read)"),
}


@pytest.mark.parametrize("mistake", BAD_LINES)
def test_a_bad_line_is_named_or_left_out(tmp_path, mistake):
    """Line 3 of 4 is bad. Left out, lines 1 and 4 are the rows, however long line 3 was."""
    line, text = BAD_LINES[mistake]
    path = lines(tmp_path / "a.jsonl", '{"x": 1}', "", line, '{"x": 2}')
    with pytest.raises(ConfigError) as error:
        read_table(path, SETTING, "error")
    assert str(error.value).startswith(f"{SETTING} = '{path}, line 3': ") and text in str(error.value)
    assert str(error.value).endswith(".") and str(error.value).count(". ") >= 1  # a remedy follows
    table = read_table(path, SETTING, "drop")
    assert columns(table) == [{"x": 1}, {"x": 2}] and table.rows[1].where == f"{path}, line 4"
    assert len(table.bad) == 1 and table.bad[0].startswith(f"{path}, line 3: ") and text in table.bad[0]


def bad_files(folder: Path) -> None:
    lines(folder / "void.jsonl", "", " ")
    lines(folder / "array.json", "[", '{"prompt": "a"},', '{"prompt": "b"}', "]")
    lines(folder / "all.jsonl", "{", "7")
    lines(folder / "text.csv", "prompt,answer")
    lines(folder / "plain", "prompt")
    lines(folder / "damaged.parquet", "PAR1 and no more")
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), folder / "void.parquet")
    (folder / "other").mkdir()
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)).save_to_disk(
        str(folder / "dict")
    )
    saved(folder / "torn", ROWS)
    (folder / "torn/data-00000-of-00001.arrow").write_bytes(b"ARROW")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gone.jsonl", "no such file or directory. Give a .jsonl or .parquet file, or a folder"),
        ("gone.parquet", "no such file or directory"),
        ("org/name", "no such file or directory. Give a .jsonl or .parquet file, or a folder"),
        ("text.csv", "has the unknown suffix '.csv'. Give a .jsonl or .parquet file"),
        ("plain", "has the unknown suffix ''"),
        ("void.jsonl", "holds no row"),
        ("void.parquet", "holds no row"),
        ("array.json", "begins as a JSON array. Write one object a line."),
        ("all.jsonl", "none of its 2 rows can be used, the first is all.jsonl, line 1: not valid JSON ("),
        ("damaged.parquet", "cannot be read (ArrowInvalid: "),
        ("other", "is a folder without a data set. Give"),
        ("dict", "holds several data sets: test, train. Give dict/test or dict/train."),
        ("torn", "cannot be read (ArrowInvalid: "),
    ],
)
def test_files_that_cannot_be_used(tmp_path, monkeypatch, name, text):
    monkeypatch.chdir(tmp_path)
    bad_files(tmp_path)
    with pytest.raises(ConfigError) as error:
        read_table(Path(name), SETTING, "drop")
    assert str(error.value).startswith(f"{SETTING} = '{name}': {text}")


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a", "datasets")])
def test_packages_that_are_not_there(tmp_path, monkeypatch, name, package):
    path = written(tmp_path / name, ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet" if package == "pyarrow" else package, None)
    with pytest.raises(ConfigError, match=f"is read by the package {package}, .*pip install 'gspo-megatron"):
        read_table(path, SETTING, "error")
    assert len(read_table(lines(tmp_path / "b.jsonl", "{}"), SETTING, "error").rows) == 1


def test_reading_imports_nothing_heavy():
    heavy = ("torch", "pyarrow", "datasets", "pandas", "reasoning_gym")
    assert imported_by("from gspo_megatron.tasks import data_files", *heavy) == set()
