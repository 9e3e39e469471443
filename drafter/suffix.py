"""Kind `suffix`: what usually followed the same words before.

    text of a stream   its own automaton: prompt and what it said
    its audience       what their other streams said lately
    its prediction     what its client expects, from the beginning of the answer on

Rules:
- In each of them the longest phrase that the stream ends with is known at any time; what followed it most often, and of
  equals latest, is the guess, and so on from there. The source whose first guess is likeliest is followed.
- How likely a guess is, and so how far a continuation goes, is learned (`drafter.survival`): every token that comes is
  a lesson for every source, whether something was proposed or not.
- What other sources say, and the other tokens that followed, here and behind shorter phrases, are the outcomes that are
  prepared for; also those behind the last token, where nothing is likely enough to be said at once.
Pure.
"""

from array import array
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from drafter.automaton import SEPARATOR, Automaton, Cursor
from drafter.drafting import Ask, Audience, Continuation, Key, Stream
from drafter.outcomes import likely_outcomes
from drafter.recent import Recent
from drafter.survival import Luck, Source, Survival, cell

# a guess that is right less often than this is not made without condition. 0.2 and 0.35 give 1.84 and 1.77 tokens a
# step to a worker that waits for drafts, 1.67 and 1.66 to one that does not, with 37 and 43 % of the drafts right
# (46 streams of the default model, eight drafts a step: docs/decisions/0018)
LEAST_CONFIDENCE = 0.2
# a continuation ends where less than this of it is likely to be reached, what comes before its answer left out
LEAST_SURVIVAL = 0.05
# and where less than this is, all of it counted
LEAST_REACH = 0.02
# an outcome less likely than this is not prepared for
LEAST_OUTCOME = 0.02
# alternatives at one place, at most
ALTERNATIVES = 2
# how often the first, the second alternative is the one when the guess was wrong; at the start, then learned
FIRST_RECALL = (0.3, 0.1)
RECALL_MEMORY = 0.02
# a new text is taken in by so many tokens a call, 5 us each: other streams wait meanwhile
ABSORB_TOKENS = 1024
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
    """What one source says comes next."""

    token: int
    right: float  # how likely
    cell: int
    spot: _Spot
    behind: _Spot  # the spot with that token


class _Other(NamedTuple):
    """What may come instead."""

    token: int
    behind: _Spot


class _Chain(NamedTuple):
    """Guesses one behind the other."""

    tokens: list[int]
    confidence: list[float]
    spots: list[_Spot]  # before each token, and behind the last


class _Text:
    """One stream."""

    __slots__ = ("guesses", "luck", "own", "prediction", "prompt_tokens", "recent", "taken", "tokens")

    def __init__(self, stream: Stream) -> None:
        self.tokens = array("I", stream.tokens)
        self.prompt_tokens = stream.prompt_tokens
        self.taken = 0  # so many of them are in the automaton
        self.own = Automaton()
        self.recent: list[Cursor] = []
        self.prediction: Cursor | None = None
        self.luck = [Luck() for _ in Source]
        self.guesses: list[_Guess] | None = None  # for what comes next, likeliest first; None: not asked for yet
        if stream.prediction:
            expected = Automaton()
            expected.extend([SEPARATOR, *stream.prediction])
            # the answer begins where the prediction does
            self.prediction = Cursor(expected, expected.step(0, SEPARATOR))

    def spots(self) -> Iterator[_Spot]:
        """Where its end stands in each source that knows it."""
        state = self.own.before
        if state:
            yield _Spot(Source.OWN, self.own, state, self.own.length(state))
        for cursor in self.recent:
            if cursor.length:
                yield _Spot(Source.RECENT, cursor.automaton, cursor.settled(), cursor.length)
        expected = self.prediction
        if expected is not None and expected.length and self.taken >= self.prompt_tokens:
            yield _Spot(Source.PREDICTION, expected.automaton, expected.settled(), expected.length)

    def append(self, token: int) -> None:
        self.own.append(token)
        for cursor in self.recent:
            cursor.follow(token)
        if self.prediction is not None and self.taken >= self.prompt_tokens:
            self.prediction.follow(token)
        self.taken += 1
        self.guesses = None

    def look_at(self, recent: Sequence[Automaton]) -> None:
        """Search these texts of its audience from now on."""
        if [cursor.automaton for cursor in self.recent] == list(recent):
            return
        known = {id(cursor.automaton): cursor for cursor in self.recent}
        self.recent = [known.get(id(automaton)) or self._caught_up(automaton) for automaton in recent]
        self.guesses = None

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
        self._behind: set[Key] = set()

    @property
    def behind(self) -> Collection[Key]:
        return self._behind

    def open(self, key: Key, stream: Stream) -> None:
        self._texts[key] = _Text(stream)

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        self._texts[key].tokens.extend(tokens)

    def close(self, key: Key, audience: Audience | None) -> None:
        text = self._texts.pop(key)
        self._behind.discard(key)
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
            for token in text.tokens[text.taken:text.taken + take]:
                if text.taken >= text.prompt_tokens:
                    self._learn(text, token)
                text.append(token)
            left = max(0, left - take)
            if take < waiting:
                self._behind.add(ask.key)
                continue
            self._behind.discard(ask.key)
            found += self._continuations(ask, text)
        return found

    def _guesses(self, text: _Text) -> list[_Guess]:
        """What each source says comes next, likeliest first."""
        if text.guesses is None:
            guesses = [guess for spot in text.spots() if (guess := self._guess(text, spot)) is not None]
            text.guesses = sorted(guesses, key=_right, reverse=True) if len(guesses) > 1 else guesses
        return text.guesses

    def _guess(self, text: _Text, spot: _Spot) -> _Guess | None:
        """What followed most often, of equals latest; behind a shorter phrase where nothing did."""
        source, automaton, state, length = spot
        while (step := automaton.likeliest(state)) is None:
            state = automaton.link(state)
            if state <= 0:
                return None
            length = automaton.length(state)
        token, after, times, total = step
        number = cell(source, length, times, total)
        return _Guess(token, text.luck[source].of(self.survival.probability[number]), number, spot,
                      _Spot(source, automaton, after, length + 1))

    def _learn(self, text: _Text, token: int) -> None:
        """`token` comes: what each source said of it was right or wrong."""
        guesses = self._guesses(text)
        for guess in guesses:
            text.luck[guess.spot.source].learn(guess.right, guess.token == token)
            self.survival.learn(guess.cell, guess.token == token)
        if guesses and guesses[0].token != token:
            others = _instead(guesses)
            for rank, recall in enumerate(self._recall):
                right = rank < len(others) and others[rank].token == token
                self._recall[rank] = recall + RECALL_MEMORY * (right - recall)

    def _continuations(self, ask: Ask, text: _Text) -> list[Continuation]:
        guesses = self._guesses(text)
        if not guesses:
            return []
        base = len(text.tokens)
        best = self._chain(text, guesses[0].spot, ask.length, ask.lead)
        found = [Continuation(ask.key, base, (), best.tokens, best.confidence)] if best.tokens else []
        if ask.branches <= 0:
            return found
        agreement, chances, others = self._alternatives(text, guesses, best, ask.length)
        for outcome in likely_outcomes(agreement, chances, ask.branches, ALTERNATIVES + 1, LEAST_OUTCOME):
            other = others[outcome.agreed][outcome.rank]
            chain = self._chain(text, other.behind, ask.length)
            if chain.tokens:
                assumed = [*best.tokens[:outcome.agreed], other.token]
                found.append(Continuation(ask.key, base, assumed, chain.tokens, chain.confidence,
                                          outcome.probability))
        return found

    def _chain(self, text: _Text, spot: _Spot, most: int, lead: int = 0) -> _Chain:
        """What usually followed, as far as it is worth saying if its first `lead` tokens turn out right."""
        source, automaton, state, length = spot
        probability, luck = self.survival.probability, text.luck[source]
        chain = _Chain([], [], [spot])
        reach = behind_lead = 1.0
        while len(chain.tokens) < most:
            while (step := automaton.likeliest(state)) is None:
                state = automaton.link(state)
                if state <= 0:
                    return chain
                length = automaton.length(state)
            token, state, times, total = step
            right = luck.of(probability[cell(source, length, times, total)])
            reach *= right
            if len(chain.tokens) >= lead:
                behind_lead *= right
                if right < LEAST_CONFIDENCE:
                    break
            if behind_lead < LEAST_SURVIVAL or reach < LEAST_REACH:
                break
            length += 1
            chain.tokens.append(token)
            chain.confidence.append(right)
            chain.spots.append(_Spot(source, automaton, state, length))
        return chain

    def _alternatives(self, text: _Text, guesses: list[_Guess], best: _Chain,
                      most: int) -> tuple[list[float], list[Sequence[float]], list[list[_Other]]]:
        """For each place of `best`, and for the one behind it: how likely it is right, what may come instead, and how
        likely that is when it is not right."""
        chances: list[Sequence[float]] = []
        others: list[list[_Other]] = []
        reach = 1.0
        for place, (token, right) in enumerate(zip(best.tokens, best.confidence, strict=True)):
            likely = reach * (1.0 - right) * self._recall[0] >= LEAST_OUTCOME
            others.append([] if not likely else _others(best.spots[place], token) if place else _instead(guesses))
            chances.append(self._recall[:len(others[-1])])
            reach *= right
        last = self._guess(text, best.spots[-1]) if len(best.tokens) < most else None
        if last is None or last.right >= LEAST_CONFIDENCE:
            return best.confidence, chances, others
        others.append([_Other(last.token, last.behind), *_others(best.spots[-1], last.token)])
        chances.append([last.right, *((1.0 - last.right) * recall for recall in self._recall)][:len(others[-1])])
        return [*best.confidence, 0.0], chances, others


def _others(spot: _Spot, token: int) -> list[_Other]:
    """What else followed than `token`, also behind shorter phrases, likeliest first."""
    source, automaton, state, length = spot
    found: dict[int, _Other] = {}
    while state > 0 and len(found) < ALTERNATIVES:
        for other, after, _ in automaton.continuations(state)[:ALTERNATIVES + 1]:
            if other != token and other not in found:
                found[other] = _Other(other, _Spot(source, automaton, after, length + 1))
        state = automaton.link(state)
        length = automaton.length(state)
    return list(found.values())[:ALTERNATIVES]


def _instead(guesses: list[_Guess]) -> list[_Other]:
    """What may come instead of the first guess: what other sources say, then what else followed."""
    first = guesses[0]
    found = {guess.token: _Other(guess.token, guess.behind) for guess in guesses[:0:-1] if guess.token != first.token}
    if len(found) < ALTERNATIVES:
        for other in _others(first.spot, first.token):
            found.setdefault(other.token, other)
    return list(found.values())[:ALTERNATIVES]


def _right(guess: _Guess) -> float:
    return guess.right
