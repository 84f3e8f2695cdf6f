"""The data of a study as one file: nothing is lost, the bytes are always the same, and the committed reports follow."""

import lzma
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from gspo_megatron.errors import GspoError
from gspo_megatron.study import algorithms, archive, report

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
TWO = {"b.jsonl": b"2\n", "a.jsonl": b'{"loss": null}\n'}


def test_the_same_files_make_the_same_bytes():
    """In any order and at any time. Fields are at fixed places in a tar header: name at 0, mode at 100, owner at 108,
    size at 124, time at 136, type at 156; content starts at the next multiple of 512."""
    packed = archive.pack(TWO)
    assert archive.pack(dict(reversed(TWO.items()))) == packed and archive.unpack(packed) == TWO
    tar = lzma.decompress(packed)
    assert tar[:12].rstrip(b"\0") == b"data/a.jsonl" and tar[1024:1036] == b"data/b.jsonl"
    assert tar[100:108] == b"0000644\0" and tar[108:124] == b"0000000\0" * 2
    assert int(tar[124:135], 8) == 15 and tar[136:148] == b"0" * 11 + b"\0" and tar[156:157] == b"0"
    assert tar[512:527] == TWO["a.jsonl"] and tar[1536:1538] == TWO["b.jsonl"]


def test_a_loose_file_counts_before_a_packed_one(tmp_path):
    """And what else was packed stays, with loose files or without."""
    (tmp_path / archive.PACKED).write_bytes(archive.pack(TWO))
    (tmp_path / archive.LOOSE).mkdir()
    for name, data in (("b.jsonl", b"newer\n"), ("c.jsonl", b"3\n"), ("d.part", b"unfinished")):
        (tmp_path / archive.LOOSE / name).write_bytes(data)
    whole = {"a.jsonl": TWO["a.jsonl"], "b.jsonl": b"newer\n", "c.jsonl": b"3\n"}
    assert list(archive.read(tmp_path).items()) == list(whole.items())
    archive.write(tmp_path)
    shutil.rmtree(tmp_path / archive.LOOSE)
    assert archive.read(tmp_path) == whole
    archive.write(tmp_path)
    assert archive.read(tmp_path) == whole and os.listdir(tmp_path) == [archive.PACKED]


def test_the_same_content_is_not_packed_again(tmp_path):
    """Bytes that another xz made stay: a report that is written anew changes nothing in git."""
    other = lzma.compress(lzma.decompress(archive.pack(TWO)), preset=0)
    assert other != archive.pack(TWO)
    (tmp_path / archive.PACKED).write_bytes(other)
    archive.write(tmp_path)
    assert (tmp_path / archive.PACKED).read_bytes() == other


DAMAGED = {
    "empty": b"",
    "pointer": b"version https://git-lfs",
    "cut": archive.pack(TWO)[:-40],
    "no tar": lzma.compress(b"no tar"),
}


@pytest.mark.parametrize("damaged", DAMAGED)
def test_a_damaged_file_is_named(tmp_path, damaged):
    (tmp_path / archive.PACKED).write_bytes(DAMAGED[damaged])
    with pytest.raises(GspoError, match=r"data\.tar\.xz: is damaged .* Restore it"):
        archive.read(tmp_path)


def test_a_small_file_that_stands_for_gigabytes_is_refused_within_its_limit(tmp_path):
    """40 kB of a quarter of a gigabyte of zeros and one more; and 1 kB of tar that says it has 8 GiB."""
    zeros = lzma.LZMACompressor(preset=0)
    content = b"".join(zeros.compress(bytes(1 << 24)) for _ in range(archive.LARGEST >> 24)) + zeros.compress(b"0")
    (tmp_path / archive.PACKED).write_bytes(content + zeros.flush())
    assert (tmp_path / archive.PACKED).stat().st_size < 50_000
    with pytest.raises(GspoError, match=r"data\.tar\.xz: is damaged \(it unpacks to over 256 MiB\)\. Restore it"):
        archive.read(tmp_path)
    sparse = tarfile.TarInfo("data/a.jsonl")
    sparse.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(sparse.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"77777777777\0"  # its real size: 8 GiB
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    assert archive.unpack(lzma.compress(bytes(header) + bytes(1024))) == {}


@pytest.mark.parametrize(
    ("study", "runs", "write"), [("algorithms", 54, algorithms.write), ("routing-replay", 167, report.write)]
)
def test_the_committed_report_follows_from_the_committed_data(tmp_path, study, runs, write):
    """Word for word and number for number, from the packed file alone, which comes back as it was."""
    committed = (STUDIES / study / archive.PACKED).read_bytes()
    files = archive.unpack(committed)
    assert len(files) == runs and archive.unpack(archive.pack(files)) == files
    (tmp_path / archive.PACKED).write_bytes(committed)
    assert f"{runs} runs" in write(tmp_path)
    for name in ("README.md", "findings.json", archive.PACKED):
        assert (tmp_path / name).read_bytes() == (STUDIES / study / name).read_bytes(), name
