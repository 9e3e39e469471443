"""`POST /v1/chat/completions`: what comes in, and the exact shape of what goes out.

A stream is: a chunk with the role and empty content, chunks of content whose finish_reason is null, one chunk with an
empty delta and the reason; then, only if asked for, a chunk without choices that carries the usage.
Pure. Field order is the order on the wire.
"""

from typing import Any

from msgspec import UNSET, Struct, UnsetType, structs

from gateway.openai.common import Echo, Usage, WholeChoice, WithText, encode
from gateway.openai.logprobs import (
    NO_SPELLING,
    ChatLogprobs,
    PromptLogprob,
    Spelling,
    Told,
    chat_logprobs,
    prompt_logprobs,
)
from gateway.openai.parameters import MAX_LOGPROBS, Options, Parameters, options, refuse, within
from gateway.speculation import RequestMetrics
from shared.errors import BadRequest

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Message(Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Prediction(Struct):
    """What the client expects to be answered: drafts that its words make likely. It changes no token."""

    type: str
    content: str | list[dict[str, Any]]


class ChatRequest(Parameters, kw_only=True):
    messages: list[Message]
    prediction: Prediction | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    top_logprobs: int | None = None
    # not supported yet
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    chat_template: str | None = None
    echo: bool | None = None


def chat_options(body: ChatRequest) -> Options:
    """Check everything but the messages. `max_completion_tokens` wins over `max_tokens`."""
    for name in ("tools", "functions", "audio", "web_search_options", "chat_template", "echo"):
        if getattr(body, name):
            raise refuse(name)
    for name in ("tool_choice", "function_call"):
        if getattr(body, name) not in (None, "none", "auto"):
            raise refuse(name)
    predicted_text(body.prediction)
    if body.modalities not in (None, [], ["text"]):
        raise refuse("modalities", 'send ["text"] or leave it out')
    if body.max_completion_tokens is not None:
        found = options(body, body.max_completion_tokens, "max_completion_tokens")
    else:
        found = options(body, body.max_tokens)
    return structs.replace(found, logprobs=_logprobs(body))


def _logprobs(body: ChatRequest) -> int:
    """How many of the likeliest tokens to show; -1: none, and not the chosen one's own."""
    within("top_logprobs", body.top_logprobs, 0, MAX_LOGPROBS)
    if not isinstance(body.logprobs, bool | None):
        raise BadRequest("logprobs must be true or false; how many of the likeliest tokens says top_logprobs",
                         param="logprobs")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true beside it", param="top_logprobs")
    return body.top_logprobs or 0 if body.logprobs else -1


def predicted_text(prediction: Prediction | None) -> str:
    """The text that is expected, empty if none is. Raises BadRequest for what is no text."""
    if prediction is None:
        return ""
    if prediction.type != "content":
        raise BadRequest("prediction.type must be content", param="prediction.type")
    if isinstance(prediction.content, str):
        return prediction.content
    texts = [part.get("text") for part in prediction.content if part.get("type") == "text"]
    if len(texts) != len(prediction.content) or not all(isinstance(text, str) for text in texts):
        raise BadRequest("prediction.content must be a string, or parts of type text with a text each",
                         param="prediction.content")
    return "".join(map(str, texts))


def template_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them; fields that were absent or null stay out.

    Raises BadRequest for a role that does not exist.
    """
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            # what stands there is not repeated: it may be a prompt in the wrong field, and errors are logged
            raise BadRequest(f"messages[{i}].role must be one of {', '.join(ROLES)}",
                             param=f"messages[{i}].role")
    return [{name: value for name, value in structs.asdict(message).items() if value is not None or name == "content"}
            for message in messages]


# --- replies ---------------------------------------------------------------------------------------------------------


class Delta(Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | UnsetType = UNSET


class Chunk(Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType = UNSET


class AssistantMessage(Struct):
    role: str
    content: str
    refusal: None = None


class ChatChoice(Struct):
    index: int
    message: AssistantMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | UnsetType = UNSET
    service_tier: str | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType = UNSET


class ChatReply:
    """Builds the bytes of one answer. All chunks share id, time, model and fingerprint."""

    id_prefix = "chatcmpl-"

    def __init__(self, id: str, created: int, model: str, fingerprint: str, include_usage: bool,
                 tier: str | None = None, spelling: Spelling = NO_SPELLING) -> None:
        """`tier` where the client asked for one; `spelling` where it asked how likely tokens were."""
        self.id = id
        self._spelling = spelling
        self._head = (id, "chat.completion.chunk", created, model, fingerprint)
        self._plain: dict[int, WithText] = {}  # by choice
        self._no_usage: UnsetType | None = None if include_usage else UNSET
        self._tier: str | UnsetType = UNSET if tier is None else tier

    def opening(self, index: int, prompt: list[int] | None, echo: Echo | None = None) -> bytes | None:
        """The role chunk of choice `index`; `prompt` ids where the client asked for them. A chat echoes nothing."""
        return encode(Chunk(*self._head, [ChunkChoice(index, Delta("assistant", ""))], self._no_usage,
                            UNSET if prompt is None else prompt, self._tier))

    def content(self, index: int, text: str, tokens: list[int] | None, usage: Usage | None,
                told: list[Told] | None = None) -> bytes:
        """A piece of text. `told`: how likely its tokens were, where the client asked for that."""
        if tokens is None and usage is None and told is None:
            if (plain := self._plain.get(index)) is None:
                empty = encode(Chunk(*self._head, [ChunkChoice(index, Delta(content=""))], self._no_usage,
                                     service_tier=self._tier))
                plain = self._plain[index] = WithText(empty, "content")
            return plain(text)
        logprobs = None if told is None else chat_logprobs(told, self._spelling)
        choice = ChunkChoice(index, Delta(content=text), logprobs, token_ids=UNSET if tokens is None else tokens)
        return encode(Chunk(*self._head, [choice], usage or self._no_usage, service_tier=self._tier))

    def closing(self, index: int, reason: str, usage: Usage | None) -> bytes:
        return encode(Chunk(*self._head, [ChunkChoice(index, Delta(), None, reason)], usage or self._no_usage,
                            service_tier=self._tier))

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        return encode(Chunk(*self._head, [], usage, service_tier=self._tier, metrics=metrics or UNSET))

    def whole(self, choices: list[WholeChoice], usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        """The answer in one piece."""
        id, _, created, model, fingerprint = self._head
        prompt, scored = choices[0].prompt, choices[0].prompt_told
        return encode(ChatCompletion(
            id, "chat.completion", created, model, fingerprint,
            [ChatChoice(index, AssistantMessage("assistant", choice.text), choice.reason,
                        None if choice.told is None else chat_logprobs(choice.told, self._spelling),
                        UNSET if choice.tokens is None else choice.tokens)
             for index, choice in enumerate(choices)],
            usage, UNSET if prompt is None else prompt,
            UNSET if scored is None else prompt_logprobs(scored, self._spelling), self._tier,
            metrics or UNSET))
