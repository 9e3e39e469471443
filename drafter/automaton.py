"""All that a text has said before, found at once: a suffix automaton that grows token by token.

A state stands for a set of phrases that end at the same places of the text; `step` goes from a phrase to the longer one
with a token more, `link` to the longest shorter one that stands in more places. Source: Blumer et al., "The smallest
automaton recognizing the subwords of a text" (1985); appending costs constant time on average, and there are at most
two states and three steps for each token.

Rules:
- Each state counts its places and knows the latest, so that of several continuations the usual one is found. A token
  counts for the `MOST_LINKS` longest phrases that end with it: text that repeats one word would cost its square.
- Most states have one step, which lies in two flat arrays; the others are in a dict. Nothing is ever removed: a text is
  bounded by whoever owns it.
- `SEPARATOR` stands between texts and in no text. No phrase that is looked for holds it, and no guess goes past it.
Pure.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import islice

SEPARATOR = 0xFFFF_FFFF
MOST_LINKS = 32
# of a phrase with more continuations so many are looked at: it tells little anyway
MOST_STEPS = 32


class Automaton:
    """State 0 is the empty phrase."""

    def __init__(self) -> None:
        self._length = array("i", [0])  # of the longest phrase of each state
        self._link = array("i", [-1])
        self._times = array("i", [0])
        self._latest = array("i", [0])  # where the text had come to
        self._token = array("I", [0])
        self._next = array("i", [0])  # by `_token`; 0: there is no step, as none leads to the empty phrase
        self._more: dict[int, dict[int, int]] = {0: {}}
        self._last = 0
        self._steps = 0  # in `_more`
        self._tokens = 0

    def __len__(self) -> int:
        """Tokens appended."""
        return self._tokens

    @property
    def bytes_estimate(self) -> int:
        """Memory, about: flat arrays, and what a dict and its entries take."""
        return 24 * len(self._link) + 232 * len(self._more) + 60 * self._steps

    @property
    def before(self) -> int:
        """The longest end of the text that stood in it before."""
        return max(0, self._link[self._last])

    def length(self, state: int) -> int:
        """Tokens of its longest phrase."""
        return self._length[state]

    def link(self, state: int) -> int:
        """The longest end of its phrases that stands in more places; -1 for the empty phrase."""
        return self._link[state]

    def step(self, state: int, token: int) -> int:
        """The phrase with `token` behind it, 0 if the text never said it."""
        if self._token[state] == token and self._next[state]:
            return self._next[state]
        more = self._more.get(state)
        return more.get(token, 0) if more is not None else 0

    def likeliest(self, state: int) -> tuple[int, int, int, int] | None:
        """What followed most often, of equals latest: token, the phrase with it, how often, of how many times.

        None where nothing followed but a separator.
        """
        after = self._next[state]
        more = self._more.get(state)
        times = self._times
        if more is None:
            if not after or (token := self._token[state]) == SEPARATOR:
                return None
            return token, after, times[after], times[after]
        best = total = best_times = best_latest = 0
        token = SEPARATOR
        latest = self._latest
        if after and self._token[state] != SEPARATOR:
            token, best, total, best_latest = self._token[state], after, times[after], latest[after]
            best_times = total
        for other, after in islice(more.items(), MOST_STEPS):
            if other != SEPARATOR:
                count = times[after]
                total += count
                if count > best_times or (count == best_times and latest[after] > best_latest):
                    token, best, best_times, best_latest = other, after, count, latest[after]
        return (token, best, best_times, total) if best else None

    def continuations(self, state: int) -> list[tuple[int, int, int]]:
        """What followed, most often first, of equals latest: token, the phrase with it, how often."""
        found = []
        if (after := self._next[state]) and self._token[state] != SEPARATOR:
            found.append((self._token[state], after, self._times[after]))
        if (more := self._more.get(state)) is not None:
            found += [(token, after, self._times[after]) for token, after in islice(more.items(), MOST_STEPS)
                      if token != SEPARATOR]
            found.sort(key=lambda step: (step[2], self._latest[step[1]]), reverse=True)
        return found

    def latest(self, state: int) -> int:
        """How long the text was when it last said this phrase."""
        return self._latest[state]

    def extend(self, tokens: Iterable[int]) -> None:
        """Append. Raises OverflowError at a token that is no unsigned 32-bit number; those before it are appended."""
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One token more. Raises OverflowError when it is no unsigned 32-bit number; nothing is appended then."""
        if not 0 <= token <= SEPARATOR:
            raise OverflowError(f"{token} is no token id")
        length, link = self._length, self._link
        self._tokens += 1
        new = self._add(length[self._last] + 1, 1)
        state, found = self._last, 0
        while state >= 0 and not (found := self.step(state, token)):
            self._put(state, token, new)
            state = link[state]
        if state < 0:
            link[new] = 0
        elif length[state] + 1 == length[found]:
            link[new] = found
        else:
            link[new] = self._split(state, token, found)
        self._last = new
        times, latest, now = self._times, self._latest, self._tokens
        state = link[new]
        for _ in range(MOST_LINKS):
            if state <= 0:
                break
            times[state] += 1
            latest[state] = now
            state = link[state]

    def _split(self, state: int, token: int, found: int) -> int:
        """The shorter phrases of `found`, up to that of `state` and `token`, become a state of their own."""
        short = self._add(self._length[state] + 1, self._times[found])
        self._link[short] = self._link[found]
        self._latest[short] = self._latest[found]
        self._token[short], self._next[short] = self._token[found], self._next[found]
        if (more := self._more.get(found)) is not None:
            self._more[short] = dict(more)
            self._steps += len(more)
        while state >= 0 and self.step(state, token) == found:
            self._put(state, token, short)
            state = self._link[state]
        self._link[found] = short
        return short

    def _add(self, length: int, times: int) -> int:
        self._length.append(length)
        self._link.append(0)
        self._times.append(times)
        self._latest.append(self._tokens)
        self._token.append(0)
        self._next.append(0)
        return len(self._link) - 1

    def _put(self, state: int, token: int, after: int) -> None:
        if state and (not self._next[state] or self._token[state] == token):
            self._token[state], self._next[state] = token, after
            return
        more = self._more.get(state)
        if more is None:
            more = self._more[state] = {}
        self._steps += token not in more
        more[token] = after


class Cursor:
    """Where the end of one text was said in the text of an automaton, longest phrase first."""

    __slots__ = ("automaton", "length", "state")

    def __init__(self, automaton: Automaton, state: int = 0) -> None:
        self.automaton = automaton
        self.state = state
        self.length = automaton.length(state)

    def follow(self, token: int) -> None:
        """The text goes on with `token`."""
        automaton, state = self.automaton, self.settled()
        while not (after := automaton.step(state, token)):
            state = automaton.link(state)
            if state < 0:
                self.state = self.length = 0
                return
            self.length = automaton.length(state)
        self.state = after
        self.length += 1

    def settled(self) -> int:
        """Its state now: states are split as the automaton grows."""
        automaton, state = self.automaton, self.state
        while (link := automaton.link(state)) >= 0 and self.length <= automaton.length(link):
            state = link
        self.state = state
        return state
