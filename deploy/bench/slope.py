"""Whether a series grows: its least-squares slope with a 95 % interval.

Rules: neighbouring samples of one process say much the same, so the interval is widened by the lag-1 correlation of
the residuals, as if there were n * (1 - r) / (1 + r) samples; a series grows when the whole interval lies above a
bound that the caller names, which is the least it can tell apart. Fewer than three samples decide nothing.
Pure.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

MOST_CORRELATION = 0.98  # above it no number of samples would ever decide
NORMAL_975 = 1.959963984540054


class Slope(NamedTuple):
    """Units of the values per unit of the times."""

    slope: float
    low: float
    high: float

    def grows(self, bound: float = 0.0) -> bool:
        """Whether the slope is above `bound` with 97.5 % confidence."""
        return self.low > bound


def fit(times: Sequence[float], values: Sequence[float]) -> Slope:
    """The slope of `values` over `times`. Of fewer than three samples, or times that stand still: 0, -inf, inf."""
    count = len(times)
    if count != len(values):
        raise ValueError(f"{count} times and {len(values)} values: give one value for each time")
    mean_time, mean_value = sum(times) / max(1, count), sum(values) / max(1, count)
    spread = sum((time - mean_time) ** 2 for time in times)
    if count < 3 or not spread:
        return Slope(0.0, -math.inf, math.inf)
    slope = sum((time - mean_time) * (value - mean_value) for time, value in zip(times, values, strict=True)) / spread
    left = [value - mean_value - slope * (time - mean_time) for time, value in zip(times, values, strict=True)]
    error = math.sqrt(sum(each * each for each in left) / (count - 2) / spread)
    r = correlation(left)
    independent = max(3.0, count * (1 - r) / (1 + r))
    reach = student_975(independent - 2) * error * math.sqrt(count / independent)
    return Slope(slope, slope - reach, slope + reach)


def correlation(residuals: Sequence[float]) -> float:
    """Lag-1 correlation of residuals, at least 0: samples that alternate are not made to count for more."""
    whole = sum(each * each for each in residuals)
    if not whole:
        return 0.0
    pairs = sum(before * after for before, after in pairwise(residuals))
    return min(MOST_CORRELATION, max(0.0, pairs / whole))


def student_975(freedom: float) -> float:
    """Student's t that 97.5 % lie below; by Cornish and Fisher's expansion, within 1.2 % from 3 degrees of freedom.

    Below 3 the expansion falls short, so the exact values for 1 and 2 bound it.
    """
    if freedom < 3:
        return 12.7062 if freedom < 2 else 4.3027
    z = NORMAL_975
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
