"""Folders that get their name when they are complete, beside folders of others."""

import pytest
import torch

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from gspo_megatron.utils import halves


def test_a_half_of_ours_is_written_over_and_one_that_is_done_has_no_mark(tmp_path):
    half, target = tmp_path / "model.unfinished", tmp_path / "model"
    halves.begin(half)
    (half / "old").touch()
    halves.begin(half)
    (half / "new").touch()
    halves.publish(half, target)
    assert [path.name for path in target.iterdir()] == ["new"] and not half.exists()
    halves.begin(half)
    halves.discard(half)
    assert not half.exists()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    """As where an export that was killed is given as the SOURCE of a conversion to its own name."""
    half = tmp_path / "model.unfinished"
    half.mkdir()
    (half / "tokenizer.json").write_text("mine")
    with pytest.raises(FileExistsError, match="no half of ours"):
        halves.begin(half)
    with pytest.raises(ConversionError, match="model: cannot be written, a folder of this name is there"):
        SafetensorsWriter(tmp_path / "model", [TensorSpec("a", (2,), torch.float32)], 10**9)
    halves.discard(half)
    assert (half / "tokenizer.json").read_text() == "mine"
