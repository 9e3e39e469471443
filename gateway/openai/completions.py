"""`POST /v1/completions`, the older endpoint that every benchmark tool speaks.

Several prompts times `n` are several choices, numbered prompt by prompt.
Pure. Field order is the order on the wire.
"""

from collections.abc import Sequence

from msgspec import UNSET, Struct, UnsetType, structs

from gateway.dialects.parts import Part, Said
from gateway.openai.common import Echo, Usage, UsageNow, WholeChoice, WithText, encode
from gateway.openai.logprobs import PromptLogprob, TextLogprobs, Told, prompt_logprobs, text_logprobs
from gateway.openai.parameters import (
    MAX_CHOICES,
    MAX_LOGPROBS,
    Options,
    Parameters,
    Texts,
    options,
    refuse,
    texts_or_ids,
    within,
)
from gateway.reply import Head, Reply
from gateway.speculation import RequestMetrics
from shared.errors import BadRequest


class CompletionRequest(Parameters, kw_only=True):
    prompt: Texts | None = None
    echo: bool | None = None
    # not supported
    suffix: str | None = None
    best_of: int | None = None


def completion_options(body: CompletionRequest) -> Options:
    """Check everything but the prompt. Raises BadRequest naming the parameter."""
    if body.suffix:
        raise refuse("suffix")
    if body.best_of not in (None, body.n or 1):
        raise refuse("best_of", "leave it out or send the value of n")
    logprobs = _logprobs(body)
    echo = bool(body.echo)
    prompt_only = echo and body.max_tokens == 0
    found = options(body, 1 if prompt_only else body.max_tokens)
    return structs.replace(found, logprobs=logprobs, echo=echo, prompt_only=prompt_only)


def _logprobs(body: CompletionRequest) -> int:
    """How many of the likeliest tokens to show; -1: none, and not the chosen one's own."""
    if body.logprobs is None or body.logprobs is False:
        return -1
    if body.logprobs is True:
        raise BadRequest("logprobs must be a number: how many of the likeliest tokens to show", param="logprobs")
    within("logprobs", body.logprobs, 0, MAX_LOGPROBS)
    return body.logprobs


def prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts as texts, or as token ids. Raises BadRequest when there are none, too many, or both kinds."""
    found = texts_or_ids("prompt", body.prompt)
    if len(found) * (body.n or 1) > MAX_CHOICES:
        raise BadRequest(f"prompts times n must not exceed {MAX_CHOICES}: send several requests", param="prompt")
    return found


class CompletionChoice(Struct):
    text: str
    index: int
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET


class Completion(Struct):
    """Both the whole answer and each chunk of a stream."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    service_tier: str | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType = UNSET


class CompletionReply(Reply):
    """All chunks share id, time, model and fingerprint."""

    def __init__(self, head: Head) -> None:
        self.id = "cmpl-" + head.number
        self._spelling = head.spelling
        self._offsets: dict[int, int] = {}  # by choice: characters of the tokens told of
        self._head = (self.id, "text_completion", head.created, head.model, head.fingerprint)
        self._plain: dict[int, WithText] = {}  # by choice
        self._no_usage: UnsetType | None = None if head.include_usage else UNSET
        self._include_usage = head.include_usage
        self._tier: str | UnsetType = UNSET if head.tier is None else head.tier

    def opening(self, index: int, prompt: list[int] | None, echo: Echo | None = None,
                usage: UsageNow | None = None) -> list[bytes]:
        """Text completions have no role; a chunk opens them only where prompt ids or an echo were asked for."""
        if prompt is None and echo is None:
            return []
        told = echo.told if echo is not None else None
        logprobs = None if told is None else self._told(index, told)
        return [encode(Completion(*self._head, [CompletionChoice(
            "" if echo is None else echo.text, index, logprobs,
            prompt_token_ids=UNSET if prompt is None else prompt)], self._no_usage, self._tier))]

    def content(self, index: int, text: str) -> bytes:
        if (plain := self._plain.get(index)) is None:
            empty = encode(Completion(*self._head, [CompletionChoice("", index)], self._no_usage, self._tier))
            plain = self._plain[index] = WithText(empty, "text")
        return plain(text)

    def piece(self, index: int, parts: Sequence[Part], tokens: list[int] | None = None, usage: Usage | None = None,
              told: list[Told] | None = None) -> list[bytes]:
        text = "".join(part.text for part in parts if isinstance(part, Said))
        if tokens is None and usage is None and told is None:
            return [self.content(index, text)] if text else []
        if not (text or tokens or told):
            return []
        logprobs = None if told is None else self._told(index, told)
        choice = CompletionChoice(text, index, logprobs, token_ids=UNSET if tokens is None else tokens)
        return [encode(Completion(*self._head, [choice], usage or self._no_usage, self._tier))]

    def closing(self, index: int, reason: str, usage: Usage | None, stopped: str | None = None) -> list[bytes]:
        return [encode(Completion(*self._head, [CompletionChoice("", index, None, reason)], usage or self._no_usage,
                                  self._tier))]

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> list[bytes]:
        if not self._include_usage:
            return []
        return [encode(Completion(*self._head, [], usage, self._tier, metrics or UNSET))]

    def whole(self, choices: list[WholeChoice], usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        return encode(Completion(
            *self._head, [self._whole(index, choice) for index, choice in enumerate(choices)], usage, self._tier,
            metrics or UNSET))

    def _whole(self, index: int, choice: WholeChoice) -> CompletionChoice:
        text, told = choice.text, choice.told
        if choice.echo is not None:
            text = choice.echo.text + text
            told = None if told is None else [*(choice.echo.told or []), *told]
        return CompletionChoice(
            text, index, None if told is None else self._told(index, told), choice.reason,
            UNSET if choice.tokens is None else choice.tokens, UNSET if choice.prompt is None else choice.prompt,
            UNSET if choice.prompt_told is None else prompt_logprobs(choice.prompt_told, self._spelling))

    def _told(self, index: int, told: list[Told]) -> TextLogprobs:
        shown, self._offsets[index] = text_logprobs(told, self._spelling, self._offsets.get(index, 0))
        return shown
