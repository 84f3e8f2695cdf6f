"""Intervals over seeds are by Student's t, and read() says what they show. Seeds are the only source of chance that is
repeated here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Interval:
    """An interval is a mean and the range around it."""

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"

    @property
    def above_zero(self) -> bool:
        return self.low > 0

    @property
    def below_zero(self) -> bool:
        return self.high < 0

    def within(self, margin: float) -> bool:
        return -margin < self.low and self.high < margin

    def cut(self, low: float, high: float) -> "Interval":
        """Return the part between these two, where the mean is known to lie."""
        return Interval(self.mean, max(self.low, low), min(self.high, high), self.count)


def interval(values: Sequence[float], confidence: float) -> Interval:
    """Return the interval of the mean, two-sided; without bounds for a single value."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def paired(ours: dict[int, float], theirs: dict[int, float], confidence: float) -> Interval | None:
    """Return that of the mean difference ours - theirs, of shares, over the seeds that both have; None where there is
    none."""
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds], confidence).cut(-1, 1) if seeds else None


def together(confidence: float, looks: int) -> float:
    """Return the confidence of each of several intervals that all hold together with the one given (Bonferroni)."""
    return 1 - (1 - confidence) / max(looks, 1)


def read(equivalence: Interval, difference: Interval, margin: float, floor: bool) -> str:
    """Say what two arms' difference shows: a key of wording.READINGS.

    Args:
        equivalence: the interval that must be within the margin.
        difference: the interval that must exclude 0; it may be wider.
        floor: both arms collapsed in every seed. They are then alike whatever tells them apart elsewhere.
    """
    if floor:
        return "floor"
    if equivalence.within(margin):
        return "same"
    if difference.above_zero or difference.below_zero:
        return "more" if difference.above_zero else "less"
    return "open"
