"""Shards of a distributed checkpoint without torch.save and torch.load of the numbers: their bytes, both ways."""

import io
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gspo_megatron.backend.checkpoint import index
from gspo_megatron.backend.checkpoint.shard_reader import ShardReader
from gspo_megatron.backend.checkpoint.shards import ShardWriter, frame
from gspo_megatron.errors import CheckpointError
from gspo_megatron.utils.tensor_bytes import memory

KINDS = [(torch.float32, (3, 5)), (torch.bfloat16, (1, 7, 2)), (torch.float64, ()), (torch.bfloat16, (1000, 300))]


@pytest.mark.parametrize(("dtype", "shape"), KINDS)
def test_a_frame_and_the_bytes_are_what_torch_save_writes(dtype, shape):
    """torch.save with checksums off; and torch.load reads it."""
    tensor, whole = torch.randn(shape).to(dtype), io.BytesIO()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, whole)
    finally:
        torch.serialization.set_crc32_options(True)
    around = frame(dtype, shape)
    ours = around.before + bytes(memory(tensor)) + around.after
    assert ours == whole.getvalue() and whole.getvalue().startswith(around.before)
    assert torch.equal(torch.load(io.BytesIO(ours), weights_only=True), tensor)
    assert torch.serialization.get_crc32_options()


def written(folder, chunks: dict[tuple[int, int], torch.Tensor], file_bytes: int) -> Metadata:
    """A checkpoint of the tensor `w` [4, 6] in these chunks, each given as two blocks of rows."""
    writer, places = ShardWriter(folder, file_bytes), {}
    for at, chunk in chunks.items():
        one = MetadataIndex("w", torch.Size(at))
        places[one] = writer.write(one, tuple(chunk.shape), list(chunk.contiguous().flatten().tensor_split(2)))
    writer.finish()
    found = [ChunkStorageMetadata(torch.Size(at), chunk.shape) for at, chunk in chunks.items()]
    stored = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 6)), found)
    metadata = Metadata({"w": stored}, storage_data={one: place.storage_data for one, place in places.items()})
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def reader_of(folder) -> ShardReader:
    return ShardReader(folder, index.read(folder))


WHOLE = torch.arange(24.0).view(4, 6)
CUTS = {
    "whole": {(0, 0): WHOLE},
    "rows": {(0, 0): WHOLE[:2], (2, 0): WHOLE[2:]},
    "both": {(a, b): WHOLE[a : a + 2, b : b + 3] for a in (0, 2) for b in (0, 3)},
}


@pytest.mark.parametrize("file_bytes", [1, 10**6], ids=["a file each", "one file"])
@pytest.mark.parametrize("name", CUTS)
def test_any_region_of_any_cut_is_read(tmp_path, name, file_bytes):
    """All of it, its chunks, and regions across them."""
    written(tmp_path, CUTS[name], file_bytes)
    reader = reader_of(tmp_path)
    assert len(list(tmp_path.glob("*.distcp"))) == (len(CUTS[name]) if file_bytes == 1 else 1)
    for top, left, rows, columns in ((0, 0, 4, 6), (2, 0, 2, 6), (0, 3, 2, 3), (1, 2, 2, 3), (3, 5, 1, 1)):
        found = reader.read("w", (top, left), (rows, columns))
        assert torch.equal(found, WHOLE[top : top + rows, left : left + columns])


def test_torch_reads_what_is_written_and_the_other_way_round(tmp_path):
    """Through .metadata, as the converters do; bf16 behind an odd number of bytes is read too."""
    state = {"a": torch.randn(3, 5).bfloat16(), "b": torch.randn(2, 2, 2)}
    dcp.save(state, storage_writer=FileSystemWriter(tmp_path, single_file_per_rank=True), no_dist=True)
    reader = reader_of(tmp_path)
    for key, tensor in state.items():
        zeros = tuple(0 for _ in tensor.shape)
        assert torch.equal(reader.read(key, zeros, tuple(tensor.shape)), tensor)
    (tmp_path / "ours").mkdir()
    written(tmp_path / "ours", {(0, 0): WHOLE}, 10**6)
    empty = {"w": torch.empty(4, 6)}
    dcp.load(empty, storage_reader=FileSystemReader(tmp_path / "ours"), no_dist=True)
    assert torch.equal(empty["w"], WHOLE)


def test_what_does_not_fit_is_named(tmp_path):
    """A tensor that is not there; a shard whose own description says another type; a part without a shard; a file that
    was cut short or lost, before its index is read and after."""
    metadata = written(tmp_path, CUTS["rows"], 1)
    reader = reader_of(tmp_path)
    with pytest.raises(CheckpointError, match="has no v, which this model has"):
        reader.read("v", (0, 0), (2, 6))
    with pytest.raises(CheckpointError, match="only a part of w is stored"):
        reader.read("w", (3, 0), (2, 6))
    os.truncate(tmp_path / "__0_1.distcp", 300)
    with pytest.raises(CheckpointError, match="__0_1.distcp: damaged or incomplete"):
        reader.read("w", (0, 0), (4, 6))
    with pytest.raises(CheckpointError, match="__0_1.distcp is missing, or ends before 'w' does"):
        index.read(tmp_path)
    written(tmp_path, CUTS["rows"], 1)
    os.remove(tmp_path / "__0_0.distcp")
    with pytest.raises(CheckpointError, match="__0_0.distcp: damaged or incomplete"):
        ShardReader(tmp_path, reader.tensors).read("w", (0, 0), (4, 6))
    metadata.state_dict_metadata["w"].properties.dtype = torch.bfloat16
    written(tmp_path, CUTS["rows"], 1)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"w is not stored as torch.bfloat16 of \[2, 6\]"):
        reader_of(tmp_path).read("w", (0, 0), (2, 6))
