"""What an audience's streams said lately: the second place to look for what follows.

Rule: an audience is everyone who may see a text: one tenant (law 10), one model, because token ids mean nothing in
another vocabulary, and one zone, because what was said in a zone stays there (law 7). Nothing passes between audiences.
Pure.
"""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from drafter.suffix import MIN_MATCH, Match, RecentTexts

# what stands before an output, so that the answer to a question is found by the question
LEAD_TOKENS = 32
MAX_AUDIENCES = 128
TOKENS_PER_AUDIENCE = 65_536


class Audience(NamedTuple):
    """Who may see a text."""

    tenant: str
    model: str
    zone: str


class Recent:
    """The recent outputs of many audiences. Those unused for longest make room."""

    def __init__(self, max_audiences: int = MAX_AUDIENCES, tokens_per_audience: int = TOKENS_PER_AUDIENCE) -> None:
        self._max_audiences = max_audiences
        self._tokens_per_audience = tokens_per_audience
        self._texts: OrderedDict[Audience, RecentTexts] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def tokens(self) -> int:
        """Remembered, of all audiences together."""
        return sum(map(len, self._texts.values()))

    def add(self, audience: Audience, tokens: Sequence[int], prompt_tokens: int) -> None:
        """A stream of this audience ended; its first `prompt_tokens` were the prompt."""
        if len(tokens) - prompt_tokens < MIN_MATCH:
            return
        texts = self._texts.get(audience)
        if texts is None:
            texts = self._texts[audience] = RecentTexts(self._tokens_per_audience)
            if len(self._texts) > self._max_audiences:
                self._texts.popitem(last=False)
        self._texts.move_to_end(audience)
        texts.add(tokens[max(0, prompt_tokens - LEAD_TOKENS):])

    def longest_match(self, audience: Audience, end: "array[int]", most: int) -> Match | None:
        """Up to `most` tokens that followed the longest occurrence of the end of `end` in what this audience said."""
        texts = self._texts.get(audience)
        return texts.longest_match(end, most) if texts is not None else None
