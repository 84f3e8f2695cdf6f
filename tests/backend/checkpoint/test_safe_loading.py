"""A checkpoint that names code is refused before anything of it runs."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from gspo_megatron.backend.checkpoint import safe_loading, saver, sharded
from gspo_megatron.errors import CheckpointError
from tests.backend.small import SINGLE, small_policy
from tools.validation.ranks import spawn


class Hostile:
    """Whoever unpickles it makes a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def metadata_is_code(folder: Path, hostile: Hostile) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(hostile))


def code_in_the_metadata(folder: Path, hostile: Hostile) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data = {"harmless": 1, "more": [hostile]}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def code_in_an_item(folder: Path, hostile: Hostile) -> None:
    """The place of the first layer's extra state is where torch.save put the harm."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    torch.save(hostile, folder / "__9_0.distcp")
    for index, place in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            place.relative_path, place.offset = "__9_0.distcp", 0
            place.length = (folder / "__9_0.distcp").stat().st_size
            break
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def a_file_elsewhere(folder: Path, hostile: Hostile) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    next(iter(metadata.storage_data.values())).relative_path = "../elsewhere.distcp"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


HARMS: dict[Callable, tuple[str, str]] = {  # -> the file, and what is said of it
    metadata_is_code: (".metadata", "names posix.mkdir"),
    code_in_the_metadata: (".metadata", "names posix.mkdir"),
    code_in_an_item: ("__9_0.distcp", "_extra_state"),
    a_file_elsewhere: ("../elsewhere.distcp", "outside of the folder"),
}


def loaded(rank: int, world_size: int, good: Path) -> list[str]:
    policy, messages = small_policy(SINGLE), []
    saver.save({"": policy.network}, good)
    sharded.load_weights(policy.network, good)
    for harm in HARMS:
        folder = shutil.copytree(good, good.with_name(harm.__name__))
        harm(folder, Hostile(folder / "harmed"))
        with pytest.raises(CheckpointError) as caught:
            sharded.load_weights(policy.network, folder)
        messages.append(str(caught.value))
    return messages


def test_no_code_of_a_checkpoint_runs(tmp_path):
    messages = spawn(loaded, 1, tmp_path / "step_000001")[0]
    for (harm, (file, said)), message in zip(HARMS.items(), messages, strict=True):
        assert message.startswith(f"{tmp_path / harm.__name__ / file}: refused") and said in message
        assert not (tmp_path / harm.__name__ / "harmed").exists()


def test_without_the_check_it_would_run(tmp_path):
    """So the test above can fail."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile(tmp_path / "harmed")))
    with pytest.raises(CheckpointError):
        safe_loading.check(tmp_path)
    assert not (tmp_path / "harmed").exists()
    pickle.loads((tmp_path / ".metadata").read_bytes())
    assert (tmp_path / "harmed").exists()
