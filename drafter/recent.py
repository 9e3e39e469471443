"""What an audience's streams said lately: the second place to look for what follows.

Rule: an audience is everyone who may see a text: one tenant (law 10), one model, because token ids mean nothing in
another vocabulary, and one zone, because what was said in a zone stays there (law 7). Nothing passes between audiences.
Pure.
"""

from collections import OrderedDict
from collections.abc import Sequence

from drafter.automaton import SEPARATOR, Automaton
from drafter.drafting import Audience

# what stands before an output, so that the answer to a question is found by the question
LEAD_TOKENS = 32
# shorter outputs hold nothing to find
LEAST_OUTPUT = 2
MAX_AUDIENCES = 128
TOKENS_PER_AUDIENCE = 32_768
# of all audiences together
MAX_TOKENS = 1_000_000


class RecentTexts:
    """What one audience's streams said lately, in two halves: when the younger is full the older is let go."""

    def __init__(self, max_tokens: int) -> None:
        self._half = max(2, max_tokens // 2)
        self.young = Automaton()
        self.old = Automaton()

    def __len__(self) -> int:
        return len(self.young) + len(self.old)

    def add(self, tokens: Sequence[int]) -> None:
        """Remember a text; of a very long one its end."""
        tokens = tokens[-self._half + 1:]
        if len(self.young) + len(tokens) + 1 > self._half and len(self.young):
            self.old, self.young = self.young, Automaton()
        self.young.append(SEPARATOR)
        self.young.extend(tokens)


class Recent:
    """The recent outputs of many audiences. Those unused for longest make room."""

    def __init__(self, max_audiences: int = MAX_AUDIENCES, tokens_per_audience: int = TOKENS_PER_AUDIENCE,
                 max_tokens: int = MAX_TOKENS) -> None:
        self._max_audiences = max_audiences
        self._tokens_per_audience = tokens_per_audience
        self._max_tokens = max_tokens
        self._texts: OrderedDict[Audience, RecentTexts] = OrderedDict()

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def tokens(self) -> int:
        """Remembered, of all audiences together."""
        return sum(map(len, self._texts.values()))

    def add(self, audience: Audience, tokens: Sequence[int], prompt_tokens: int) -> None:
        """A stream of this audience ended; its first `prompt_tokens` were the prompt."""
        if len(tokens) - prompt_tokens < LEAST_OUTPUT:
            return
        texts = self._texts.get(audience)
        if texts is None:
            texts = self._texts[audience] = RecentTexts(self._tokens_per_audience)
        self._texts.move_to_end(audience)
        texts.add(tokens[max(0, prompt_tokens - LEAD_TOKENS):])
        while len(self._texts) > 1 and (len(self._texts) > self._max_audiences or self.tokens > self._max_tokens):
            self._texts.popitem(last=False)

    def of(self, audience: Audience) -> tuple[Automaton, ...]:
        """Where to look for what this audience said, the younger part first."""
        texts = self._texts.get(audience)
        if texts is None:
            return ()
        self._texts.move_to_end(audience)
        return tuple(part for part in (texts.young, texts.old) if len(part))
