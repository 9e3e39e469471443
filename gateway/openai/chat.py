"""`POST /v1/chat/completions`: what comes in, and the exact shape of what goes out.

A stream is: a chunk with the role and empty content, chunks of content whose finish_reason is null, one chunk with an
empty delta and the reason; then, only if asked for, a chunk without choices that carries the usage.
Pure. Field order is the order on the wire.
"""

from typing import Any

from msgspec import UNSET, Struct, UnsetType, structs

from gateway.openai.common import Usage, WithText, encode
from gateway.openai.parameters import Options, Parameters, options, refuse
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
    # not supported yet
    top_logprobs: int | None = None
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
    for name in ("top_logprobs", "tools", "functions", "audio", "web_search_options", "chat_template", "echo"):
        if getattr(body, name):
            raise refuse(name)
    for name in ("tool_choice", "function_call"):
        if getattr(body, name) not in (None, "none", "auto"):
            raise refuse(name)
    predicted_text(body.prediction)
    if body.modalities not in (None, [], ["text"]):
        raise refuse("modalities", 'send ["text"] or leave it out')
    if body.max_completion_tokens is not None:
        return options(body, body.max_completion_tokens, "max_completion_tokens")
    return options(body, body.max_tokens)


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
    logprobs: None = None
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
    logprobs: None = None
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
    service_tier: str | UnsetType = UNSET
    metrics: RequestMetrics | UnsetType = UNSET


class ChatReply:
    """Builds the bytes of one answer. All chunks share id, time, model and fingerprint."""

    id_prefix = "chatcmpl-"

    def __init__(self, id: str, created: int, model: str, fingerprint: str, include_usage: bool,
                 tier: str | None = None) -> None:
        """`tier` where the client asked for one."""
        self.id = id
        self._head = (id, "chat.completion.chunk", created, model, fingerprint)
        self._plain: dict[int, WithText] = {}  # by choice
        self._no_usage: UnsetType | None = None if include_usage else UNSET
        self._tier: str | UnsetType = UNSET if tier is None else tier

    def opening(self, index: int, prompt: list[int] | None) -> bytes | None:
        """The role chunk of choice `index`; `prompt` ids where the client asked for them."""
        return encode(Chunk(*self._head, [ChunkChoice(index, Delta("assistant", ""))], self._no_usage,
                            UNSET if prompt is None else prompt, self._tier))

    def content(self, index: int, text: str, tokens: list[int] | None, usage: Usage | None) -> bytes:
        if tokens is None and usage is None:
            if (plain := self._plain.get(index)) is None:
                empty = encode(Chunk(*self._head, [ChunkChoice(index, Delta(content=""))], self._no_usage,
                                     service_tier=self._tier))
                plain = self._plain[index] = WithText(empty, "content")
            return plain(text)
        choice = ChunkChoice(index, Delta(content=text), token_ids=UNSET if tokens is None else tokens)
        return encode(Chunk(*self._head, [choice], usage or self._no_usage, service_tier=self._tier))

    def closing(self, index: int, reason: str, usage: Usage | None) -> bytes:
        return encode(Chunk(*self._head, [ChunkChoice(index, Delta(), None, reason)], usage or self._no_usage,
                            service_tier=self._tier))

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        return encode(Chunk(*self._head, [], usage, service_tier=self._tier, metrics=metrics or UNSET))

    def whole(self, choices: list[tuple[str, str, list[int] | None, list[int] | None]], usage: Usage,
              metrics: RequestMetrics | None = None) -> bytes:
        """The answer in one piece. Each choice: text, finish reason, token ids and prompt ids where asked for."""
        id, _, created, model, fingerprint = self._head
        prompt = choices[0][3]
        return encode(ChatCompletion(
            id, "chat.completion", created, model, fingerprint,
            [ChatChoice(i, AssistantMessage("assistant", text), reason, None, UNSET if tokens is None else tokens)
             for i, (text, reason, tokens, _) in enumerate(choices)],
            usage, UNSET if prompt is None else prompt, self._tier, metrics or UNSET))
