"""Messages to prompt, through the Jinja template a model came with.

Rules: rendering equals Hugging Face's, so that a prompt is the one the model was trained on. A template is part of the
model and no more trusted than a download: it runs in Jinja's immutable sandbox, and loops and output are bounded so
that a mistake in it costs one request and not the gateway. What it refuses is the client's error and says so.
Pure; the time of day is passed in.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from gateway.model_files import ModelCard, UnusableModel
from shared.errors import BadRequest

MAX_OUTPUT_CHARACTERS = 16 << 20  # four times the largest body a gateway takes
MAX_LOOP_ROUNDS = 1_000_000  # of all loops together; a template makes a few per message and per tool

_BUDGET, _NOW = "__loop_budget", "__now_s"
# The space tells whether the template trims what it shows.
_END_OF_ANSWER = "\N{SYMBOL FOR END OF TEXT}end of answer\N{SYMBOL FOR END OF TEXT} "


class ChatTemplate:
    """One compiled template. Safe to share between threads. Raises UnusableModel when it is no valid Jinja."""

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        """`variables`: what every rendering sees, such as `bos_token`."""
        self.source = source
        self._variables = dict(variables or {})
        self._knows_developer = "developer" in source
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UnusableModel(f"the chat template has an error in line {error.lineno}: {error.message}") from error
        # Jinja's chain of two mappings is walked for every rendering (10 us)
        self._template.globals = dict(self._template.globals)

    @classmethod
    def of(cls, card: ModelCard) -> "ChatTemplate":
        """The template of a model. Raises UnusableModel when it is no valid Jinja."""
        texts = {id: text for text, id in card.special_tokens.items()}
        named = {"bos_token": card.bos_token_id, "eos_token": card.eos_token_id}
        return cls(card.chat_template, {name: texts[id] for name, id in named.items() if id in texts})

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        now_s: float,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation, to be encoded without further special tokens.

        `now_s`: unix seconds, for templates that tell the model the date (in UTC). `add_generation_prompt` opens the
        assistant's turn; `continue_final_message` leaves the last message open instead, to be written on.
        `variables` reach the template by name. Raises BadRequest.
        """
        if not self.source:
            raise BadRequest("this model has no chat template: send a prompt to /v1/completions", param="messages")
        if not messages:
            raise BadRequest("messages is empty: send at least one message", param="messages")
        if add_generation_prompt and continue_final_message:
            raise BadRequest(
                "continue_final_message excludes add_generation_prompt: set add_generation_prompt to false",
                param="add_generation_prompt",
            )
        shown = self.read(messages)
        final = shown[-1].get("content", "")
        if continue_final_message:
            shown[-1]["content"] = final + _END_OF_ANSWER
        text = self._run(
            {
                **self._variables,
                "documents": None,
                **(variables or {}),
                "messages": shown,
                "tools": list(tools) if tools else None,
                "add_generation_prompt": add_generation_prompt,
                _NOW: now_s,
                _BUDGET: _Budget(),
            }
        )
        return _open_end(text, final) if continue_final_message else text

    def read(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as templates read them: text content, roles they know, tool arguments as objects.

        Reading twice changes nothing. Raises BadRequest.
        """
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _message(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        shown = dict(message)
        if not isinstance(shown.get("role"), str):
            raise BadRequest(f"{where}.role is missing: send system, user, assistant or tool", param=where)
        shown["content"] = _text(shown.get("content"), where)
        if shown["role"] == "developer" and not self._knows_developer:
            shown["role"] = "system"
        if shown.get("tool_calls"):
            shown["tool_calls"] = [_tool_call(call, where) for call in shown["tool_calls"]]
        return shown

    def _run(self, variables: dict[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_OUTPUT_CHARACTERS:
                    raise _OutOfBounds(f"it wrote more than {MAX_OUTPUT_CHARACTERS} characters")
        except _OutOfBounds as error:
            raise BadRequest(f"the chat template was stopped: {error}; send fewer messages", param="messages") from None
        except jinja2.TemplateError as error:
            raise BadRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        except Exception as error:  # a template can raise what any expression can
            raise BadRequest(
                f"the chat template cannot show these messages ({type(error).__name__}: {error}): "
                "compare their fields and the order of their roles with what this model expects",
                param="messages",
            ) from error
        # half a surrogate pair in a call's arguments, which has no UTF-8 and so no tokens: as the escape that it was
        return "".join(pieces).encode("utf-8", "backslashreplace").decode()


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise BadRequest(f"{where}.content must be a string, a list of text parts or null", param=f"{where}.content")
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise BadRequest(
                f"{where}.content has a part that is not text: send parts of the form "
                '{"type": "text", "text": "..."} only',
                param=f"{where}.content",
            )
    return "\n".join(texts)


def _tool_call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments travel as JSON text; templates write the object out in their own way."""
    given = call.get("function") or {}
    if not isinstance(given, Mapping):
        raise BadRequest(f"{where}.tool_calls has a function that is no object: send its name and arguments",
                         param=f"{where}.tool_calls")
    function = dict(given)
    if isinstance(arguments := function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise BadRequest(
                f"{where}.tool_calls has arguments that are no JSON ({error}): send what the model answered",
                param=f"{where}.tool_calls",
            ) from None
    return {**call, "function": function}


def _open_end(text: str, final: str) -> str:
    """`text` up to where the last message ends, trimmed there if the template trims."""
    end = text.rfind(_END_OF_ANSWER.strip())
    if end < 0 or final.strip() not in text[:end]:
        raise BadRequest(
            "the last message cannot be continued: the chat template does not show it as it is", param="messages"
        )
    return text[:end] if text.startswith(_END_OF_ANSWER, end) else text[:end].rstrip()


# --- the sandbox, as Hugging Face sets it up, with bounds ------------------------------------------------------------


class _OutOfBounds(Exception):
    pass


class _Budget:
    """Rounds left for all loops of one rendering."""

    def __init__(self) -> None:
        self.rounds = MAX_LOOP_ROUNDS

    def take(self, items: Iterable[Any]) -> list[Any]:
        taken = []
        for item in items:
            if not self.rounds:
                raise _OutOfBounds(f"its loops ran more than {MAX_LOOP_ROUNDS} rounds")
            self.rounds -= 1
            taken.append(item)
        return taken


@jinja2.pass_context
def _counted(context: Context, items: Iterable[Any]) -> list[Any]:
    budget: _Budget = context[_BUDGET]
    return budget.take(items)


@jinja2.pass_context
def _strftime_now(context: Context, format: str) -> str:
    return datetime.fromtimestamp(context[_NOW], UTC).strftime(format)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)  # the type itself would come with its attributes


class _PlainNamespace(Namespace):
    """Jinja's, closed to names that could reach Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, given = args[0], dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.TemplateError(f"namespace names must not begin with an underscore: {name!r}")


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            counted = nodes.Name("__counted", "load", lineno=loop.lineno)
            loop.iter = nodes.Call(counted, [loop.iter], [], None, None, lineno=loop.lineno)
        return template


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    provided: dict[str, Callable[..., Any]] = {
        "__counted": _counted,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
        "namespace": _PlainNamespace,
    }
    environment.globals.update(provided)
    return environment


_ENVIRONMENT = _environment()
