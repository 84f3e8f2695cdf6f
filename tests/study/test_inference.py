"""Intervals against tables of Student's t."""

import math

import pytest

from gspo_megatron.study.inference import Interval, interval, paired, read, together


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


def test_several_looks_by_hand():
    """Eight looks of which all hold at 95%: 0.05 / 8 = 0.00625 is left to each. One look, or none, keeps its 95%."""
    assert together(0.95, 8) == pytest.approx(0.99375)
    assert together(0.95, 1) == together(0.95, 0) == 0.95


def test_a_difference_of_shares_is_at_most_one():
    """Differences 0.4 and -0.4: mean 0, deviation 0.4 sqrt(2); t of 0.975 at 1 degree of freedom is 12.706 (tables), so
    the half width is 12.706 * 0.4 = 5.08. No accuracies differ by that much."""
    found = paired({1: 0.9, 2: 0.1}, {1: 0.5, 2: 0.5}, 0.95)
    assert (found.mean, found.low, found.high) == (pytest.approx(0), -1, 1)
    assert interval([0.9, 0.1], 0.95).cut(0, 1).low == 0


@pytest.mark.parametrize(
    ("equivalence", "difference", "floor", "reading"),
    [
        ((-0.04, 0.03), (-0.06, 0.05), False, "same"),
        ((0.01, 0.04), (0.005, 0.045), False, "same"),  # a difference, but none that matters
        ((-0.04, 0.051), (-0.06, 0.07), False, "open"),  # wider than the margin on one side
        ((-0.9, 0.9), (-1, 1), False, "open"),
        ((0.02, 0.10), (0.01, 0.11), False, "more"),
        ((0.02, 0.10), (-0.01, 0.13), False, "open"),  # shown alone, and not among several
        ((-0.10, -0.02), (-0.11, -0.01), False, "less"),
        ((-0.001, 0.001), (-0.002, 0.002), True, "floor"),  # two models that say nothing are alike
        ((0.02, 0.10), (0.01, 0.11), True, "floor"),
    ],
)
def test_no_interval_no_claim(equivalence, difference, floor, reading):
    """The margin is 0.05."""
    intervals = [Interval((low + high) / 2, low, high, 5) for low, high in (equivalence, difference)]
    assert read(*intervals, margin=0.05, floor=floor) == reading
