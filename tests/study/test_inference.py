"""Intervals against tables of Student's t."""

import math

import pytest

from gspo_megatron.study.inference import interval, paired


def test_an_interval_by_hand():
    """1, 2, 3, 4, 5: mean 3, deviation sqrt(2.5), t of 0.975 at 4 degrees of freedom 2.776445 (tables)."""
    found = interval([1, 2, 3, 4, 5], 0.95)
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.low, found.high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-6)
    assert found.above_zero and not found.below_zero and found.within(5) and not found.within(4.9)


def test_ninety_percent_is_narrower():
    """t of 0.95 at 4 degrees of freedom is 2.131847 (tables)."""
    found = interval([1, 2, 3, 4, 5], 0.9)
    assert found.high - found.mean == pytest.approx(2.131847 * math.sqrt(0.5), rel=1e-6)


def test_pairs_are_seeds_that_both_have():
    """Differences 1 and 3 at seeds 1 and 2; seed 3 is only one's."""
    found = paired({1: 2.0, 2: 5.0, 3: 9.0}, {1: 1.0, 2: 2.0}, 0.95)
    assert (found.mean, found.count) == (2.0, 2)
    assert paired({1: 1.0}, {2: 1.0}, 0.95) is None


def test_one_seed_shows_nothing():
    found = interval([0.3], 0.95)
    assert found.mean == 0.3 and not found.within(100) and not found.above_zero and not found.below_zero
