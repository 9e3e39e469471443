"""What usually follows: continuations found in text that was seen before.

Rules: the longest match of the stream's end decides; among equally long ones what followed most often, and of those the
latest. A match shorter than `MIN_MATCH` says nothing. The tokens a match gives are a guess that a worker verifies, so
every limit here costs a guess and never a token.
Pure.

A text is indexed as LZ77 compressors do it: each position is chained to the previous one whose last `MIN_MATCH` tokens
hash alike, in two flat arrays. Appending costs one table access whatever the text, a search looks at no more than
`MAX_TRIED` candidates, and a token costs 16 bytes; a suffix automaton finds the same matches for several hundred.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

# 1, 2, 3 give 1.47, 1.39, 1.27 tokens a step on source code and 1.26, 1.18, 1.12 on prose, with 26, 27, 29 and 21, 23,
# 26 % of the drafts right: the second halves of 40 source files and 9 documents, in word pieces, eight drafts a step
MIN_MATCH = 2
# longer matches are no better a reason
MAX_MATCH = 48
MAX_TRIED = 24
# a match of n tokens is a reason for so many times n; 4 proposes more and not one token more is right
REACH = 2
# stands between texts and in no text: matches and continuations end there
SEPARATOR = 0xFFFF_FFFF

_FIRST_TABLE = 64


class Match(NamedTuple):
    """The end of a stream was seen before: `length` tokens of it, and `tokens` followed."""

    length: int
    tokens: list[int]


class History:
    """A growing text and where to find things in it."""

    def __init__(self) -> None:
        self.tokens = array("I")
        # `_latest[hash]` and `_earlier[end]` are ends: how many tokens stand up to and with a match
        self._latest = array("i", [0]) * _FIRST_TABLE
        self._earlier = array("i", [0])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def bytes_estimate(self) -> int:
        """Memory of the arrays."""
        return 4 * (len(self.tokens) + len(self._latest) + len(self._earlier))

    def extend(self, tokens: Sequence[int]) -> None:
        """Append. Raises OverflowError when a token is no unsigned 32-bit number; nothing is appended then."""
        begin = len(self.tokens)
        self.tokens.extend(array("I", tokens))
        if len(self.tokens) > len(self._latest):
            self._grow()
        else:
            self._link(begin)

    def longest_match(self, end: array[int], most: int) -> Match | None:
        """Up to `most` tokens that followed the longest earlier occurrence of the end of `end`.

        `end` may be this very text, which then does not match itself at its own end: a continuation that reaches that
        end goes on with what it has just said, as repetitive text does.
        """
        tokens, length = self.tokens, len(self.tokens)
        said = _behind_separator(end[-MAX_MATCH:])
        if len(said) < MIN_MATCH or most <= 0:
            return None
        candidate = self._latest[_slot(said[-2], said[-1], len(self._latest))]
        longest = 0
        follows: dict[int, list[int]] = {}  # next token -> how often, the latest end before it
        for _ in range(MAX_TRIED):
            if not candidate:
                break
            if candidate < length and tokens[candidate] != SEPARATOR:
                matched = _match_length(tokens, candidate, said)
                if matched >= MIN_MATCH and matched >= longest:
                    if matched > longest:
                        longest = matched
                        follows.clear()
                    seen = follows.setdefault(tokens[candidate], [0, candidate])
                    seen[0] += 1
            candidate = self._earlier[candidate]
        if not follows:
            return None
        # the latest was met first, and max keeps the first of equals
        start = max(follows.values(), key=lambda seen: seen[0])[1]
        return Match(longest, self._continue(start, min(most, REACH * longest), end is tokens))

    def _continue(self, start: int, count: int, wraps: bool) -> list[int]:
        found = self.tokens[start:start + count].tolist()
        if SEPARATOR in found:
            return found[:found.index(SEPARATOR)]
        period = len(found)
        if wraps and 0 < period < count:
            found = (found * (count // period + 1))[:count]
        return found

    def _link(self, begin: int) -> None:
        """Chain the positions behind `begin`."""
        tokens, latest, earlier = self.tokens, self._latest, self._earlier
        size = len(latest)
        for end in range(begin + 1, len(tokens) + 1):
            if end < MIN_MATCH:
                earlier.append(0)
                continue
            slot = _slot(tokens[end - 2], tokens[end - 1], size)
            earlier.append(latest[slot])
            latest[slot] = end

    def _grow(self) -> None:
        size = len(self._latest)
        while size < len(self.tokens):
            size *= 2
        self._latest = array("i", [0]) * size
        self._earlier = array("i", [0])
        self._link(0)


class RecentTexts:
    """What one tenant's streams said lately, in two halves: when the younger is full the older is let go."""

    def __init__(self, max_tokens: int) -> None:
        self._half = max(1, max_tokens // 2)
        self._young = History()
        self._old = History()

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def add(self, tokens: Sequence[int]) -> None:
        """Remember a text; of a very long one its end."""
        if len(self._young) + len(tokens) + 1 > self._half and len(self._young):
            self._old, self._young = self._young, History()
        self._young.extend([SEPARATOR, *tokens[-self._half:]])

    def longest_match(self, end: array[int], most: int) -> Match | None:
        """As `History.longest_match`; the younger half first."""
        young = self._young.longest_match(end, most)
        old = self._old.longest_match(end, most)
        return longer(young, old)


def longer(first: Match | None, second: Match | None) -> Match | None:
    """The longer match; the first of equals, unless it has nothing to say."""
    if first is None or not first.tokens:
        return second if second is not None and second.tokens else None
    if second is None or not second.tokens or second.length <= first.length:
        return first
    return second


def _slot(a: int, b: int, size: int) -> int:
    # tuples of numbers hash alike in every process
    return hash((a, b)) & size - 1


def _behind_separator(tokens: array[int]) -> array[int]:
    """What stands behind the last separator."""
    if SEPARATOR not in tokens:
        return tokens
    return tokens[len(tokens) - tokens[::-1].index(SEPARATOR):]


def _match_length(tokens: array[int], candidate: int, said: array[int]) -> int:
    """How many tokens before `candidate` equal the end of `said`."""
    most = min(candidate, len(said))
    if tokens[candidate - most:candidate] == said[len(said) - most:]:
        return most
    length = 0
    while tokens[candidate - 1 - length] == said[-1 - length]:
        length += 1
    return length
