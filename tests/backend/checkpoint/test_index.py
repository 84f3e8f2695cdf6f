"""A checkpoint that was made to do harm: nothing of it runs, sets an attribute, or takes long."""

import pickle
import re
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gspo_megatron.backend.checkpoint import index, saver, sharded
from gspo_megatron.backend.checkpoint.streaming import StoredWeights
from gspo_megatron.errors import CheckpointError
from tests.backend.checkpoint.hostile import ByState, MakesFolder, SetsAttributes, torch_saved
from tests.backend.small import SINGLE, small_policy
from tools.validation.launching import ROOT
from tools.validation.ranks import spawn


def read(folder: Path) -> Metadata:
    return pickle.loads((folder / ".metadata").read_bytes())


def write(folder: Path, metadata: object) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def an_item_of_code(folder: Path) -> Metadata:
    """The place of the first layer's extra state is where torch.save put the harm."""
    metadata = read(folder)
    (folder / "__9_0.distcp").write_bytes(torch_saved(MakesFolder(folder / "harmed")))
    first = next(
        i for i in metadata.storage_data if isinstance(metadata.state_dict_metadata[i.fqn], BytesStorageMetadata)
    )
    length = (folder / "__9_0.distcp").stat().st_size
    metadata.storage_data[first] = _StorageInfo("__9_0.distcp", 0, length)
    return metadata


def code_alone(folder: Path) -> None:
    write(folder, MakesFolder(folder / "harmed"))


def code_in_the_planner_s_data(folder: Path) -> None:
    metadata = read(folder)
    metadata.planner_data = {"harmless": 1, "more": [MakesFolder(folder / "harmed")]}
    write(folder, metadata)


def code_in_an_item(folder: Path) -> None:
    write(folder, an_item_of_code(folder))


def code_in_an_item_behind_a_false_dictionary(folder: Path) -> None:
    """Of allowed types alone: `items` of this dictionary gives an empty torch.Size, and looking up finds the item."""
    metadata = an_item_of_code(folder)
    metadata.storage_data = ByState(OrderedDict, {"items": torch.Size}, metadata.storage_data)
    write(folder, metadata)


def code_in_the_common_state(folder: Path) -> None:
    (folder / "common.pt").write_bytes(torch_saved(MakesFolder(folder / "harmed")))


def code_in_a_tensor(folder: Path) -> None:
    """Every shard of one tensor is another object, of the same place and length in the file."""
    metadata = read(folder)
    first = next(i for i in metadata.storage_data if i.fqn == "embedding.word_embeddings.weight")
    contents = torch_saved(MakesFolder(folder / "harmed"))
    (folder / "__9_0.distcp").write_bytes(contents)
    metadata.storage_data[first] = _StorageInfo("__9_0.distcp", 0, len(contents))
    write(folder, metadata)


def attributes_of_a_class(folder: Path) -> None:
    (folder / ".metadata").write_bytes(SetsAttributes(Metadata, {"harmed": True}).pickled())


def attributes_of_another_class(folder: Path) -> None:
    (folder / ".metadata").write_bytes(SetsAttributes(torch.Size, {"harmed": True}).pickled())


def a_file_elsewhere(folder: Path) -> None:
    metadata = read(folder)
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    write(folder, metadata)


HARMS: dict[Callable[[Path], None], str] = {  # -> what is said of it; nothing: it is not read, and the rest loads
    code_alone: ".metadata: refused, because it names posix.mkdir",
    code_in_the_planner_s_data: ".metadata: refused, because it names posix.mkdir",
    code_in_an_item: "",
    code_in_an_item_behind_a_false_dictionary: ".metadata: refused, because it names collections.OrderedDict",
    code_in_the_common_state: "",
    code_in_a_tensor: "__9_0.distcp: damaged or incomplete (it names posix.mkdir)",
    attributes_of_a_class: ".metadata: refused, because it gives a state to a Named",
    attributes_of_another_class: ".metadata: refused, because it gives a state to a Named",
    a_file_elsewhere: ".metadata: refused, because it tells of the file '../elsewhere.distcp' outside of the folder",
}


def loaded(rank: int, world_size: int, good: Path) -> dict[str, str]:
    """What loading says of each harm."""
    policy, messages = small_policy(SINGLE), {}
    saver.save({"": policy.network}, good)
    for harm in HARMS:
        folder = shutil.copytree(good, good.with_name(harm.__name__))
        (folder / "manifest.json").unlink()  # whoever makes a harmful checkpoint makes a manifest that fits, or none
        harm(folder)
        messages[harm.__name__] = ""
        try:
            sharded.load_weights(policy.network, folder)
        except CheckpointError as error:
            messages[harm.__name__] = str(error)
        messages[harm.__name__] += " harmed" if hasattr(Metadata, "harmed") or hasattr(torch.Size, "harmed") else ""
    return messages


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with a good checkpoint, step_000001, and one of each harm."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def messages(checkpoints) -> dict[str, str]:
    return spawn(loaded, 1, checkpoints / "step_000001")[0]


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
def test_nothing_of_a_checkpoint_runs(messages, checkpoints, harm):
    said = HARMS[harm]
    assert messages[harm.__name__].startswith(f"{checkpoints / harm.__name__}/{said}" if said else "")
    assert bool(messages[harm.__name__]) == bool(said)
    assert not (checkpoints / harm.__name__ / "harmed").exists()


def test_unpickled_they_would_run(messages, checkpoints):
    """So the test above can fail: each is what pickle or torch would run."""
    for harm in (code_alone, code_in_the_planner_s_data):
        with (checkpoints / harm.__name__ / ".metadata").open("rb") as file:
            pickle.load(file)
        assert (checkpoints / harm.__name__ / "harmed").exists()
    folder = checkpoints / code_in_an_item_behind_a_false_dictionary.__name__
    metadata = read(folder)
    assert type(metadata.storage_data) is OrderedDict and len(metadata.storage_data) > 10
    assert metadata.storage_data.items() == torch.Size()  # so that looking through it sees nothing
    torch.load(folder / "__9_0.distcp", weights_only=False)
    assert (folder / "harmed").exists()


def test_conversion_refuses_the_same(messages, checkpoints):
    """It reads by the same reader, as a run's start does."""
    for harm, said in HARMS.items():
        if said.startswith(".metadata"):
            with pytest.raises(CheckpointError, match="refused"):
                StoredWeights(checkpoints / harm.__name__)


def one_tensor(key: str, chunks: list, size: tuple = (4, 6)) -> Metadata:
    stored = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(size), chunks)
    return Metadata({key: stored}, storage_data={MetadataIndex(key, torch.Size((0, 0))): _StorageInfo("a", 0, 8)})


def far_away() -> bytes:
    metadata = one_tensor("w", [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 6)))])
    metadata.storage_data = {MetadataIndex("w", torch.Size((0, 0))): _StorageInfo("a", 2**62, 2**62)}
    return pickle.dumps(metadata)


def below_zero() -> bytes:
    metadata = one_tensor("w", [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 6)))])
    metadata.storage_data = {MetadataIndex("w", torch.Size((0, 0))): _StorageInfo("a", -(2**40), 8)}
    return pickle.dumps(metadata)


def one_list_of_many_tensors() -> bytes:
    """10,000 tensors share one list of 10,000 shards: 10^8 steps for whoever walks through them."""
    chunk = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 6)))
    stored = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((4, 6)), [chunk] * 10_000)
    places = {MetadataIndex(f"w{i}", torch.Size((0, 0))): _StorageInfo("a", 0, 8) for i in range(10_000)}
    return pickle.dumps(Metadata({f"w{i}": stored for i in range(10_000)}, storage_data=places))


BOMBS: dict[str, bytes | Callable[[], bytes]] = {
    "a memo of 2^31 places": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "a million tuples in each other": b"\x80\x04)" + b"\x85" * 10**6 + b".",
    "tuples of themselves, as a key": b"\x80\x04})\x94" + b"h\x00h\x00\x86q\x00" * 60 + b"Ns.",
    "a text of 4 GiB": b"\x80\x04X\xff\xff\xff\xffabc.",
    "a frame of 2^63 bytes": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "bytes of 2^62": b"\x80\x05\x96" + b"\xff" * 7 + b"\x3fN.",
    "a number of 2^31 bytes": b"\x80\x04\x8b\xff\xff\xff\x7f1.",
    "a number of 255 bytes": b"\x80\x04\x8a\xff" + b"\x7f" * 255 + b".",
    "a million marks": b"\x80\x04" + b"(" * 10**6 + b".",
    "thirty million entries": b"\x80\x04]" + b"Na" * 3 * 10**7 + b".",
    "half a million names": b"\x80\x04" + b"cabc" * 500_000,
    "it ends": b"\x80\x04]",
    "nothing": b"",
    "a call of nothing": b"\x80\x04)R.",
    "a state of nothing": b"\x80\x04Nb.",
    "a place far away": far_away,
    "a place below zero": below_zero,
    "one list of many tensors": one_list_of_many_tensors,
    "dimensions without end": lambda: pickle.dumps(one_tensor("w", [], (1,) * 10**5)),
    "a shard larger than the tensor": lambda: pickle.dumps(
        one_tensor("w", [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 2**40)))])
    ),
    "a shard of fewer dimensions": lambda: pickle.dumps(
        one_tensor("w", [ChunkStorageMetadata(torch.Size((0,)), torch.Size((4,)))])
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_each_bomb_is_one_message(tmp_path, bomb):
    """Within ten seconds, of a small folder, in which .metadata is all there is but for eight bytes."""
    contents = BOMBS[bomb]
    (tmp_path / ".metadata").write_bytes(contents if isinstance(contents, bytes) else contents())
    (tmp_path / "a").write_bytes(bytes(8))
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"\.metadata: (refused|damaged)") as caught:
        index.read(tmp_path)
    assert time.monotonic() - began < 10 and len(str(caught.value)) < 600 + len(str(tmp_path))


def test_nothing_in_the_package_unpickles():
    """But the processes that score, whose requests come from their own rank."""
    loaders = re.compile(r"torch\.load\(|pickle\.loads?\(|Unpickler|dist_checkpointing\.load\(|weights_only")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gspo_megatron").rglob("*.py")
        if loaders.search(path.read_text(encoding="utf-8"))
    }
    assert found <= {"gspo_megatron/tasks/scoring_process.py", "gspo_megatron/tasks/reward_process.py"}


def test_an_old_checkpoint_s_records(tmp_path):
    """Of version 0.1.0, on two stages: by value, one tensor whole and one in a shard for each of four experts."""
    found = index.read(Path(__file__).parents[2] / "data/run_0_1_0/checkpoints/step_000002")
    embedding = found["embedding.word_embeddings.weight"]
    assert (embedding.dtype, embedding.shape, list(embedding.shards)) == (torch.float32, (320, 24), [(0, 0)])
    experts = found["decoder.layers.0.mlp.experts.experts.linear_fc2.weight"]
    assert [at[0] for at in sorted(experts.shards)] == [0, 1, 2, 3]
    assert not any("_extra_state" in key for key in found)
