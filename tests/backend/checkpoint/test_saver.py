"""A checkpoint holds what was there when it was begun, and is whole or not there at all."""

import resource
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gspo_megatron.backend.checkpoint import saver, sharded
from gspo_megatron.backend.checkpoint.saver import Saver
from gspo_megatron.backend.model import parameters
from gspo_megatron.config import Layout
from gspo_megatron.errors import CheckpointError
from tests.backend.small import SINGLE, small_policy
from tools.validation.ranks import spawn

PP2 = Layout(1, 2, None, 1, 1)


def save_while_training_goes_on(rank: int, world_size: int, folder: Path, layout: Layout) -> dict:
    policy, writer = small_policy(layout), Saver()
    before = parameters.gather_full(policy.models, policy.topology)
    writer.begin({"": policy.network}, folder / "step_000001", {"step": 1})
    with torch.no_grad():
        for model in policy.models:
            for parameter in model.parameters():
                parameter.zero_()
    seen = (writer.is_begun, (folder / "step_000001").exists())
    dist.barrier()
    published = writer.finish()
    sharded.load_weights(policy.network, folder / "step_000001")
    after = parameters.gather_full(policy.models, policy.topology)
    return {
        "before": before,
        "after": after,
        "seen": seen,
        "published": published,
        "again": writer.finish(),
        "progress": sharded.read_progress(folder / "step_000001"),
    }


@pytest.mark.parametrize("layout", [SINGLE, PP2], ids=["DP2", "PP2"])
def test_it_holds_what_was_there_when_it_was_begun(tmp_path, layout):
    """The weights are set to zero while the files are written. DP2: they are views of the distributed optimizer's
    buffer; PP2: each rank writes its stage."""
    for result in spawn(save_while_training_goes_on, 2, tmp_path, layout):
        assert result["seen"] == (True, False)
        assert result["published"] == tmp_path / "step_000001" and result["again"] is None
        assert result["progress"] == {"step": 1}
        for name, value in result["before"].items():
            assert torch.equal(result["after"][name], value) and value.any(), name
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def save_beyond_limits(rank: int, world_size: int, folder: Path) -> list[str]:
    """What is said where rank 1 may not write files so large, and where the disk has no room."""
    policy, messages = small_policy(PP2), []
    saver.save({"": policy.network}, folder / "step_000001")
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        saver.save({"": policy.network}, folder / "step_000002")
    messages.append(str(caught.value))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    saver.SPARE = 1 << 60
    with pytest.raises(CheckpointError) as caught:
        saver.save({"": policy.network}, folder / "step_000003")
    return [*messages, str(caught.value)]


def test_what_cannot_be_written_is_said_on_every_rank_and_leaves_nothing(tmp_path):
    for cannot, no_room in spawn(save_beyond_limits, 2, tmp_path):
        assert "step_000002: rank 1 cannot write it" in cannot and "File too large" in cannot
        assert "step_000003: a checkpoint takes" in no_room and "checkpoint.keep_last" in no_room
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001"]


def full_at_the_end(rank: int, world_size: int, folder: Path) -> str:
    """The tensors are written; then no file may grow. What is said."""
    policy, writer = small_policy(SINGLE), Saver()
    writer.begin({"": policy.network}, folder / "step_000001")
    while writer.is_writing:
        time.sleep(0.01)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as caught:
        writer.finish()
    return str(caught.value)


def test_a_disk_that_is_full_behind_the_tensors_is_one_message_and_leaves_nothing(tmp_path):
    """Megatron's own metadata cannot be written, which is tried on rank 0 alone."""
    (message,) = spawn(full_at_the_end, 1, tmp_path)
    assert "File too large" in message and "The checkpoints before it are kept" in message
    assert list(tmp_path.iterdir()) == []


def sizes(rank: int, world_size: int, folder: Path) -> tuple[int, int]:
    policy = small_policy(PP2, torch.bfloat16)
    saver.save({"": policy.network}, folder / "step_000001")
    own = sum(p.numel() for model in policy.models for p in model.parameters())
    return own, sum(path.stat().st_size for path in folder.glob("step_000001/*.distcp"))


def test_the_size_on_disk_is_that_of_the_tensors(tmp_path):
    """bf16 weights with fp32 masters and Adam's two moments are 2 + 3 * 4 = 14 bytes a parameter. torch stores each
    shard as a zip of its own, about 1.2 kB more: 2 kB for each tensor that a rank has is allowed on top of the 2%."""
    results = spawn(sizes, 2, tmp_path)
    wanted, found = 14 * sum(own for own, _ in results), results[0][1]
    assert wanted <= found <= 1.02 * wanted + 2048 * 500, (wanted, found)
