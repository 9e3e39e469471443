"""Messages to prompt, through the Jinja template a model came with.

Rules: rendering equals Hugging Face's, so that a prompt is the one the model was trained on. A template is part of the
model and no more trusted than a download: it runs in Jinja's immutable sandbox, and loops and output are bounded so
that a mistake in it costs one request and not the gateway. What it refuses is the client's error and says so.
Pure; the time of day is passed in.
"""

import json
import re
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
from jinja2.visitor import NodeTransformer

from gateway.model_files import ModelCard, UnusableModel
from shared.errors import BadRequest

MAX_OUTPUT_CHARACTERS = 16 << 20  # four times the largest body a gateway takes
MAX_LOOP_ROUNDS = 1_000_000  # of all loops together; a template makes a few per message and per tool
MAX_MADE_CHARACTERS = 16 * MAX_OUTPUT_CHARACTERS  # of all values together that expressions make on the way
MAX_INTEGER_BITS = 4096
MAX_WIDTH = 10_000  # that a text may be filled up to

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
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:  # Python's own parser, behind Jinja's
            raise UnusableModel(f"the chat template is nested too deep, or no code comes of it: {error}") from error
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
    """What is left for one rendering: rounds of all its loops, characters of all that it makes."""

    def __init__(self) -> None:
        self.rounds = MAX_LOOP_ROUNDS
        self.characters = MAX_MADE_CHARACTERS

    def make(self, size: int) -> None:
        """Before so many characters, or elements of a list, are made."""
        self.characters -= size
        if size > MAX_OUTPUT_CHARACTERS or self.characters < 0:
            raise _OutOfBounds(f"it made values of more than {MAX_OUTPUT_CHARACTERS} characters, or too many of them")

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


# --- what expressions may make ---------------------------------------------------------------------------------------

_LONG_WIDTH = re.compile(r"\d{5}")
_WIDTH_OF_AN_ARGUMENT = re.compile(r"%[^a-zA-Z%]*\*|\{[^{}]*\{")
_FILLING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "batch", "slice",
                      "tojson"})


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict | range) else 0


def _size_of_call(name: str, value: Any, args: Sequence[Any]) -> int:
    """At least as much as the filter or method `name` of `value` makes. Raises _OutOfBounds for widths beyond all."""
    size, texts = _size(value), [_size(each) for each in args]
    if name in _FILLING:
        if any(isinstance(each, int) and each > MAX_WIDTH for each in args):
            raise _OutOfBounds(f"{name} was asked for more than {MAX_WIDTH}")
        width = max((each for each in args if isinstance(each, int)), default=1)
        return size + max(width, 1) + size * max(texts, default=0) + (
            size * max(width, 0) if name in ("expandtabs", "indent", "tojson") else 0)
    if name == "replace" and len(args) > 1:
        places = value.count(args[0]) if isinstance(value, str) and isinstance(args[0], str) else size
        return size + places * texts[1]
    if name == "join":
        # a filter joins by its argument, a method its argument by what it is of
        return size * max(texts[:1], default=0) + size + sum(texts)
    if name == "format":
        return _size_of_format(value, args)
    return size


def _size_of_format(text: Any, args: Sequence[Any]) -> int:
    if not isinstance(text, str):
        return 0
    numbers = [each for each in args if isinstance(each, int)]
    if _LONG_WIDTH.search(text) or (_WIDTH_OF_AN_ARGUMENT.search(text) and max(numbers, default=0) > MAX_WIDTH):
        raise _OutOfBounds(f"a text was to be filled up to more than {MAX_WIDTH} characters")
    return len(text) * (1 + MAX_WIDTH // 100) + (text.count("%") + text.count("{")) * max(map(_size, args), default=0)


def _size_of_operation(operator: str, left: Any, right: Any) -> int:
    """At least as much as comes of it. Raises _OutOfBounds for integers beyond all."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_INTEGER_BITS:
            raise _OutOfBounds(f"an integer was to have more than {MAX_INTEGER_BITS} bits")
        return 0
    if operator == "*":
        times, of = (left, right) if isinstance(left, int) else (right, left)
        return _size(of) * times if isinstance(times, int) and times > 0 else 0
    if operator == "%":
        return _size_of_format(left, right if isinstance(right, tuple) else [right])
    return _size(left) + _size(right)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that says what it is to make before it does; as all of these, it is never run when compiled."""
    passed = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @jinja2.pass_context
    def bounded(context: Context, value: Any, *args: Any, **more: Any) -> Any:
        budget: _Budget = context[_BUDGET]
        if name == "join" and not isinstance(value, str | list | tuple | dict):
            value = budget.take(value)
        budget.make(_size_of_call(name, value, [*args, *more.values()]))
        first = {"context": (context,), "eval_context": (context.eval_ctx,), "environment": (context.environment,)}
        made = function(*first.get(passed, ()), value, *args, **more)
        budget.make(_size(made))
        return made

    return bounded


@jinja2.pass_context
def _concatenated(context: Context, *values: Any) -> str:
    texts = [str(value) for value in values]
    budget: _Budget = context[_BUDGET]
    budget.make(sum(map(len, texts)))
    return "".join(texts)


class _Bounding(NodeTransformer):
    """Loops are counted, and what `~` makes."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("__counted", [node.iter], node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("__concatenated", node.nodes, node.lineno)


def _call(name: str, given: Sequence[nodes.Node], line: int) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load", lineno=line), list(given), [], None, None, lineno=line)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Bounding().visit(super()._parse(source, name, filename))
        return template

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget: _Budget = context[_BUDGET]
        if type(left) is str and type(right) is str and operator == "+":  # nearly all there are
            budget.make(len(left) + len(right))
            return left + right
        budget.make(_size_of_operation(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        method = getattr(__obj, "__wrapped__", __obj)
        value = getattr(method, "__self__", None)
        if isinstance(value, str | bytes | list | tuple | dict):
            budget: _Budget = __context[_BUDGET]
            budget.make(_size_of_call(method.__name__, value, [*args, *kwargs.values()]))
        return super().call(__context, __obj, *args, **kwargs)


def _environment() -> jinja2.Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _bounded(name, function) for name, function in environment.filters.items()}
    provided: dict[str, Callable[..., Any]] = {
        "__counted": _counted,
        "__concatenated": _concatenated,
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _dict,
        "namespace": _PlainNamespace,
    }
    environment.globals.update(provided)
    del environment.globals["lipsum"]  # words by the number
    return environment


_ENVIRONMENT = _environment()
