"""`POST /v1/completions`, the older endpoint that every benchmark tool speaks.

Several prompts times `n` are several choices, numbered prompt by prompt.
Pure. Field order is the order on the wire.
"""

from msgspec import UNSET, Struct, UnsetType

from gateway.openai.common import Usage, WithText, encode
from gateway.openai.parameters import MAX_CHOICES, Options, Parameters, options, refuse
from gateway.speculation import RequestMetrics
from shared.errors import BadRequest


class CompletionRequest(Parameters, kw_only=True):
    prompt: str | list[str | int | list[int]] | None = None
    # not supported
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


def completion_options(body: CompletionRequest) -> Options:
    """Check everything but the prompt. Raises BadRequest naming the parameter."""
    for name in ("echo", "suffix"):
        if getattr(body, name):
            raise refuse(name)
    if body.best_of not in (None, body.n or 1):
        raise refuse("best_of", "leave it out or send the value of n")
    return options(body, body.max_tokens)


def prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    """The prompts as texts, or as token ids. Raises BadRequest when there are none, or both kinds."""
    prompt = body.prompt
    if prompt is None or prompt == []:
        raise BadRequest("prompt is missing: send a string, strings, token ids, or lists of token ids", param="prompt")
    if isinstance(prompt, str):
        return [prompt]
    texts = [item for item in prompt if isinstance(item, str)]
    ids = [item for item in prompt if isinstance(item, int)]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(prompt) not in (len(texts), len(ids), len(lists)):
        raise BadRequest("prompt mixes strings and token ids: send one kind", param="prompt")
    if ids:
        lists = [ids]
    if max(len(texts), len(lists)) * (body.n or 1) > MAX_CHOICES:
        raise BadRequest(f"prompts times n must not exceed {MAX_CHOICES}: send several requests", param="prompt")
    return texts or lists


class CompletionChoice(Struct):
    text: str
    index: int
    logprobs: None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


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


class CompletionReply:
    """Builds the bytes of one answer. All chunks share id, time, model and fingerprint."""

    id_prefix = "cmpl-"

    def __init__(self, id: str, created: int, model: str, fingerprint: str, include_usage: bool,
                 tier: str | None = None) -> None:
        """`tier` where the client asked for one."""
        self.id = id
        self._head = (id, "text_completion", created, model, fingerprint)
        self._plain: dict[int, WithText] = {}  # by choice
        self._no_usage: UnsetType | None = None if include_usage else UNSET
        self._tier: str | UnsetType = UNSET if tier is None else tier

    def opening(self, index: int, prompt: list[int] | None) -> bytes | None:
        """Text completions have no role; a chunk opens them only where prompt ids were asked for."""
        if prompt is None:
            return None
        return encode(Completion(*self._head, [CompletionChoice("", index, prompt_token_ids=prompt)], self._no_usage,
                                 self._tier))

    def content(self, index: int, text: str, tokens: list[int] | None, usage: Usage | None) -> bytes:
        if tokens is None and usage is None:
            if (plain := self._plain.get(index)) is None:
                empty = encode(Completion(*self._head, [CompletionChoice("", index)], self._no_usage, self._tier))
                plain = self._plain[index] = WithText(empty, "text")
            return plain(text)
        choice = CompletionChoice(text, index, token_ids=UNSET if tokens is None else tokens)
        return encode(Completion(*self._head, [choice], usage or self._no_usage, self._tier))

    def closing(self, index: int, reason: str, usage: Usage | None) -> bytes:
        return encode(Completion(*self._head, [CompletionChoice("", index, None, reason)], usage or self._no_usage,
                                 self._tier))

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        return encode(Completion(*self._head, [], usage, self._tier, metrics or UNSET))

    def whole(self, choices: list[tuple[str, str, list[int] | None, list[int] | None]], usage: Usage,
              metrics: RequestMetrics | None = None) -> bytes:
        """The answer in one piece. Each choice: text, finish reason, token ids and prompt ids where asked for."""
        return encode(Completion(
            *self._head,
            [CompletionChoice(text, i, None, reason, UNSET if tokens is None else tokens,
                              UNSET if prompt is None else prompt)
             for i, (text, reason, tokens, prompt) in enumerate(choices)], usage, self._tier, metrics or UNSET))
