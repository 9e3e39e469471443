"""How likely tokens were, in the shapes of both endpoints.

Rule: natural logarithms of the model's own probabilities, before penalties, bias, masks and temperature. A stop token
has an entry like any other, though it shows no text. What no JSON number can say is -9999.
Pure. Field order is the order on the wire.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from msgspec import Struct

from shared.logprobs import Likely

LEAST = -9999.0


class Spelling(NamedTuple):
    """The bytes of a token id, and the ids that show no text."""

    of: Callable[[int], bytes]
    hidden: Collection[int] = ()


NO_SPELLING = Spelling(lambda id: b"")


class Told(NamedTuple):
    """One token and how likely it was; None for the first of a prompt."""

    token: int
    likely: Likely | None


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(Struct):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class PromptLogprob(Struct):
    """As vLLM has it, by token id."""

    logprob: float
    rank: int | None
    decoded_token: str


def chat_logprobs(told: Iterable[Told], spelling: Spelling) -> ChatLogprobs:
    """What a choice of the chat endpoint shows for these tokens."""
    entries = []
    for token, likely in told:
        if likely is None:
            continue
        top = [TopLogprob(*_shown(spelling.of(id), logprob)) for id, logprob in likely.top]
        entries.append(TokenLogprob(*_shown(spelling.of(token), likely.logprob), top))
    return ChatLogprobs(entries)


def text_logprobs(told: Sequence[Told], spelling: Spelling, offset: int) -> tuple[TextLogprobs, int]:
    """What a choice of the completions endpoint shows, and the offset of what follows; characters of the text."""
    shown = TextLogprobs([], [], [], [])
    for token, likely in told:
        text = _escaped(spelling.of(token))
        shown.text_offset.append(offset)
        shown.tokens.append(text)
        shown.token_logprobs.append(None if likely is None else _finite(likely.logprob))
        shown.top_logprobs.append(None if likely is None else {
            _escaped(spelling.of(id)): _finite(logprob) for id, logprob in [*likely.top, (token, likely.logprob)]})
        offset += 0 if token in spelling.hidden else len(text)
    return shown, offset


def prompt_logprobs(told: Iterable[Told], spelling: Spelling) -> list[dict[str, PromptLogprob] | None]:
    """For each prompt token the likeliest ids and itself; nothing for the first."""
    found: list[dict[str, PromptLogprob] | None] = []
    for token, likely in told:
        if likely is None:
            found.append(None)
            continue
        entries = {str(token): PromptLogprob(_finite(likely.logprob), likely.rank, _text(spelling.of(token)))}
        for rank, (id, logprob) in enumerate(likely.top, 1):
            entries.setdefault(str(id), PromptLogprob(_finite(logprob), rank, _text(spelling.of(id))))
        found.append(entries)
    return found


def _shown(data: bytes, logprob: float) -> tuple[str, float, list[int]]:
    return _text(data), _finite(logprob), list(data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _escaped(data: bytes) -> str:
    """The text, or where it is half a character its bytes as OpenAI writes them: `bytes:\\xe2\\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
