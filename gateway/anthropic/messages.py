"""`POST /v1/messages` and `/v1/messages/count_tokens`: what comes in, as a chat; and what goes out, as typed events.

Rules: a stream opens a content block before it says anything of it and closes it before the next; the input of a
tool comes as pieces of its JSON. Cached tokens are no part of `input_tokens`, as Anthropic counts.
Pure. Source: the types and the stream accumulator of anthropic-sdk-python.
"""

import json
from collections.abc import Sequence
from typing import Any

from msgspec import UNSET, Raw, Struct

from gateway import sse
from gateway.dialects.parts import Argued, Called, Part, Said, Thought
from gateway.openai.chat import MadeChat, Message
from gateway.openai.common import BodyDecoder, Echo, Usage, UsageNow, WholeChoice, call_id, encode
from gateway.openai.logprobs import Told
from gateway.openai.parameters import JsonSchema, ResponseFormat
from gateway.openai.tools import checked_tool
from gateway.reply import Head, Reply
from gateway.speculation import RequestMetrics
from shared.errors import BadRequest, MillError

_TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
          405: "invalid_request_error", 408: "timeout_error", 413: "request_too_large", 429: "rate_limit_error",
          503: "overloaded_error", 504: "timeout_error"}
_IGNORED = ("container", "mcp_servers", "context_management", "inference_geo")


class Turn(Struct):
    role: str
    content: str | list[dict[str, Any]]


class MessagesRequest(Struct, kw_only=True):
    model: str | None = None
    messages: list[Turn]
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    thinking: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    # extensions, as on the other endpoints
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # accepted, and nothing comes of them
    container: Any = None
    mcp_servers: Any = None
    context_management: Any = None
    inference_geo: Any = None


_decode = BodyDecoder(MessagesRequest)


def decode(raw: bytes) -> MadeChat:
    """A body. Raises BadRequest naming what is wrong or not supported."""
    body: MessagesRequest = _decode(raw)
    if body.max_tokens is None:
        raise BadRequest("max_tokens is missing: say how many tokens the answer may have", param="max_tokens")
    return _chat(body)


def decode_to_count(raw: bytes) -> MadeChat:
    """A body of which only the prompt counts. Raises BadRequest."""
    return _chat(_decode(raw))


def _chat(body: MessagesRequest) -> MadeChat:
    if body.temperature is not None and not 0 <= body.temperature <= 1:
        raise BadRequest(f"temperature must lie between 0 and 1, got {body.temperature}", param="temperature")
    choice, parallel = _choice(body.tool_choice)
    output = body.output_config or {}
    format = "output_format" if body.output_format is not None else "output_config.format"
    return MadeChat(
        model=body.model, messages=_messages(body), max_tokens=body.max_tokens, stream=body.stream,
        temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=body.stop_sequences, seed=body.seed,
        tools=_tools(body.tools), tool_choice=choice, parallel_tool_calls=parallel,
        response_format=_format(output.get("format") if body.output_format is None else body.output_format, format),
        reasoning_effort="none" if (body.thinking or {}).get("type") == "disabled" else output.get("effort"),
        chat_template_kwargs=body.chat_template_kwargs, user=(body.metadata or {}).get("user_id"),
        service_tier={"auto": None, "standard_only": "default"}.get(body.service_tier or "auto", body.service_tier),
        also_ignored=tuple(name for name in _IGNORED if getattr(body, name))
        + (("thinking.budget_tokens",) if (body.thinking or {}).get("budget_tokens") else ()),
        names={"stop": "stop_sequences", "response_format.json_schema": format, "response_format": format,
               "reasoning_effort": "output_config.effort"})


def _choice(choice: dict[str, Any] | None) -> tuple[Any, bool]:
    """As OpenAI says it, and whether there may be several calls."""
    if choice is None:
        return None, True
    parallel = not choice.get("disable_parallel_tool_use")
    match choice:
        case {"type": "auto" | "none" as kind}:
            return kind, parallel
        case {"type": "any"}:
            return "required", parallel
        case {"type": "tool", "name": str(name)}:
            return {"type": "function", "name": name}, parallel
    raise BadRequest("tool_choice.type must be auto, any, tool (with a name) or none", param="tool_choice")


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    if not tools:
        return None
    found = []
    for i, tool in enumerate(tools):
        where = f"tools[{i}]"
        if tool.get("type") not in (None, "custom"):
            raise BadRequest(f"{where} is a tool of Anthropic's own: send tools with a name and an input_schema",
                             param=where)
        made = checked_tool(tool.get("name"), tool.get("description"), tool.get("input_schema"), tool.get("strict"),
                            where)
        found.append({"type": "function", "name": made.name, "description": made.description,
                      "parameters": made.parameters, "strict": made.strict})
    return found


def _format(format: Any, where: str) -> ResponseFormat | None:
    if format is None:
        return None
    if not isinstance(format, dict) or format.get("type") != "json_schema":
        raise BadRequest(f"{where} must be of type json_schema", param=where)
    return ResponseFormat("json_schema", JsonSchema(schema=format.get("schema")))


# --- messages --------------------------------------------------------------------------------------------------------


def _messages(body: MessagesRequest) -> list[Message]:
    messages = [Message(role="system", content=_text(body.system, "system"))] if body.system else []
    for i, turn in enumerate(body.messages):
        where = f"messages[{i}]"
        if turn.role not in ("user", "assistant", "system"):
            raise BadRequest(f"{where}.role must be user or assistant", param=f"{where}.role")
        if isinstance(turn.content, str):
            messages.append(Message(role=turn.role, content=turn.content))
        elif turn.role == "assistant":
            messages.append(_said(turn.content, where))
        else:
            messages += _asked(turn, where)
    return messages


def _asked(turn: Turn, where: str) -> list[Message]:
    """What a user gave back of tools, and then what he said."""
    assert isinstance(turn.content, list)
    results, texts = [], []
    for block in turn.content:
        if block.get("type") == "tool_result":
            content, call = block.get("content"), block.get("tool_use_id")
            if not isinstance(call, str | None):
                raise BadRequest(f"{where} has a tool_result whose tool_use_id is no string", param=where)
            results.append(Message(role="tool", tool_call_id=call,
                                   content=_text("" if content is None else content, where)))
        else:
            texts.append(block)
    return [*results, Message(role=turn.role, content=_text(texts, where))] if texts or not results else results


def _said(content: list[dict[str, Any]], where: str) -> Message:
    """What an assistant thought, said and called."""
    texts, thoughts, calls = [], [], []
    for block in content:
        match block:
            case {"type": "tool_use", "name": str(name)}:
                calls.append({"id": block.get("id"), "type": "function", "function": {
                    "name": name, "arguments": _arguments(block.get("input"), where)}})
            case {"type": "thinking", "thinking": str(thought)}:
                thoughts.append(thought)
            case {"type": "redacted_thinking"}:
                pass
            case _:
                texts.append(block)
    return Message(role="assistant", content=_text(texts, where) if texts else None, tool_calls=calls or None,
                   reasoning_content="".join(thoughts) or None)


def _arguments(input: Any, where: str) -> str:
    try:
        return json.dumps(input or {}, ensure_ascii=False)
    except RecursionError:
        raise BadRequest(f"{where} has a tool_use whose input is nested too deeply: send a flatter one",
                         param=where) from None


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else [None]:
        match block:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "document", "source": {"type": "text", "data": str(text)}}:
                texts.append(text)
            case _:
                raise BadRequest(f"{where} has a content block that is not text: send blocks of type text, tool_use, "
                                 "tool_result or thinking", param=where)
    return "\n".join(texts)


# --- what goes out ---------------------------------------------------------------------------------------------------


class MessagesReply(Reply):
    """Builds the events of a message, or all of it."""

    quick = False
    done = b""

    def __init__(self, head: Head) -> None:
        self.id = "msg_" + head.number
        self._head = head
        self._block = -1  # the last one
        self._kind = ""  # of the block that is open
        self._ending: tuple[str, str | None] = ("end_turn", None)

    def opening(self, index: int, prompt: list[int] | None, echo: Echo | None = None,
                usage: UsageNow | None = None) -> list[bytes]:
        counts = _usage(usage()) if usage is not None else {"input_tokens": 0, "output_tokens": 0}
        return [_event("message_start", message=self._message([], (None, None), counts))]

    def piece(self, index: int, parts: Sequence[Part], tokens: list[int] | None = None, usage: Usage | None = None,
              told: list[Told] | None = None) -> list[bytes]:
        documents: list[bytes] = []
        for part in parts:
            match part:
                case Said(text):
                    documents += self._in("text", {"type": "text", "text": ""})
                    documents.append(self._delta({"type": "text_delta", "text": text}))
                case Thought(text):
                    documents += self._in("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                    documents.append(self._delta({"type": "thinking_delta", "thinking": text}))
                case Called(name):
                    documents += self._close()
                    documents += self._in("tool_use", {"type": "tool_use", "id": self._tool_id(self._block + 1),
                                                       "name": name, "input": {}})
                case Argued(text):
                    documents.append(self._delta({"type": "input_json_delta", "partial_json": text}))
        return documents

    def closing(self, index: int, reason: str, usage: Usage | None, stopped: str | None = None) -> list[bytes]:
        self._ending = _ending(reason, stopped)
        return self._close()

    def totals(self, usage: Usage, metrics: RequestMetrics | None = None) -> list[bytes]:
        reason, stopped = self._ending
        return [_event("message_delta", delta={"stop_reason": reason, "stop_sequence": stopped}, usage=_usage(usage)),
                _event("message_stop")]

    def whole(self, choices: list[WholeChoice], usage: Usage, metrics: RequestMetrics | None = None) -> bytes:
        (choice,) = choices
        blocks: list[dict[str, Any]] = []
        for part in choice.parts:
            match part:
                case Said(text):
                    blocks.append({"type": "text", "text": text})
                case Thought(text):
                    blocks.append({"type": "thinking", "thinking": text, "signature": ""})
                case Called(name):
                    blocks.append({"type": "tool_use", "id": self._tool_id(len(blocks)), "name": name, "input": {}})
                case Argued(text):
                    blocks[-1]["input"] = _input(text)
        return encode(self._message(blocks, _ending(choice.reason, choice.stopped), _usage(usage)))

    def failed(self, error: MillError) -> bytes:
        return sse.named("error", error_json(error))

    def events(self, documents: Any) -> bytes:
        return b"".join(documents)

    def _message(self, content: list[Any], ending: tuple[str | None, str | None],
                 usage: dict[str, Any]) -> dict[str, Any]:
        return {"id": self.id, "type": "message", "role": "assistant", "model": self._head.model, "content": content,
                "stop_reason": ending[0], "stop_sequence": ending[1], "usage": usage}

    def _in(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        """Be in a block of this kind; what it takes to get there."""
        if self._kind == kind:
            return []
        documents = self._close()
        self._kind = kind
        self._block += 1
        return [*documents, _event("content_block_start", index=self._block, content_block=block)]

    def _close(self) -> list[bytes]:
        if not self._kind:
            return []
        documents = [self._delta({"type": "signature_delta", "signature": ""})] if self._kind == "thinking" else []
        self._kind = ""
        return [*documents, _event("content_block_stop", index=self._block)]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._block, delta=delta)

    def _tool_id(self, block: int) -> str:
        if self._head.id_length is not None:
            return call_id(self._head.number, 0, block, self._head.id_length)
        return call_id(self._head.number, 0, block).replace("call_", "toolu_")


def error_json(error: MillError, request_id: str | None = None) -> bytes:
    """`{"type": "error", "error": {"type", "message"}}`, as anthropic clients read it."""
    told: dict[str, Any] = {"type": "error", "error": {"type": _TYPES.get(error.status, "api_error"),
                                                       "message": error.message}}
    return encode(told if request_id is None else told | {"request_id": request_id})


def _event(type: str, **fields: Any) -> bytes:
    return sse.named(type, encode({"type": type, **fields}))


def _ending(reason: str, stopped: str | None) -> tuple[str, str | None]:
    if reason == "stop" and stopped is not None:
        return "stop_sequence", stopped
    return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[reason], None


def _input(arguments: str) -> Raw:
    """The input of a tool as it was written; empty where it was cut off, or is nested deeper than clients can read."""
    try:
        whole = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        whole = False
    return Raw(arguments.encode() if whole else b"{}")


def _usage(usage: Usage) -> dict[str, Any]:
    cached = usage.prompt_tokens_details.cached_tokens
    return {"input_tokens": usage.prompt_tokens - cached, "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached, "output_tokens": usage.completion_tokens,
            **({} if usage.cost is UNSET else {"cost": usage.cost})}
