"""Kind `suffix`: what usually followed the same words before.

    text of a stream   its own automaton: prompt and what it said
    its audience       what their other streams said lately
    its prediction     what its client expects, from the beginning of the answer on

Rules:
- In each of them the longest phrase that the stream ends with is known at any time; what followed it most often, and of
  equals latest, is the guess, and so on from there. How far, and which source is followed, is decided by how often such
  guesses were right (`drafter.survival`): every token that comes is a lesson for every source.
- The other tokens that followed, here and behind shorter phrases, are the outcomes that are prepared for.
Pure.
"""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from drafter.automaton import SEPARATOR, Automaton, Cursor, Next
from drafter.drafting import Ask, Audience, Continuation, Key, Stream
from drafter.outcomes import likely_outcomes
from drafter.recent import Recent
from drafter.survival import Luck, Source, Survival, cell

# a shorter phrase is no reason. A client's prediction is about this very answer
MIN_MATCH = {Source.OWN: 2, Source.RECENT: 2, Source.PREDICTION: 1}
# a continuation ends where less than this of it is likely to be reached
LEAST_SURVIVAL = 0.05
# a guess that is right less often than this is not made
LEAST_CONFIDENCE = 0.1
# an outcome less likely than this is not prepared for
LEAST_OUTCOME = 0.03
# alternatives at one place, at most
ALTERNATIVES = 2
# how often the first, the second alternative is the one when the guess was wrong; at the start, then learned
FIRST_RECALL = (0.3, 0.1)
RECALL_MEMORY = 0.02
# a new text is taken in by so many tokens a call: other streams wait meanwhile
ABSORB_TOKENS = 4096
# fewer are always taken in
FEW_TOKENS = 64
# a cursor in an automaton that is new to a stream starts so many tokens back
CATCH_UP_TOKENS = 32


class _Spot(NamedTuple):
    """A place in one of the sources: a phrase of `length` tokens that the text ends with."""

    source: Source
    automaton: Automaton
    state: int
    length: int


class _Guess(NamedTuple):
    """What may come next at a spot."""

    token: int
    behind: _Spot  # the spot with that token
    cell: int


class _Chain(NamedTuple):
    guesses: list[_Guess]
    confidence: list[float]
    spots: list[_Spot]  # before each guess

    @property
    def tokens(self) -> list[int]:
        return [guess.token for guess in self.guesses]

    @property
    def worth(self) -> float:
        """Tokens that are expected to be right."""
        reach, worth = 1.0, 0.0
        for right in self.confidence:
            reach *= right
            worth += reach
        return worth


class _Text:
    """One stream."""

    __slots__ = ("luck", "own", "prediction", "prompt_tokens", "recent", "taken", "tokens")

    def __init__(self, stream: Stream) -> None:
        self.tokens = array("I", stream.tokens)
        self.prompt_tokens = stream.prompt_tokens
        self.taken = 0  # so many of them are in the automaton
        self.own = Automaton()
        self.recent: list[Cursor] = []
        self.prediction: Cursor | None = None
        self.luck = [Luck() for _ in Source]
        if stream.prediction:
            expected = Automaton()
            expected.extend([SEPARATOR, *stream.prediction])
            # the answer begins where the prediction does
            self.prediction = Cursor(expected, expected.step(0, SEPARATOR))

    def spots(self) -> Iterator[_Spot]:
        """Where its end stands in each source that knows it."""
        state = self.own.before
        if (length := self.own.length(state)) >= MIN_MATCH[Source.OWN]:
            yield _Spot(Source.OWN, self.own, state, length)
        for cursor in self.recent:
            if cursor.length >= MIN_MATCH[Source.RECENT]:
                yield _Spot(Source.RECENT, cursor.automaton, cursor.settled(), cursor.length)
        expected = self.prediction
        if (expected is not None and expected.length >= MIN_MATCH[Source.PREDICTION]
                and self.taken >= self.prompt_tokens):
            yield _Spot(Source.PREDICTION, expected.automaton, expected.settled(), expected.length)

    def append(self, token: int) -> None:
        self.own.append(token)
        for cursor in self.recent:
            cursor.follow(token)
        if self.prediction is not None and self.taken >= self.prompt_tokens:
            self.prediction.follow(token)
        self.taken += 1

    def look_at(self, recent: Sequence[Automaton]) -> None:
        """Search these texts of its audience from now on."""
        if [cursor.automaton for cursor in self.recent] == list(recent):
            return
        known = {id(cursor.automaton): cursor for cursor in self.recent}
        self.recent = [known.get(id(automaton)) or self._caught_up(automaton) for automaton in recent]

    def _caught_up(self, automaton: Automaton) -> Cursor:
        cursor = Cursor(automaton)
        for token in self.tokens[max(0, self.taken - CATCH_UP_TOKENS):self.taken]:
            cursor.follow(token)
        return cursor


class SuffixDraftsman:
    """A `drafter.drafting.Draftsman`."""

    kind = "suffix"
    vocabulary = ""
    threaded = False

    def __init__(self) -> None:
        self.recent = Recent()
        self.survival = Survival()
        self._recall = list(FIRST_RECALL)
        self._texts: dict[Key, _Text] = {}

    def open(self, key: Key, stream: Stream) -> None:
        self._texts[key] = _Text(stream)

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        self._texts[key].tokens.extend(tokens)

    def close(self, key: Key, audience: Audience | None) -> None:
        text = self._texts.pop(key)
        if audience is not None:
            self.recent.add(audience, text.tokens, text.prompt_tokens)

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        found: list[Continuation] = []
        left = ABSORB_TOKENS
        for ask in asks:
            text = self._texts[ask.key]
            text.look_at(self.recent.of(ask.audience) if ask.audience is not None else ())
            waiting = len(text.tokens) - text.taken
            take = waiting if waiting <= FEW_TOKENS else min(waiting, left)
            self._take_in(text, take)
            left -= take
            if take == waiting:
                found += self._continuations(ask, text)
        return found

    # --- taking in ---------------------------------------------------------------------------------------------------

    def _take_in(self, text: _Text, count: int) -> None:
        for token in text.tokens[text.taken:text.taken + count]:
            if text.taken >= text.prompt_tokens:
                self._learn(text, token)
            text.append(token)

    def _learn(self, text: _Text, token: int) -> None:
        """What each source would have said of `token`."""
        survival = self.survival
        best, believed = None, 0.0
        for spot in text.spots():
            guess = _guess(spot)
            if guess is None:
                continue
            luck = text.luck[spot.source]
            probability = luck.of(survival.probability[guess.cell])
            luck.learn(probability, guess.token == token)
            survival.learn(guess.cell, guess.token == token)
            if probability > believed:
                best, believed = guess, probability
                place = spot
        if best is not None and best.token != token:
            others = _others(place, best.token)
            for rank in range(len(self._recall)):
                right = rank < len(others) and others[rank].token == token
                self._recall[rank] += RECALL_MEMORY * (right - self._recall[rank])

    # --- proposing ---------------------------------------------------------------------------------------------------

    def _continuations(self, ask: Ask, text: _Text) -> list[Continuation]:
        chains = sorted((self._chain(text, spot, ask.length, ask.lead) for spot in text.spots()),
                        key=lambda chain: chain.worth, reverse=True)
        if not chains or not chains[0].guesses:
            return []
        best, base = chains[0], len(text.tokens)
        found = [Continuation(ask.key, base, (), best.tokens, best.confidence)]
        if ask.branches <= 0:
            return found
        others = _alternatives(best, chains[1:])
        chances = [self._recall[:len(guesses)] for guesses in others]
        for outcome in likely_outcomes(best.confidence, chances, ask.branches, ALTERNATIVES, LEAST_OUTCOME):
            other = others[outcome.agreed][outcome.rank]
            chain = self._chain(text, other.behind, ask.length)
            if chain.guesses:
                assumed = [*best.tokens[:outcome.agreed], other.token]
                found.append(Continuation(ask.key, base, assumed, chain.tokens, chain.confidence))
        return found

    def _chain(self, text: _Text, spot: _Spot, most: int, lead: int = 0) -> _Chain:
        """What usually followed, as far as it is worth saying if its first `lead` tokens turn out right."""
        probability, luck = self.survival.probability, text.luck[spot.source]
        chain = _Chain([], [], [])
        reach = 1.0
        while len(chain.guesses) < most and (guess := _guess(spot)) is not None:
            right = luck.of(probability[guess.cell])
            if len(chain.guesses) >= lead:
                reach *= right
            if right < LEAST_CONFIDENCE or reach < LEAST_SURVIVAL:
                break
            chain.guesses.append(guess)
            chain.confidence.append(right)
            chain.spots.append(spot)
            spot = guess.behind
        return chain


def _guess(spot: _Spot) -> _Guess | None:
    """What followed most often, of equals latest; behind a shorter phrase where nothing did."""
    automaton, state, length = spot.automaton, spot.state, spot.length
    least = MIN_MATCH[spot.source]
    while True:
        if (only := automaton.only(state)) is not None:
            return _of(spot, length, only, only.times)
        if steps := automaton.continuations(state):
            total = sum(step.times for step in steps)
            return _of(spot, length, max(steps, key=lambda step: _usual(automaton, step)), total)
        state = automaton.link(state)
        if state < 0 or (length := automaton.length(state)) < least:
            return None


def _others(spot: _Spot, token: int) -> list[_Guess]:
    """What else followed than `token`, also behind shorter phrases, likeliest first."""
    automaton, state, length = spot.automaton, spot.state, spot.length
    found: dict[int, _Guess] = {}
    while len(found) < ALTERNATIVES and length >= MIN_MATCH[spot.source]:
        steps = sorted(automaton.continuations(state), key=lambda step: _usual(automaton, step), reverse=True)
        total = sum(step.times for step in steps)
        for step in steps[:ALTERNATIVES + 1]:
            if step.token != token and step.token not in found:
                found[step.token] = _of(spot, length, step, total)
        state = automaton.link(state)
        if state < 0:
            break
        length = automaton.length(state)
    return list(found.values())[:ALTERNATIVES]


def _alternatives(best: _Chain, rivals: list[_Chain]) -> list[list[_Guess]]:
    """At each place of `best` what may come instead: what a rival says where it parts, then what else followed."""
    found = [_others(spot, guess.token) for spot, guess in zip(best.spots, best.guesses, strict=True)]
    for rival in rivals:
        for place, (mine, other) in enumerate(zip(best.guesses, rival.guesses, strict=False)):
            if mine.token != other.token:
                rest = [guess for guess in found[place] if guess.token != other.token]
                found[place] = [other, *rest][:ALTERNATIVES]
                break
    return found


def _of(spot: _Spot, length: int, step: Next, total: int) -> _Guess:
    behind = _Spot(spot.source, spot.automaton, step.state, length + 1)
    return _Guess(step.token, behind, cell(spot.source, length, step.times, total))


def _usual(automaton: Automaton, step: Next) -> tuple[int, int]:
    return step.times, automaton.latest(step.state)
