"""How much of what a client predicted its answer came to hold.

Rule: a predicted token is accepted when the answer said it in its place of a run: from the beginning on, and behind a
difference again from the next two tokens in a row that both texts share further on. Each is accepted once, so accepted
and rejected ones are all there are. This is about the texts alone: no drafter need have seen them.
Pure.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property


class PredictedText:
    """What is expected, for all choices of a request."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    @cached_property
    def behind(self) -> dict[tuple[int, int], list[int]]:
        """Two tokens in a row -> the places behind them, in order."""
        found: dict[tuple[int, int], list[int]] = {}
        for end in range(2, len(self.tokens) + 1):
            found.setdefault((self.tokens[end - 2], self.tokens[end - 1]), []).append(end)
        return found


class PredictionMatch:
    """One choice, as it comes, beside what was predicted."""

    def __init__(self, predicted: PredictedText) -> None:
        self.accepted = 0
        self._predicted = predicted
        self._next = 0  # the place that is expected; all before it is past
        self._lost = False
        self._last: int | None = None
        self._last_accepted = False

    def follow(self, tokens: Sequence[int]) -> None:
        """The answer goes on."""
        expected = self._predicted.tokens
        for token in tokens:
            accepted = False
            if not self._lost and self._next < len(expected) and expected[self._next] == token:
                self._next += 1
                self.accepted += 1
                accepted = True
            elif self._last is not None and (end := self._found(self._last, token)) is not None:
                # the token before may have found its place already
                self.accepted += 1 if self._last_accepted or end - 2 < self._next else 2
                self._next, self._lost, accepted = end, False, True
            else:
                self._lost = True
            self._last, self._last_accepted = token, accepted

    def _found(self, last: int, token: int) -> int | None:
        """The first place further on that has these two tokens before it."""
        ends = self._predicted.behind.get((last, token), [])
        place = bisect_left(ends, self._next + 1)
        return ends[place] if place < len(ends) else None
