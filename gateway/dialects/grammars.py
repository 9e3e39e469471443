"""What an answer may be, in the form of a model's dialect: calls that are demanded or strict, behind free thoughts.

Rules: what the model may choose is in one grammar, so that calls, thoughts and the form of an answer hold together; the
arguments are those of the tool's schema; the form around them is the one that the reader of the dialect reads. Without
anything to enforce there is no grammar.
Pure. A grammar is Lark as llguidance reads it: `%json` for schemas, `<[17]>` for a token that is no text.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.dialects import harmony, hermes, mistral, thinking
from gateway.dialects.dialect import Dialect
from gateway.tools import Tool, Tools
from shared.errors import BadRequest
from shared.messages import Grammar

MOST_CALLS = 16  # a small model may otherwise call until its tokens are used up
# as templates write objects, and no white space that a small model could lose itself in
_TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_LOOSE = {"whitespace_pattern": r"[ \n\t]{0,32}"}  # of what a client reads itself, as workers bound it
_TEXT = r"/(.|\n)+/"
_ANYTHING = r"/(.|\n)*/"


def enforced(dialect: Dialect, tools: Tools | None, answer: Grammar | None, opened: bool,
             special: Mapping[str, int]) -> Grammar | None:
    """What the answer has to be; None where it may be anything, `answer` itself where nothing is to be added.

    `answer`: what it has to be where it is no call. `opened`: the prompt has opened a thought. `special`: ids of tokens
    that show no text. Raises BadRequest for what does not go together.
    """
    if tools is not None and dialect.calls == "none":
        raise BadRequest(f"this model is not known to call tools ({dialect.why}): leave tools out, or start the "
                         "gateway with --tool-formats", param="tools")
    thinks = dialect.thoughts != "none"
    demanded = tools is not None and (tools.required or any(tool.strict for tool in tools.callables()))
    if not demanded and (answer is None or (tools is None and not thinks)):
        return answer
    if answer is not None and answer.kind == "lark":
        if tools is None:
            return answer
        raise BadRequest("a grammar of one's own excludes tools: send one of them", param="tools")
    writer = _Writer(dialect, special)
    try:
        return Grammar("lark", writer.grammar(tools, answer, opened))
    except RecursionError:
        raise BadRequest("a schema is nested too deeply: send flatter ones", param="tools") from None


class _Writer:
    """One grammar. Every method gives an expression, and leaves the rules that it needs."""

    def __init__(self, dialect: Dialect, special: Mapping[str, int]) -> None:
        self._dialect = dialect
        self._special = special
        self._rules = {"TEXT": _TEXT}

    def grammar(self, tools: Tools | None, answer: Grammar | None, opened: bool) -> str:
        if self._dialect.calls == "harmony" or self._dialect.thoughts == "harmony":
            start = self._harmony(tools, answer)
        else:
            start = self._answer(tools, answer)
            if self._dialect.thoughts == "think":
                start = self._thought(start, opened)
        return "\n".join([f"start: {start}", *(f"{name}: {rule}" for name, rule in self._rules.items()), ""])

    # --- answers that stand for themselves ---------------------------------------------------------------------------

    def _answer(self, tools: Tools | None, answer: Grammar | None) -> str:
        ways = [] if tools is None or not tools.callable else [self._calls(tools)]
        if tools is None or not tools.required:
            if answer is not None:
                ways.append(self._form(answer))
            elif tools is not None:
                return self._free(tools)
        return _either(ways)

    def _thought(self, rest: str, opened: bool) -> str:
        self._rules["after_thought"] = r"/[ \t\r\n]{0,8}/"
        self._rules["spoken"] = rest
        opening, closing = self._mark(thinking.OPENING), self._until(thinking.CLOSING, "thought")
        if opened:
            return f"{closing} after_thought spoken"
        return f"({opening} {closing} after_thought)? spoken"

    def _calls(self, tools: Tools) -> str:
        """Calls, one at least: `rest` stands behind the mark of the first."""
        each = [self._call(number, tool) for number, tool in enumerate(tools.callables())]
        self._rules["call"] = _either(each)
        if self._dialect.calls == "llama3":
            self._rules["calls"] = "call"  # one: its template shows no more of them when they come back
            return "calls"
        mark = self._mark(self._dialect.opening)
        if self._dialect.calls == "hermes":
            self._rules["rest"] = "call" + _more(tools, f'"\\n" {mark} call')
        elif mistral.ARGUMENTS in self._special:
            self._rules["rest"] = "call" + _more(tools, f"{mark} call")
        else:
            self._rules["rest"] = '" "? "[" call' + _more(tools, '", " call') + ' "]"'
        self._rules["calls"] = f"{mark} rest"
        return "calls"

    def _call(self, number: int, tool: Tool) -> str:
        """One call, without its mark."""
        name, arguments = json.dumps(tool.name, ensure_ascii=False), self._arguments(number, tool)
        match self._dialect.calls:
            case "llama3":
                return _text('{"name": ' + name + ', "parameters": ') + f' {arguments} "}}"'
            case "hermes":
                return (_text('\n{"name": ' + name + ', "arguments": ') + f" {arguments} " + _text("}\n") + " "
                        + self._mark(hermes.CLOSING))
            case _ if mistral.ARGUMENTS in self._special:
                return f"{_text(tool.name)} {self._mark(mistral.ARGUMENTS)} {arguments}"
            case _:
                return _text('{"name": ' + name + ', "arguments": ') + f' {arguments} "}}"'

    def _free(self, tools: Tools) -> str:
        """Text, and calls behind it: nothing that begins as a call is anything else."""
        calls = self._calls(tools)
        if self._dialect.calls == "llama3":
            self._rules["PLAIN"] = r"/([ \t\r\n]*[^{ \t\r\n](.|\n)*)?/"
            return f"{calls} | PLAIN"
        opening = self._dialect.opening
        if opening in self._special:
            return f"TEXT? {calls}?"
        self._rules["PLAIN"] = f"{_ANYTHING} & ~/(.|\\n)*{re.escape(opening)}(.|\\n)*/"
        return f"PLAIN | {self._until(opening, 'before')} rest"

    # --- messages with channels --------------------------------------------------------------------------------------

    def _harmony(self, tools: Tools | None, answer: Grammar | None) -> str:
        channel, message = self._mark(harmony.CHANNEL), self._mark(harmony.MESSAGE)
        again = f'{self._mark(harmony.END)} {self._mark(harmony.START)} "assistant"'
        self._rules["aside"] = f'{channel} ("analysis" | "commentary") {message} TEXT? {again}'
        ways = []
        if tools is not None:
            for number, tool in enumerate(tools.callables()):
                receiver = _text(f"commentary to=functions.{tool.name} ")
                ways.append(f'{channel} {receiver} {self._mark(harmony.CONSTRAIN)} "json" {message} '
                            f"{self._arguments(number, tool)}")
        if tools is None or not tools.required:
            form = "TEXT?" if answer is None else self._form(answer)
            ways.append(f'{channel} "final" {message} ({form})')
        return f"aside{{0,{MOST_CALLS}}} ({_either(ways)})"

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _mark(self, mark: str) -> str:
        """A mark, whether or not it is a token that is no text."""
        return f"<[{self._special[mark]}]>" if mark in self._special else _text(mark)

    def _until(self, mark: str, name: str) -> str:
        """Anything up to a mark, and the mark."""
        if mark in self._special:
            return f"TEXT? {self._mark(mark)}"
        self._rules[f"{name}[suffix={_text(mark)}]"] = _ANYTHING
        return name

    def _arguments(self, number: int, tool: Tool) -> str:
        self._rules[f"args{number}"] = f"%json {_encode(_schema(tool))}"
        return f"args{number}"

    def _form(self, answer: Grammar) -> str:
        match answer.kind:
            case "json":
                schema = msgspec.json.decode(answer.text)
                if schema is not False:  # of which a worker says that nothing fits
                    schema = {"x-guidance": _LOOSE} | ({} if schema is True else schema)
                self._rules["form"] = f"%json {_encode(schema)}"
            case "choice":
                self._rules["form"] = _either(map(_text, msgspec.json.decode(answer.text, type=list[str])))
            case _:
                self._rules["form"] = "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", answer.text) + "/"
        return "form"


def _schema(tool: Tool) -> dict[str, Any]:
    """Of a tool's arguments: an object that has what the schema names and nothing else, unless the schema says so.

    A tool without a schema takes nothing; one whose schema names nothing may take anything.
    """
    schema = {"type": "object", **({"properties": {}} if tool.parameters is None else tool.parameters)}
    opened = {"additionalProperties", "patternProperties", "$ref", "allOf", "anyOf", "oneOf"}
    if "properties" in schema and not opened & set(schema):
        schema["additionalProperties"] = False
    return schema | {"x-guidance": _TIGHT if tool.strict else _TIGHT | {"lenient": True}}


def _more(tools: Tools, call: str) -> str:
    """Further calls, where there may be any."""
    return f" ({call}){{0,{MOST_CALLS - 1}}}" if tools.parallel else ""


def _either(ways: Any) -> str:
    return " | ".join(ways)


def _text(text: str) -> str:
    """A string in Lark."""
    return json.dumps(text, ensure_ascii=False)


def _encode(value: Any) -> str:
    return msgspec.json.encode(value).decode()
