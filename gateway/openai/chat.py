"""`POST /v1/chat/completions`: what comes in, and the exact shape of what goes out.

A stream is: a chunk with the role and empty content, chunks of content whose finish_reason is null, one chunk with an
empty delta and the reason; then, only if asked for, a chunk without choices that carries the usage.
Pure. Field order is the order on the wire.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import UNSET, Struct, UnsetType, structs

from gateway.dialects.parts import Argued, Called, Part, Said, Thought
from gateway.openai.common import (
    BodyDecoder,
    Echo,
    Usage,
    UsageNow,
    WholeChoice,
    WithText,
    call_id,
    encode,
    renamed,
    spoken,
)
from gateway.openai.logprobs import ChatLogprobs, PromptLogprob, Told, chat_logprobs, prompt_logprobs
from gateway.openai.parameters import MAX_LOGPROBS, Options, Parameters, options, refuse, within
from gateway.openai.tools import tools_of
from gateway.reply import Head, Reply
from gateway.speculation import RequestMetrics
from shared.errors import BadRequest

IGNORED = ("store", "verbosity", "moderation", "prompt_cache_retention", "prompt_cache_options",
           "thinking_token_budget")
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Message(Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


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
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    # accepted, and nothing comes of them: the answer says so in a header
    store: bool | None = None
    verbosity: str | None = None
    moderation: Any = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    thinking_token_budget: int | None = None
    # not supported
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    chat_template: str | None = None
    echo: bool | None = None


decode = BodyDecoder(ChatRequest)


class MadeChat(ChatRequest, kw_only=True):
    """What another API's request is as a chat."""

    also_ignored: tuple[str, ...] = ()  # fields of that request
    names: Mapping[str, str] = {}  # its fields, by what they are called here


def chat_options(body: ChatRequest) -> Options:
    """Check everything but the messages. `max_completion_tokens` wins over `max_tokens`. Raises BadRequest."""
    if not isinstance(body, MadeChat):
        return _options(body)
    with renamed(body.names):
        found = _options(body)
    return structs.replace(found, ignored=(*found.ignored, *body.also_ignored))


def _options(body: ChatRequest) -> Options:
    for name, instead in (("functions", "send tools"), ("audio", ""), ("web_search_options", ""), ("chat_template", ""),
                          ("echo", "")):
        if getattr(body, name):
            raise refuse(name, instead or "leave it out")
    if body.function_call not in (None, "none", "auto"):
        raise refuse("function_call", "send tool_choice")
    if body.reasoning_effort not in (None, *EFFORTS):
        raise BadRequest(f"reasoning_effort must be one of {', '.join(EFFORTS)}", param="reasoning_effort")
    predicted_text(body.prediction)
    if body.modalities not in (None, [], ["text"]):
        raise refuse("modalities", 'send ["text"] or leave it out')
    if body.max_completion_tokens is not None:
        found = options(body, body.max_completion_tokens, "max_completion_tokens")
    else:
        found = options(body, body.max_tokens)
    return structs.replace(found, logprobs=_logprobs(body),
                           tools=tools_of(body.tools, body.tool_choice, body.parallel_tool_calls),
                           shows_thoughts=body.include_reasoning is not False,
                           ignored=tuple(name for name in IGNORED if getattr(body, name)))


def template_variables(body: ChatRequest) -> dict[str, Any] | None:
    """What templates read by name: the client's own, and how much to think as Qwen and gpt-oss call it."""
    return thinking_variables(body.reasoning_effort) | (body.chat_template_kwargs or {}) or None


def thinking_variables(effort: str | None) -> dict[str, Any]:
    """How much to think, by the names that templates have for it; nothing where nothing is said."""
    if effort is None:
        return {}
    return {"enable_thinking": effort != "none", "reasoning_effort": "low" if effort in ("none", "minimal") else effort}


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
            # what stands there is not repeated: it may be a prompt in the wrong field, and clients log errors
            raise BadRequest(f"messages[{i}].role must be one of {', '.join(ROLES)}",
                             param=f"messages[{i}].role")
    names: dict[str, str] = {}  # of what was called, by the call's id
    return [_template_message(message, names) for message in messages]


def _template_message(message: Message, names: dict[str, str]) -> dict[str, Any]:
    shown = {name: value for name, value in structs.asdict(message).items() if value is not None or name == "content"}
    if message.reasoning_content is not None:
        shown["thinking"] = message.reasoning_content  # as gpt-oss calls it
    for call in message.tool_calls or ():
        match call:
            case {"id": str(id), "function": {"name": str(name)}}:
                names[id] = name
    if message.role == "tool" and message.name is None and message.tool_call_id in names:
        shown["name"] = names[message.tool_call_id]  # Hermes' template asks for it, and clients do not send it
    return shown


# --- replies ---------------------------------------------------------------------------------------------------------


class CalledFunction(Struct, omit_defaults=True):
    """`name` in the first chunk of a call alone."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class CallDelta(Struct, omit_defaults=True):
    """A call in a stream: its first chunk has everything but arguments, the others have nothing but these."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: CalledFunction | UnsetType = UNSET


class Delta(Struct, omit_defaults=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


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


class Call(Struct):
    id: str
    function: CalledFunction
    type: str = "function"


class AssistantMessage(Struct):
    role: str
    content: str | None
    refusal: None = None
    tool_calls: list[Call] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


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


class ChatReply(Reply):
    """All chunks share id, time, model and fingerprint."""

    def __init__(self, head: Head) -> None:
        self.id = "chatcmpl-" + head.number
        self._number, self._id_length = head.number, head.id_length
        self._calls: dict[int, int] = {}  # number of the last call, by choice
        self._spelling = head.spelling
        self._head = (self.id, "chat.completion.chunk", head.created, head.model, head.fingerprint)
        self._plain: dict[int, WithText] = {}  # by choice
        self._no_usage: UnsetType | None = None if head.include_usage else UNSET
        self._include_usage = head.include_usage
        self._tier: str | UnsetType = UNSET if head.tier is None else head.tier

    def opening(self, index: int, prompt: list[int] | None, echo: Echo | None = None,
                usage: UsageNow | None = None) -> list[bytes]:
        """The role chunk. A chat echoes nothing."""
        return [encode(Chunk(*self._head, [ChunkChoice(index, Delta("assistant", ""))], self._no_usage,
                             UNSET if prompt is None else prompt, self._tier))]

    def content(self, index: int, text: str) -> bytes:
        if (plain := self._plain.get(index)) is None:
            empty = encode(Chunk(*self._head, [ChunkChoice(index, Delta(content=""))], self._no_usage,
                                 service_tier=self._tier))
            plain = self._plain[index] = WithText(empty, "content")
        return plain(text)

    def piece(self, index: int, parts: Sequence[Part], tokens: list[int] | None = None, usage: Usage | None = None,
              told: list[Told] | None = None) -> list[bytes]:
        """One chunk for each part, the arguments of a call in others than its beginning."""
        if tokens is None and usage is None and told is None and len(parts) == 1 and isinstance(parts[0], Said):
            return [self.content(index, parts[0].text)]
        deltas = [delta for part in parts if (delta := self._delta(index, part)) is not None]
        if not deltas:
            if not (tokens or told):
                return []
            deltas = [Delta(content="")]
        logprobs = None if told is None else chat_logprobs(told, self._spelling)
        documents = []
        for number, delta in enumerate(deltas):
            first = number == 0
            choice = ChunkChoice(index, delta, logprobs if first else None,
                                 token_ids=tokens if first and tokens is not None else UNSET)
            documents.append(encode(Chunk(*self._head, [choice], usage or self._no_usage, service_tier=self._tier)))
        return documents

    def _delta(self, index: int, part: Part) -> Delta | None:
        match part:
            case Said(text):
                return Delta(content=text)
            case Thought(text):
                return Delta(reasoning_content=text)
            case Called(name):
                number = self._calls[index] = self._calls.get(index, -1) + 1
                return Delta(tool_calls=[CallDelta(number, self._call_id(index, number), "function",
                                                   CalledFunction(name, ""))])
            case Argued(text):
                return Delta(tool_calls=[CallDelta(self._calls[index], function=CalledFunction(arguments=text))])
        return None

    def _call_id(self, index: int, number: int) -> str:
        return call_id(self._number, index, number, self._id_length)

    def closing(self, index: int, reason: str, usage: Usage | None, stopped: str | None = None) -> list[bytes]:
        return [encode(Chunk(*self._head, [ChunkChoice(index, Delta(), None, reason)], usage or self._no_usage,
                             service_tier=self._tier))]

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> list[bytes]:
        if not self._include_usage:
            return []
        return [encode(Chunk(*self._head, [], usage, service_tier=self._tier, metrics=metrics or UNSET))]

    def whole(self, choices: list[WholeChoice], usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        id, _, created, model, fingerprint = self._head
        prompt, scored = choices[0].prompt, choices[0].prompt_told
        return encode(ChatCompletion(
            id, "chat.completion", created, model, fingerprint,
            [ChatChoice(index, self._message(index, choice), choice.reason,
                        None if choice.told is None else chat_logprobs(choice.told, self._spelling),
                        UNSET if choice.tokens is None else choice.tokens)
             for index, choice in enumerate(choices)],
            usage, UNSET if prompt is None else prompt,
            UNSET if scored is None else prompt_logprobs(scored, self._spelling), self._tier,
            metrics or UNSET))

    def _message(self, index: int, choice: WholeChoice) -> AssistantMessage:
        text, thoughts, called = spoken(choice.parts)
        calls = [Call(self._call_id(index, number), CalledFunction(call.name, call.arguments))
                 for number, call in enumerate(called)]
        return AssistantMessage("assistant", text if text or not (calls or thoughts) else None,
                                tool_calls=calls or UNSET, reasoning_content=thoughts or UNSET)
