"""Kind `hybrid`: of two ways of drafting the better one at each position.

Rules:
- What each states of its guesses is taken for what it has turned out to mean (`drafter.survival.Calibration`). Where
  both say the same that is measured apart, because it is right more often than either.
- They are followed together while they agree. Where they part, the one that expects more right tokens from there on
  goes on, and the other becomes an outcome that is prepared for.
- The quick one is asked first; of a stream that it is sure of the slow one is not asked.
Pure.
"""

from collections.abc import Collection, Sequence
from math import prod
from typing import NamedTuple

from drafter.drafting import Ask, Audience, Continuation, Draftsman, Key, Stream
from drafter.survival import Calibration

# a continuation of which all tokens are right with this probability needs no second opinion
SURE = 0.7


class _Said(NamedTuple):
    """A likeliest continuation that waits to be judged."""

    base: int
    tokens: Sequence[int]
    stated: Sequence[float]


class HybridDraftsman:
    """A `drafter.drafting.Draftsman` of two."""

    kind = "hybrid"

    def __init__(self, quick: Draftsman, slow: Draftsman) -> None:
        self.vocabulary = slow.vocabulary or quick.vocabulary
        self.threaded = quick.threaded or slow.threaded
        self._both = (quick, slow)
        self._meaning = (Calibration(), Calibration())
        self._agreed = Calibration()
        self._said: dict[Key, list[_Said | None]] = {}

    @property
    def behind(self) -> Collection[Key]:
        return {*self._both[0].behind, *self._both[1].behind}

    def open(self, key: Key, stream: Stream) -> None:
        self._said.pop(key, None)
        for draftsman in self._both:
            draftsman.open(key, stream)

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        if (said := self._said.get(key)) is not None:
            self._judge(said, base, tokens)
        for draftsman in self._both:
            draftsman.advance(key, base, tokens)

    def close(self, key: Key, audience: Audience | None) -> None:
        self._said.pop(key, None)
        for draftsman in self._both:
            draftsman.close(key, audience)

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        quick = _by_key(self._both[0].propose(asks, budget_s))
        unsure = [ask for ask in asks if not self._is_sure(ask, quick.get(ask.key, []))]
        slow = _by_key(self._both[1].propose(unsure, budget_s)) if unsure else {}
        found: list[Continuation] = []
        for ask in asks:
            ours = (quick.get(ask.key, []), slow.get(ask.key, []))
            self._said[ask.key] = [_said(continuations) for continuations in ours]
            found += self._joined(ask, ours)
        return found

    def _is_sure(self, ask: Ask, continuations: list[Continuation]) -> bool:
        if not continuations or continuations[0].assumed or len(continuations[0].tokens) < ask.length:
            return False
        reach = 1.0
        for stated in continuations[0].confidence:
            reach *= self._meaning[0].of(stated)
        return reach >= SURE

    def _judge(self, said: list[_Said | None], base: int, tokens: Sequence[int]) -> None:
        """Tokens came: each guess up to the first wrong one is a lesson."""
        for number, token in enumerate(tokens):
            stated = [_at(one, base + number) for one in said]
            guesses = [guess for guess in stated if guess is not None]
            if len(guesses) == 2 and guesses[0][0] == guesses[1][0]:
                believed = max(self._meaning[index].of(guess[1]) for index, guess in enumerate(guesses))
                self._agreed.learn(believed, guesses[0][0] == token)
            for index, guess in enumerate(stated):
                if guess is None:
                    continue
                self._meaning[index].learn(guess[1], guess[0] == token)
                if guess[0] != token:
                    said[index] = None

    def _joined(self, ask: Ask, ours: tuple[list[Continuation], list[Continuation]]) -> list[Continuation]:
        first, second = (self._likeliest(index, continuations) for index, continuations in enumerate(ours))
        if first is None or second is None or first.base != second.base:
            return [self._meant(index, one) for index, continuations in enumerate(ours) for one in continuations]
        tokens: list[int] = []
        confidence: list[float] = []
        for mine, other, right, also in zip(first.tokens, second.tokens, first.confidence, second.confidence,
                                            strict=False):
            if mine != other:
                break
            tokens.append(mine)
            confidence.append(self._agreed.of(max(right, also)))
        at = len(tokens)
        better, worse = (first, second) if _worth(first, at) >= _worth(second, at) else (second, first)
        joined = Continuation(ask.key, first.base, (), [*tokens, *better.tokens[at:]],
                              [*confidence, *better.confidence[at:]])
        branches = {}
        if at + 1 < len(worse.tokens) and at < len(better.tokens):
            assumed = (*tokens, worse.tokens[at])
            agreed = prod(confidence)
            branches[assumed] = Continuation(ask.key, first.base, assumed, worse.tokens[at + 1:],
                                             worse.confidence[at + 1:],
                                             agreed * min(worse.confidence[at], 1.0 - better.confidence[at]))
        for index, continuations in enumerate(ours):
            for one in continuations:
                assumed = tuple(one.assumed)
                if assumed and assumed != tuple(joined.tokens[:len(assumed)]):
                    branches.setdefault(assumed, self._meant(index, one))
        return [joined, *list(branches.values())[:ask.branches]]

    def _likeliest(self, index: int, continuations: list[Continuation]) -> Continuation | None:
        return self._meant(index, continuations[0]) if continuations and not continuations[0].assumed else None

    def _meant(self, index: int, continuation: Continuation) -> Continuation:
        """With what its confidence has turned out to mean."""
        return continuation._replace(confidence=[self._meaning[index].of(stated)
                                                 for stated in continuation.confidence])


def _by_key(continuations: list[Continuation]) -> dict[Key, list[Continuation]]:
    found: dict[Key, list[Continuation]] = {}
    for continuation in continuations:
        found.setdefault(continuation.key, []).append(continuation)
    return found


def _said(continuations: list[Continuation]) -> _Said | None:
    if not continuations or continuations[0].assumed:
        return None
    return _Said(continuations[0].base, continuations[0].tokens, continuations[0].confidence)


def _at(said: _Said | None, position: int) -> tuple[int, float] | None:
    """The guess for the token at `position`, and what was stated of it."""
    if said is None or not 0 <= position - said.base < len(said.tokens):
        return None
    return said.tokens[position - said.base], said.stated[position - said.base]


def _worth(continuation: Continuation, start: int) -> float:
    """Tokens expected to be right from `start` on."""
    reach, worth = 1.0, 0.0
    for right in continuation.confidence[start:]:
        reach *= right
        worth += reach
    return worth
