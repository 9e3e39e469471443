"""One choice of an answer: tokens in, text out, and the reason why it ended.

Rules: a stop token counts and shows no text; a stop string ends the choice at the token that completes it, so that
neither text nor count depends on how tokens were batched into messages. Text of the first `min_tokens` tokens is no
part of a stop string. Where calls and thoughts are read, stop strings stand in text alone.
Pure.
"""

from collections.abc import Collection, Iterable, Sequence

from msgspec import Struct

from gateway.detokenize import Detokenizer
from gateway.dialects.parts import Called, CallEnded, Part, Reader, Said, Thought, joined
from gateway.stops import StopMatcher


class Piece(Struct, frozen=True):
    """What one batch of tokens added. `stopped`: nothing may follow, for a stop string matched or a call was enough."""

    text: str
    tokens: list[int]
    stopped: bool = False
    parts: Sequence[Part] = ()  # all of it, `text` too, where calls and thoughts are read


class Choice:
    """The text side of one stream."""

    reasoning_tokens = 0
    called = False  # it has called something, and no call is open
    stopped: str | None = None  # the stop string that ended it

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
                self.stopped = self._stops.stopped
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
        self.stopped = self._stops.stopped
        return Piece(text, [], self.stopped is not None)


class ReadChoice(Choice):
    """One that is read for calls and thoughts."""

    def __init__(self, reader: Reader, detokenizer: Detokenizer, stops: StopMatcher | None,
                 end_tokens: Collection[int], min_tokens: int = 0, *, one_call: bool = False,
                 shows_thoughts: bool = True) -> None:
        """`one_call`: the first call ends it."""
        super().__init__(detokenizer, stops, end_tokens, min_tokens)
        self._reader = reader
        self._one_call = one_call
        self._shows_thoughts = shows_thoughts
        self._stopped = False

    def push(self, tokens: Sequence[int]) -> Piece:
        shown = list(tokens)
        if shown and shown[-1] in self._end_tokens:
            del shown[-1]
        parts: list[Part] = []
        for number, token in enumerate(shown, 1):
            thinking = self._reader.thinking
            stops = self._stops if self.completion_tokens + number > self._min_tokens else None
            parts += self._kept(self._reader.push(self._detokenizer.push([token])), stops)
            self.reasoning_tokens += thinking or self._reader.thinking
            if self._stopped:
                self.completion_tokens += number
                return _piece(parts, shown[:number], True)
        self.completion_tokens += len(tokens)
        return _piece(parts, list(tokens))

    def flush(self) -> Piece:
        parts = self._kept([*self._reader.push(self._detokenizer.flush()), *self._reader.flush()], self._stops)
        if self._stops is not None and not self._stopped:
            parts.append(Said(self._stops.flush()))
            self.stopped = self._stops.stopped
        return _piece(parts, [], self._stopped or self.stopped is not None)

    def _kept(self, parts: Iterable[Part], stops: StopMatcher | None) -> list[Part]:
        """What is shown of `parts`, up to where it stops."""
        kept: list[Part] = []
        for part in parts:
            if isinstance(part, Said) and stops is not None:
                text, self._stopped = stops.push(part.text)
                self.stopped = stops.stopped
                kept.append(Said(text))
                if self._stopped:
                    break
                continue
            if isinstance(part, Called | Thought) and stops is not None and stops.begun:
                # no stop string stands on both sides of a call or a thought
                kept.append(Said(stops.flush()))
                self.stopped = stops.stopped
                self._stopped = self.stopped is not None
                self._stops = stops = stops.again()
                if self._stopped:
                    break
            if not isinstance(part, Thought) or self._shows_thoughts:
                kept.append(part)
            if isinstance(part, Called):
                self.called = False
            elif isinstance(part, CallEnded):
                self.called, self._stopped = True, self._one_call
                if self._stopped:
                    break
        return kept


def _piece(parts: Iterable[Part], tokens: list[int], stopped: bool = False) -> Piece:
    whole = joined(parts)
    return Piece("".join(part.text for part in whole if isinstance(part, Said)), tokens, stopped, whole)
