"""`POST /v1/responses`: what comes in, as a chat; and what goes out, as typed events or one document.

Rules: nothing is kept, so what refers to an earlier response is refused. A stream opens each item before it says
anything of it and closes it before the next; every event has the next number, its type is also the event's name.
Pure. Source: the types and the stream accumulator of openai-python.
"""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET, Struct, structs

from gateway import sse
from gateway.dialects.parts import Argued, Called, CallEnded, Part, Said, Thought
from gateway.openai.chat import ROLES, MadeChat, Message
from gateway.openai.common import BodyDecoder, Echo, Usage, UsageNow, WholeChoice, call_id, encode
from gateway.openai.logprobs import Told
from gateway.openai.parameters import JsonSchema, Parameters, ResponseFormat, refuse
from gateway.reply import Head, Reply
from gateway.speculation import RequestMetrics
from shared.errors import BadRequest, MillError

_TEXTS = ("input_text", "output_text", "text", "refusal")
_ELSEWHERE = "ask /v1/chat/completions for them"
# what would need a store, a hosted tool or another service, or has no place in a response
_REFUSED = (("previous_response_id", "send the whole conversation as input"),
            ("conversation", "send the whole conversation as input"), ("background", "wait for the answer"),
            ("prompt", "send its text as instructions"), ("context_management", ""), ("echo", ""), ("audio", ""),
            ("top_logprobs", _ELSEWHERE), ("return_token_ids", _ELSEWHERE))
_SCORES = ("logprobs", "prompt_logprobs")  # of which 0 asks for something
_IGNORED = ("store", "moderation", "max_tool_calls", "prompt_cache_retention", "prompt_cache_options", "image")

# fields by what a chat calls them
_NAMES = {"max_completion_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort"}
_FORMAT_NAMES = {"response_format.json_schema": "text.format", "response_format": "text.format"}


class TextFormat(Struct):
    type: str = "text"
    name: str = ""
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class TextSettings(Struct):
    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Struct):
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Parameters, kw_only=True):
    input: str | list[dict[str, Any]] | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: TextSettings | None = None
    reasoning: Reasoning | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    include: list[str] | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    moderation: Any = None
    max_tool_calls: int | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None
    image: Any = None
    # not supported
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    context_management: Any = None
    top_logprobs: int | None = None
    echo: bool | None = None
    audio: Any = None


class Asked(Struct):
    """A request as it came, and as the chat that it is."""

    body: ResponsesRequest
    chat: MadeChat

    @property
    def model(self) -> str | None:
        return self.chat.model

    @property
    def service_tier(self) -> str | None:
        return self.chat.service_tier


_decode = BodyDecoder(ResponsesRequest)
_COMMON = tuple(field.name for field in msgspec.structs.fields(Parameters))


def decode(raw: bytes) -> Asked:
    """A body. Raises BadRequest naming what is wrong or not supported."""
    body: ResponsesRequest = _decode(raw)
    for name, instead in _REFUSED:
        if getattr(body, name):
            raise refuse(name, instead or "leave it out")
    for name in _SCORES:
        if (asked := getattr(body, name)) is not None and asked is not False:
            raise refuse(name, _ELSEWHERE)
    if body.n not in (None, 1):
        raise refuse("n", "send several requests")
    if "message.output_text.logprobs" in (body.include or ()):
        raise refuse("include of logprobs", _ELSEWHERE)
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise BadRequest(f"max_output_tokens must be 1 or more, got {body.max_output_tokens}",
                         param="max_output_tokens")
    if body.truncation not in (None, "disabled", "auto"):
        raise BadRequest("truncation must be disabled or auto", param="truncation")
    ignored = [name for name in _IGNORED if getattr(body, name)]
    ignored += ["include"] if body.include else []
    ignored += ["truncation"] if body.truncation == "auto" else []
    ignored += ["reasoning.summary"] if body.reasoning is not None and body.reasoning.summary else []
    common = {name: getattr(body, name) for name in _COMMON}
    format = _format(body.text)
    common["response_format"] = format or body.response_format
    return Asked(body, MadeChat(
        **common, messages=_messages(body), max_completion_tokens=body.max_output_tokens, tools=body.tools,
        tool_choice=body.tool_choice, parallel_tool_calls=body.parallel_tool_calls,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
        verbosity=body.text.verbosity if body.text is not None else None,
        chat_template_kwargs=body.chat_template_kwargs, also_ignored=tuple(ignored),
        names=_NAMES | (_FORMAT_NAMES if format is not None else {})))


def _format(text: TextSettings | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    format = text.format
    return ResponseFormat(format.type, JsonSchema(format.name, format.schema, format.strict)
                          if format.type == "json_schema" else None)


# --- input as messages -----------------------------------------------------------------------------------------------


def _messages(body: ResponsesRequest) -> list[Message]:
    """The conversation: what an assistant thought, said and called in a row is one message."""
    messages = [Message(role="system", content=body.instructions)] if body.instructions else []
    if body.input is None or body.input == []:
        raise BadRequest("input is missing: send a string or a list of items", param="input")
    if isinstance(body.input, str):
        return [*messages, Message(role="user", content=body.input)]
    open_turn: Message | None = None  # of the assistant
    for i, item in enumerate(body.input):
        where = f"input[{i}]"
        match item.get("type", "message"):
            case "message":
                role, content = item.get("role"), _content(item.get("content"), where)
                if role not in ROLES:
                    raise BadRequest(f"{where}.role must be one of {', '.join(ROLES)}", param=f"{where}.role")
                thought = open_turn is not None and open_turn.content is None and not open_turn.tool_calls
                if role == "assistant" and open_turn is not None and thought:
                    open_turn.content = content
                    continue
                messages.append(Message(role=role, content=content))
                open_turn = messages[-1] if role == "assistant" else None
            case "reasoning":
                open_turn = _turn(messages, None)
                open_turn.reasoning_content = _thoughts(item)
            case "function_call":
                open_turn = _turn(messages, open_turn)
                open_turn.tool_calls = [*(open_turn.tool_calls or ()), {
                    "id": _call_of(item, where), "type": "function",
                    "function": {"name": item.get("name"), "arguments": _arguments(item, where)}}]
            case "function_call_output":
                output = item.get("output")
                content = output if isinstance(output, str) else _content(output, where)
                messages.append(Message(role="tool", tool_call_id=_call_of(item, where), content=content))
                open_turn = None
            case "item_reference":
                raise BadRequest(f"{where} refers to an item of an earlier response, and none is kept: send the item "
                                 "itself", param=where)
            case _:
                # the type is not repeated: it may be a prompt in the wrong field, and clients log errors
                raise BadRequest(f"{where} has a type that is not supported: send messages, function calls with their "
                                 "outputs, and reasoning", param=where)
    return messages


def _call_of(item: dict[str, Any], where: str) -> str | None:
    """The id of the call that an item is, or answers."""
    found = item.get("call_id")
    if not isinstance(found, str | None):
        raise BadRequest(f"{where}.call_id must be a string", param=where)
    return found


def _arguments(item: dict[str, Any], where: str) -> Any:
    """What a function was called with. What templates cannot read is refused here, where its place is known."""
    found = item.get("arguments") or ""
    if isinstance(found, str) and found.strip():
        try:
            json.loads(found)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"{where}.arguments is no JSON ({error}): send what the model answered",
                             param=f"{where}.arguments") from None
    return found


def _turn(messages: list[Message], open_turn: Message | None) -> Message:
    if open_turn is None:
        open_turn = Message(role="assistant")
        messages.append(open_turn)
    return open_turn


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) and part.get("type") in _TEXTS else None
        if not isinstance(text, str):
            raise BadRequest(f"{where}.content has a part that is not text: send a string or parts of text",
                             param=where)
        texts.append(text)
    return "\n".join(texts)


def _thoughts(item: dict[str, Any]) -> str | None:
    content = item.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str)) or None


# --- output ----------------------------------------------------------------------------------------------------------


class _Item:
    """One item of the output, while it grows."""

    def __init__(self, kind: str, id: str, name: str = "", call: str = "") -> None:
        self.kind = kind  # message, reasoning, function_call
        self.id = id
        self.name = name
        self.texts: list[str] = []
        self.status = ""  # once it has ended
        self._call = call

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self, text: str) -> dict[str, Any]:
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def document(self, status: str) -> dict[str, Any]:
        """As it stands; without text while it is in progress."""
        text = "" if status == "in_progress" else self.text
        content = [] if status == "in_progress" else [self.part(text)]
        match self.kind:
            case "function_call":
                return {"id": self.id, "type": "function_call", "status": status, "arguments": text,
                        "call_id": self._call, "name": self.name}
            case "reasoning":
                return {"id": self.id, "type": "reasoning", "summary": [], "content": content, "status": status}
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}


class ResponsesReply(Reply):
    """Builds the events of a response, or all of it."""

    quick = False
    done = b""

    def __init__(self, head: Head, asked: Asked) -> None:
        self.id = "resp_" + head.number
        self._head = head
        self._asked = asked
        self._next = 0  # number of the next event
        self._items: list[_Item] = []
        self._open = False  # the last item grows
        self._reason = "stop"

    def opening(self, index: int, prompt: list[int] | None, echo: Echo | None = None,
                usage: UsageNow | None = None) -> list[bytes]:
        return [self._event("response.created", response=self._response("in_progress")),
                self._event("response.in_progress", response=self._response("in_progress"))]

    def piece(self, index: int, parts: Sequence[Part], tokens: list[int] | None = None, usage: Usage | None = None,
              told: list[Told] | None = None) -> list[bytes]:
        documents: list[bytes] = []
        for part in parts:
            match part:
                case Said(text):
                    documents += self._grow("message", text)
                case Thought(text):
                    documents += self._grow("reasoning", text)
                case Called(name):
                    documents += self._begin("function_call", name)
                case Argued(text):
                    documents += self._grow("function_call", text)
                case CallEnded():
                    documents += self._close("completed")
        return documents

    def closing(self, index: int, reason: str, usage: Usage | None, stopped: str | None = None) -> list[bytes]:
        self._reason = reason
        return self._close("incomplete" if reason == "length" else "completed")

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> list[bytes]:
        status = self._status()
        return [self._event(f"response.{status}", response=self._response(status, usage))]

    def whole(self, choices: list[WholeChoice], usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        self.piece(0, choices[0].parts)
        self.closing(0, choices[0].reason, None)
        return encode(self._response(self._status(), usage))

    def failed(self, error: MillError) -> bytes:
        told = {"code": error.code, "message": error.message, "param": error.param}
        return self._event("error", **told, error=told | {"type": error.type})

    def events(self, documents: Any) -> bytes:
        return b"".join(documents)

    def _status(self) -> str:
        return "incomplete" if self._reason == "length" else "completed"

    def _begin(self, kind: str, name: str = "") -> list[bytes]:
        documents = self._close("completed")
        number = len(self._items)
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        item = _Item(kind, f"{prefix}_{self._head.number}{number}", name,
                     call_id(self._head.number, 0, number, self._head.id_length))
        self._items.append(item)
        self._open = True
        documents.append(self._event("response.output_item.added", output_index=number,
                                     item=item.document("in_progress")))
        if kind != "function_call":
            documents.append(self._event("response.content_part.added", **self._place(), part=item.part("")))
        return documents

    def _grow(self, kind: str, text: str) -> list[bytes]:
        documents = []
        if not self._open or self._items[-1].kind != kind:
            documents += self._begin(kind)
        item = self._items[-1]
        item.texts.append(text)
        match kind:
            case "function_call":
                documents.append(self._event("response.function_call_arguments.delta", item_id=item.id,
                                             output_index=len(self._items) - 1, delta=text))
            case "reasoning":
                documents.append(self._event("response.reasoning_text.delta", **self._place(), delta=text))
            case _:
                documents.append(self._event("response.output_text.delta", **self._place(), delta=text, logprobs=[]))
        return documents

    def _close(self, status: str) -> list[bytes]:
        """End the item that grows, if one does."""
        if not self._open:
            return []
        self._open = False
        item, number = self._items[-1], len(self._items) - 1
        item.status = status
        documents = []
        match item.kind:
            case "function_call":
                documents.append(self._event("response.function_call_arguments.done", item_id=item.id,
                                             output_index=number, arguments=item.text, name=item.name))
            case "reasoning":
                documents.append(self._event("response.reasoning_text.done", **self._place(), text=item.text))
            case _:
                documents.append(self._event("response.output_text.done", **self._place(), text=item.text, logprobs=[]))
        if item.kind != "function_call":
            documents.append(self._event("response.content_part.done", **self._place(), part=item.part(item.text)))
        documents.append(self._event("response.output_item.done", output_index=number, item=item.document(status)))
        return documents

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1].id, "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, type: str, **fields: Any) -> bytes:
        document = encode({"type": type, "sequence_number": self._next, **fields})
        self._next += 1
        return sse.named(type, document)

    def _response(self, status: str, usage: Usage | None = None) -> dict[str, Any]:
        body, chat, head = self._asked.body, self._asked.chat, self._head
        format = body.text.format if body.text is not None and body.text.format is not None else TextFormat()
        shown = {"type": "text"} if format.type == "text" else structs.asdict(format)
        return {
            "id": self.id, "object": "response", "created_at": head.created, "status": status, "background": False,
            "error": None, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "max_tool_calls": None,
            "model": head.model, "output": [item.document(item.status) for item in self._items if item.status],
            "parallel_tool_calls": body.parallel_tool_calls is not False, "previous_response_id": None,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "safety_identifier": body.safety_identifier, "service_tier": head.tier or "default", "store": False,
            "temperature": 1.0 if chat.temperature is None else chat.temperature,
            "text": {"format": shown, "verbosity": chat.verbosity or "medium"},
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice, "tools": body.tools or [],
            "top_logprobs": 0, "top_p": 1.0 if chat.top_p is None else chat.top_p, "truncation": "disabled",
            "usage": None if usage is None else _usage(usage), "user": chat.user, "metadata": body.metadata or {},
        }


def _usage(usage: Usage) -> dict[str, Any]:
    return {"input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens,
                                     "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.completion_tokens_details.reasoning_tokens},
            "total_tokens": usage.total_tokens, **({} if usage.cost is UNSET else {"cost": usage.cost})}
