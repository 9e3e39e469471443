"""What users are promised, as people write it: `ttft_p99=500ms,itl_p99=0.1s`.

    ttft  to the first token      itl   between two tokens of a stream
    tpot  mean of a stream's itl  e2e   to the last token

Pure.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate

from msgspec import Struct

TIMES = ("ttft", "itl", "tpot", "e2e")
_ONE = re.compile(r"(?P<what>[a-z0-9]+)_p(?P<percent>\d{1,2}(?:\.\d+)?|100)=(?P<amount>\d+(?:\.\d+)?)(?P<unit>ms|s)")


class Objective(Struct, frozen=True):
    """So many percent of `what` (one of TIMES) take `at_most_ms`, or less."""

    what: str
    percent: float
    at_most_ms: float

    def __str__(self) -> str:
        return f"{self.what}_p{self.percent:g}={self.at_most_ms:g}ms"


def parse(text: str) -> list[Objective]:
    """The objectives with commas between them; none of an empty text. Raises ValueError."""
    found = []
    for word in filter(None, (word.strip() for word in text.split(","))):
        one = _ONE.fullmatch(word)
        if one is None or one["what"] not in TIMES:
            raise ValueError(f"{word!r} is no objective: write such as ttft_p99=500ms, of {', '.join(TIMES)}")
        found.append(Objective(one["what"], float(one["percent"]),
                               float(one["amount"]) * (1000.0 if one["unit"] == "s" else 1.0)))
    return found


def missed(objectives: Iterable[Objective], value_ms: Callable[[str, float], float | None]) -> list[str]:
    """Each objective that is not met, with what was instead. `value_ms(what, percent)`: None where nothing is known."""
    misses = []
    for one in objectives:
        value = value_ms(one.what, one.percent)
        if value is None:
            misses.append(f"{one}: not known")
        elif value > one.at_most_ms:
            misses.append(f"{one}: {value:,.0f}ms" if value >= 1000 else f"{one}: {value:.4g}ms")
    return misses


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The least of `values`, in any order, that so many percent do not exceed; None of nothing."""
    ordered = sorted(values)
    return ordered[_place(len(ordered), percent)] if ordered else None


def counted_percentile(counts: Mapping[int, int], percent: float) -> int | None:
    """As `percentile`, of values that are given with how often each came."""
    ordered = [value for value in sorted(counts) if counts[value] > 0]
    sums = list(accumulate(counts[value] for value in ordered))
    if not sums:
        return None
    place = _place(sums[-1], percent)
    return next(value for value, reached in zip(ordered, sums, strict=True) if reached > place)


def _place(count: int, percent: float) -> int:
    return min(count - 1, max(0, -int(-percent * count // 100) - 1))
