"""How far two things lie apart that were measured side by side, with 95 % intervals.

Rules: each pair was measured in one breath, so that what drifts over minutes falls out of the difference; the median
and its interval need no assumption on how pauses of a busy machine are distributed, the mean and its interval show
them.
Pure. Sources: order statistics for the median, Student's t for the mean, Wilson's interval for a share.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from deploy.bench.slope import NORMAL_975, student_975

LEAST_PAIRS = 6  # fewer give no interval for a median


class Interval(NamedTuple):
    """An estimate, and where the truth lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether it may be this."""
        return self.low <= value <= self.high


def differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """`first` less `second`, pair by pair. Raises ValueError for other than equally many, or too few."""
    if len(first) != len(second) or len(first) < LEAST_PAIRS:
        raise ValueError(f"{len(first)} and {len(second)} measurements: give equally many, {LEAST_PAIRS} or more")
    return [one - other for one, other in zip(first, second, strict=True)]


def mean(values: Sequence[float]) -> Interval:
    """Of the population they come from."""
    middle = statistics.fmean(values)
    reach = student_975(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - reach, middle + reach)


def median(values: Sequence[float]) -> Interval:
    """The narrowest pair of order statistics that leaves 2.5 % at most on each side; of `LEAST_PAIRS` values
    or more.
    """
    ordered, count = sorted(values), len(values)
    below, outside = 0, 0.0
    while (outside := outside + math.comb(count, below) / 2**count) <= 0.025:
        below += 1
    return Interval(statistics.median(ordered), ordered[below - 1], ordered[count - below])


def share(hits: int, count: int) -> Interval:
    """How often something happens that happened `hits` times of `count`."""
    found, z = hits / count, NORMAL_975
    middle = (found + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(found * (1 - found) / count + z * z / (4 * count * count))
    return Interval(found, max(0.0, middle - reach), min(1.0, middle + reach))
