"""How likely a guess is right, learned from what happened.

Rules:
- What speaks for a guess is where it was found, how long the phrase before it is, and how often and how unanimously it
  followed. Guesses with the same things behind them are one cell, and each token that comes counts for or against.
- A stream that repeats itself does so more reliably than the next one: `Luck` shifts the odds of all its guesses.
Pure.
"""

from bisect import bisect_right
from enum import IntEnum


class Source(IntEnum):
    """Where a guess was found."""

    OWN = 0  # prompt and own output
    RECENT = 1  # what the audience's other streams said
    PREDICTION = 2  # what the client expects


# first lengths of the classes of phrases
LENGTHS = (1, 2, 3, 4, 6, 9, 17, 33)
# how a token followed: once, two or three times, more often, mostly, seldom
EVIDENCE = 5
# what is believed before anything was seen, by length of the phrase and by evidence: what 46 streams of the default
# model taught (docs/decisions/0018)
FIRST = (0.25, 0.45, 0.55, 0.7, 0.8, 0.9, 0.95, 0.95)
FIRST_OF_EVIDENCE = (1.0, 1.15, 1.25, 0.65, 0.4)
# a belief counts as so many tokens, and what was seen long ago is forgotten over so many
FIRST_WEIGHT = 8.0
LONGEST_WEIGHT = 400.0
LUCK_RATE = 0.15
MOST_LUCK = 8.0

_LONGEST = LENGTHS[-1]
# the first cell of each source and length
_FIRST_CELL = tuple(tuple((source * len(LENGTHS) + bisect_right(LENGTHS, max(1, length)) - 1) * EVIDENCE
                          for length in range(_LONGEST + 1)) for source in Source)


def cell(source: Source, length: int, times: int, total: int) -> int:
    """Which cell a guess belongs to: a phrase of `length` tokens, which it followed `times` of `total` times."""
    first = _FIRST_CELL[source][length if length < _LONGEST else _LONGEST]
    if times == total:
        return first if times == 1 else first + 1 if times < 4 else first + 2
    return first + 3 if 2 * times >= total else first + 4


class Survival:
    """Right and wrong guesses of all streams of a drafter."""

    def __init__(self) -> None:
        self.probability = [min(0.95, first * factor) for _ in Source for first in FIRST
                            for factor in FIRST_OF_EVIDENCE]
        self._weight = [FIRST_WEIGHT] * len(self.probability)

    def learn(self, cell: int, right: bool) -> None:
        """A guess of this cell met the token."""
        weight = self._weight[cell] = min(self._weight[cell] + 1.0, LONGEST_WEIGHT)
        self.probability[cell] += (right - self.probability[cell]) / weight


class Luck:
    """How much better or worse than usual the guesses for one stream are: a factor of the odds."""

    __slots__ = ("odds",)

    def __init__(self) -> None:
        self.odds = 1.0

    def of(self, probability: float) -> float:
        """`probability` for this stream."""
        good = probability * self.odds
        return good / (good + 1.0 - probability)

    def learn(self, probability: float, right: bool) -> None:
        """A guess that was given `probability` (by `of`) met the token."""
        self.odds = min(MOST_LUCK, max(1.0 / MOST_LUCK, self.odds * (1.0 + LUCK_RATE * (right - probability))))


class Calibration:
    """What a stated probability has turned out to mean."""

    def __init__(self, bins: int = 10) -> None:
        self._bins = bins
        self._probability = [(index + 0.5) / bins for index in range(bins)]
        self._weight = [FIRST_WEIGHT] * bins

    def of(self, stated: float) -> float:
        """How often guesses with about this stated probability were right."""
        return self._probability[self._bin(stated)]

    def learn(self, stated: float, right: bool) -> None:
        """A guess with this stated probability met the token."""
        index = self._bin(stated)
        weight = self._weight[index] = min(self._weight[index] + 1.0, LONGEST_WEIGHT)
        self._probability[index] += (right - self._probability[index]) / weight

    def _bin(self, stated: float) -> int:
        return min(self._bins - 1, max(0, int(stated * self._bins)))
