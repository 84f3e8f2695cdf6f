"""A part of tools/validation/kill_resume.py for every day: two kills at random moments in one of its layouts."""

import pytest

from tools.validation.faults.random_kills import LAYOUTS, survive, undisturbed

STEPS = 8


@pytest.mark.slow
def test_killed_at_random_moments_it_is_the_same_training(tmp_path):
    layout = LAYOUTS[-1]
    whole = undisturbed(tmp_path / "undisturbed", layout, STEPS)
    survive(tmp_path / "killed", layout, whole, kills=2, steps=STEPS, seed=1, window=2.0)
