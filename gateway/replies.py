"""One choice of an answer: tokens in, text out, and the reason why it ended.

Rules: a stop token counts and shows no text; a stop string ends the choice at the token that completes it, so that
neither text nor count depends on how tokens were batched into messages. Text of the first `min_tokens` tokens is no
part of a stop string.
Pure.
"""

from collections.abc import Collection, Sequence

from msgspec import Struct

from gateway.detokenize import Detokenizer
from gateway.stops import StopMatcher


class Piece(Struct, frozen=True):
    """What one batch of tokens added. `stopped`: a stop string matched, nothing may follow."""

    text: str
    tokens: list[int]
    stopped: bool = False


class Choice:
    """The text side of one stream."""

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher | None, end_tokens: Collection[int],
                 min_tokens: int = 0) -> None:
        self.completion_tokens = 0
        self._detokenizer = detokenizer
        self._stops = stops
        self._end_tokens = end_tokens
        self._min_tokens = min_tokens

    def text(self, tokens: list[int]) -> str:
        """The text these tokens complete, of a choice without stop strings. What is half a character is held back."""
        self.completion_tokens += len(tokens)
        shown = tokens[:-1] if tokens and tokens[-1] in self._end_tokens else tokens
        return self._detokenizer.push(shown) if shown else ""

    def push(self, tokens: Sequence[int]) -> Piece:
        """The text these tokens complete. What could begin a stop string or is half a character is held back."""
        if self._stops is None:
            return Piece(self.text(list(tokens)), list(tokens))
        shown = list(tokens)
        if self._end_tokens and shown and shown[-1] in self._end_tokens:
            del shown[-1]
        texts = []
        for number, token in enumerate(shown, 1):
            text = self._detokenizer.push([token])
            if self.completion_tokens + number <= self._min_tokens:
                texts.append(text)
                continue
            text, stopped = self._stops.push(text)
            texts.append(text)
            if stopped:
                self.completion_tokens += number
                return Piece("".join(texts), shown[:number], True)
        self.completion_tokens += len(tokens)
        return Piece("".join(texts), list(tokens))

    def flush(self) -> Piece:
        """What was held back, now that no token follows."""
        text = self._detokenizer.flush()
        if self._stops is None:
            return Piece(text, [])
        text, stopped = self._stops.push(text)
        if not stopped:
            text += self._stops.flush()
        return Piece(text, [], self._stops.stopped is not None)
