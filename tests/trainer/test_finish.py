"""What follows the last step is made whole or said to be missing, and only a run that has it all is marked.

A real run that is killed in there goes on in tools/validation/faults/folders.py.
"""

import pytest

from gspo_megatron.errors import TrainingError
from gspo_megatron.trainer.finish import complete
from gspo_megatron.trainer.resume import finished_step
from tests.full_disk import full_at


def test_charts_that_cannot_be_written_are_one_message_and_no_mark(tmp_path):
    """With room the same call makes them, and the mark; what a Hugging Face folder has replaced goes."""
    (tmp_path / "metrics.jsonl").write_text('{"phase": "rl", "step": 0, "reward/mean": 0.5}\n')
    (tmp_path / "hf.replaced").mkdir()
    with full_at(4096), pytest.raises(TrainingError) as caught:
        complete(tmp_path, 5, has_hf=True)
    assert str(caught.value) == (
        f"{tmp_path / 'plots/reward.png'}: cannot be written (File too large). The last checkpoint is there. Make "
        "room, then start the same command: it makes what is missing."
    )
    assert finished_step(tmp_path, wants_hf=False) is None and not list((tmp_path / "plots").iterdir())
    assert complete(tmp_path, 5, has_hf=True) == 2  # the reward and the overview
    assert finished_step(tmp_path, wants_hf=True) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["finished.json", "metrics.jsonl", "plots"]
