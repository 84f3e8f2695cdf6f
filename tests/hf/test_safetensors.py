"""Safetensors folders: what is damaged is refused by name, what is half-written is not there."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.safetensors import INDEX, SINGLE, SafetensorsFolder
from gspo_megatron.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from gspo_megatron.models.operators import Piece

A, B = torch.arange(12.0).view(4, 3), torch.arange(24.0).view(2, 4, 3)


def indexed(folder, weight_map=None):
    """Two files and their index."""
    save_file({"a": A}, folder / "one.safetensors")
    save_file({"b": B}, folder / "two.safetensors")
    weight_map = weight_map or {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_slices_of_pieces(tmp_path):
    """Rows 4..5 of 0..3 x 2 experts: the second half of expert 1's rows, its second column of three."""
    files = SafetensorsFolder(indexed(tmp_path))
    assert files.names == {"a", "b"} and files.shape("b") == (2, 4, 3)
    assert files.read(Piece("a"), 0, 1, 2).tolist() == A[2:].tolist()
    assert files.read(Piece("b", expert=1, part=1, parts=2)).tolist() == B[1, 2:].tolist()
    assert files.read(Piece("b", expert=1, part=1, parts=2), 0, 1, 2).tolist() == B[1, 3:].tolist()
    assert files.read(Piece("b", expert=1, part=1, parts=4, count=2), 0, 1, 2).tolist() == B[1, 2:3].tolist()
    assert files.read(Piece("a"), 1, 2, 3).tolist() == A[:, 2:].tolist()


def refusal(folder) -> str:
    with pytest.raises(ConversionError) as caught:
        SafetensorsFolder(folder)
    return str(caught.value)


def test_no_file(tmp_path):
    assert f"{tmp_path / SINGLE}: no such file" in refusal(tmp_path)


def test_an_index_that_names_a_missing_file(tmp_path):
    indexed(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    assert "two.safetensors: no such file" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_file_cut_short(tmp_path, kept):
    path = indexed(tmp_path) / "two.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert "two.safetensors: damaged or cut short" in refusal(tmp_path)


def test_an_index_and_files_that_disagree(tmp_path):
    indexed(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    assert "1 tensor (b) not in the file that it names" in refusal(tmp_path)
    indexed(tmp_path, {"a": "one.safetensors"})
    save_file({"a": A, "c": A.clone()}, tmp_path / "one.safetensors")
    assert "1 tensor (c) in the files but not listed" in refusal(tmp_path)
    indexed(tmp_path)
    save_file({"a": A, "b": B}, tmp_path / "two.safetensors")
    assert "1 tensor (a) also in another file" in refusal(tmp_path)
    (tmp_path / INDEX).write_text("{")
    assert f"{INDEX}: no index" in refusal(tmp_path)


def test_a_quantised_tensor_is_named(tmp_path):
    save_file({"a": A.to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(ConversionError) as caught:
        SafetensorsFolder(tmp_path).dtype("a")
    assert "a has type F8_E4M3" in str(caught.value)


def specs() -> list[TensorSpec]:
    return [TensorSpec("a", (4, 3), torch.float32), TensorSpec("b", (2, 4, 3), torch.bfloat16)]


def test_written_in_any_order_is_read_by_the_library(tmp_path):
    """b comes by expert and by half of its rows, in bf16; both files are under 60 bytes of data, so there are two."""
    with SafetensorsWriter(tmp_path / "out", specs(), max_shard_size=60) as writer:
        for expert in (1, 0):
            for part in (1, 0):
                writer.write(Piece("b", expert, part, 2), B[expert].chunk(2)[part])
        writer.write(Piece("a"), A)
        assert not (tmp_path / "out").exists()
        writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    first = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    second = load_file(tmp_path / "out" / "model-00002-of-00002.safetensors")
    assert torch.equal(first["a"], A) and torch.equal(second["b"], B.bfloat16())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == 48 + 48
    assert SafetensorsFolder(tmp_path / "out").names == {"a", "b"}


def written(folder, *pieces) -> str:
    with pytest.raises(ConversionError) as caught, SafetensorsWriter(folder, specs(), 10**9) as writer:
        for piece, tensor in pieces:
            writer.write(piece, tensor)
        writer.finish()
    return str(caught.value)


def test_what_is_not_whole_leaves_nothing_behind(tmp_path):
    half = (Piece("b", 0), B[0])
    out = tmp_path / "out"
    assert "2 tensors (a, b) not written in full" in written(out, half)
    assert "written twice" in written(out, half, half)
    assert "shape (3, 4), where (4, 3) was announced" in written(out, (Piece("a"), A.T))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_alone(tmp_path):
    assert f"{tmp_path}: exists already" in written(tmp_path)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    message = written(tmp_path / "out", (Piece("a"), A), (Piece("b", 0), B[0]), (Piece("b", 1), B[1]))
    assert "the disk is full" in message
    assert not list(tmp_path.iterdir())


def index_of(folder, text: bytes) -> str:
    save_file({"a": A}, folder / "one.safetensors")
    (folder / INDEX).write_bytes(text)
    return refusal(folder)


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": 1}, "the file 1, must be text"),
        ({"a": None}, "the file None, must be text"),
        ({"a": ["one.safetensors"]}, "must be text"),
        ({"a": "../one.safetensors"}, "'../one.safetensors', must be in the folder"),
        ({"a": "x/../../one.safetensors"}, "must be in the folder"),
        ({"a": "/etc/passwd"}, "'/etc/passwd', must be in the folder"),
        ({"a": "one\0.safetensors"}, "must be in the folder"),
        ({"a": "pytorch_model.bin"}, "must be in the folder"),
        ({"a": "x" * 10**6}, "must be in the folder"),
        ({"a" * 10**6: "two.safetensors"}, "no such file"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ("one.safetensors", "no weight_map"),
        (7, "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_that_is_none(tmp_path, weight_map, said):
    message = index_of(tmp_path, json.dumps({"weight_map": weight_map}).encode())
    assert said in message and len(message) < 700 + len(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"weight_map": ' * 100_000, b"{}", b"[]", b"null", b"", b"\xff\xfe", b" " * (2**26 + 1)],
    ids=["lists in lists", "tables in tables", "table", "list", "null", "empty", "not UTF-8", "64 MB"],
)
def test_an_index_that_would_cost_too_much(tmp_path, text):
    message = index_of(tmp_path, text)
    assert f"{INDEX}: no index of safetensors files" in message and len(message) < 400 + len(str(tmp_path))


def header(folder, told: dict | bytes, length: int | None = None) -> None:
    text = told if isinstance(told, bytes) else json.dumps(told).encode()
    (folder / SINGLE).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(8))


@pytest.mark.parametrize(
    ("told", "length"),
    [
        (b"{}", 2**63),
        (b"{}", 2**40),
        (b"[" * 10**6, None),
        (b" " * 10**6, None),
        ({"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 2**62]}}, None),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, None),
        ({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "pickle", "shape": [2], "data_offsets": [0, 8]}}, None),
        ({"a": {"dtype": "x" * 10**6, "shape": [2], "data_offsets": [0, 8]}}, None),
    ],
)
def test_a_header_that_lies(tmp_path, told, length):
    header(tmp_path, told, length)
    message = refusal(tmp_path)
    assert f"{SINGLE}: damaged or cut short" in message and len(message) < 400 + len(str(tmp_path))


def test_dimensions_without_end(tmp_path):
    header(tmp_path, {"a": {"dtype": "F32", "shape": [2] + [1] * 10**5, "data_offsets": [0, 8]}})
    with pytest.raises(ConversionError, match=r"\(a\) has 100001 dimensions"):
        SafetensorsFolder(tmp_path).whole("a")
