"""What models and their publishers write: answers with calls and thoughts, chat templates, and what clients ask for.

Answers are read the same however they were cut. A template shows messages or is stopped with a sentence; a grammar can
be begun or is refused with one.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from itertools import pairwise

from gateway.dialects.dialect import Dialect
from gateway.dialects.parts import Part, joined
from gateway.model_files import UnusableModel
from gateway.template import ChatTemplate
from shared.errors import BadRequest

Play = Callable[[int], None]
DIALECTS = [Dialect(calls, thoughts) for calls, thoughts in (
    ("hermes", "none"), ("llama3", "none"), ("mistral", "none"), ("harmony", "harmony"), ("hermes", "think"),
    ("none", "think"), ("llama3", "think"))]
PIECES = ("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
          "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>", "analysis",
          "commentary", "final", " to=functions.f", "json", "assistant", '{"name": "f", "arguments": {"a": 1}}',
          '"name": "g"',
          '{"name": "f", "parameters": {', '"arguments": ', '"arguments": "{\\"a\\": 1}"', "{", "}", "[", "]", ",",
          ":", '"',
          "\\", "\\u", "d83d", "\\ud83d", "\\ude00", "\N{GRINNING FACE}", "\u00e9", "\n", " ", "1e5", "null", "tru",
          "f", "; ", "<", "|>",
          "\x00", "text ")


def _answer(chooser: random.Random) -> str:
    pieces = [chooser.choice(PIECES) for _ in range(chooser.choice((3, 8, 20, 60)))]
    for at in range(len(pieces)):
        if chooser.random() < 0.1:
            pieces[at] = pieces[at][:chooser.randint(0, len(pieces[at]))]  # a mark that ends too soon
    if chooser.random() < 0.03:
        pieces[chooser.randrange(len(pieces))] *= 2000
    return "".join(pieces)


@contextlib.contextmanager
def dialects() -> Iterator[Play]:
    def play(seed: int) -> None:
        chooser = random.Random(seed)
        text, dialect, opened = _answer(chooser), chooser.choice(DIALECTS), chooser.random() < 0.3

        def read(pieces: list[str]) -> list[Part]:
            reader = dialect.reader(("f", "g"), opened)
            assert reader is not None
            parts = [part for piece in pieces for part in reader.push(piece)]
            return joined([*parts, *reader.flush()])

        whole = read([text])
        assert read(list(text)) == whole, (dialect, opened, text[:300])
        for _ in range(20):
            cuts = sorted(chooser.choices(range(len(text) + 1), k=chooser.randint(1, 6)))
            pieces = [text[start:end] for start, end in pairwise([0, *cuts, len(text)])]
            assert read(pieces) == whole, (dialect, opened, text[:300], cuts)
        if len(text) <= 200:
            for place in range(len(text)):
                assert read([text[:place], text[place:]]) == whole, (dialect, opened, text, place)

    yield play


HUGE = ("9", "99999999", "10**10", "9**9**9", "2**2**40", "'9'", "messages", "n.x", "none", "true", "[]", "{}", "1.5",
        "-1")
VALUES = ("'a'", "n.x", "messages", "messages[0].content", "[0]", "(1,)", "'%9999999999d'", "'{:>9999999999}'",
          "{'a': 1}",
          "range(99999)", "range(99999)|list", "bos_token")
OPERATORS = ("*", "+", "~", "**", "%", "//", "<<")
FILTERS = ("center({})", "indent({})", "replace('a', n.x)", "replace('', n.x)", "join(n.x)", "format({})",
           "wordwrap({})",
           "batch({})|list", "slice({})|list", "tojson(indent={})", "truncate({})", "list", "string", "length", "sum",
           "upper",
           "map('string')|join", "round({})", "float", "int", "urlize", "xmlattr", "pprint", "trim", "title",
           "unique|list",
           "dictsort", "groupby(0)", "random", "filesizeformat", "escape", "forceescape", "striptags", "wordcount",
           "reverse")
METHODS = ("ljust({})", "rjust({})", "zfill({})", "center({})", "expandtabs({})", "join(n.x)", "replace('a', n.x)",
           "format({})",
           "splitlines()", "encode()", "translate({})", "items()", "__class__", "__mul__({})", "__len__()",
           "split('')", "count('')",
           "format_map({})", "append(1)", "x")


CALLED = ("lipsum", "range", "dict", "cycler", "joiner", "namespace", "strftime_now", "x")


def _expression(chooser: random.Random, depth: int = 0) -> str:
    value, number = chooser.choice(VALUES), chooser.choice(HUGE)
    inner = _expression(chooser, depth + 1) if depth < 2 and chooser.random() < 0.5 else value
    match chooser.randrange(5):
        case 0:
            return f"({inner}) {chooser.choice(OPERATORS)} ({number})"
        case 1:
            return f"({inner})|{chooser.choice(FILTERS).format(number)}"
        case 2:
            return f"({inner}).{chooser.choice(METHODS).format(number)}"
        case 3:
            return f"({inner}) {chooser.choice(OPERATORS)} ({inner})"
        case _:
            return f"{chooser.choice(CALLED)}({inner})"


def template_source(chooser: random.Random) -> str:
    """A template with an expression or two that may ask for very much, in loops that let it grow."""
    parts = ["{% set n = namespace(x='aaaaaaaa') %}"]
    for _ in range(chooser.randint(1, 4)):
        made = _expression(chooser)
        parts.append(chooser.choice((
            "{{ %s }}", "{%% set n.x = %s %%}", "{%% for a in range(60) %%}{%% set n.x = %s %%}{%% endfor %%}",
            "{%% for a in %s %%}{{ a }}{%% endfor %%}", "{%% for a in range(9999) %%}{{ %s }}{%% endfor %%}",
            "{%% macro m() %%}{{ m() }}{{ %s }}{%% endmacro %%}{{ m() }}", "{%% if %s %%}x{%% endif %%}",
            "{%% set y %%}{{ %s }}{%% endset %%}{%% set n.x = n.x ~ y %%}",
            "{%% filter center(99) %%}{{ %s }}{%% endfilter %%}",
        )) % made)
    text = "".join(parts)
    if chooser.random() < 0.1:
        at = chooser.randrange(len(text))
        text = text[:at] + chooser.choice(("{", "%}", "{{", "'", "(" * 5000, "|", "\x00")) + text[at:]
    return text


@contextlib.contextmanager
def template() -> Iterator[Play]:
    def play(seed: int) -> None:
        source = template_source(random.Random(seed))
        try:
            ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "user", "content": "Hello"}], now_s=0.0)
        except UnusableModel:
            pass
        except BadRequest as error:
            # it was stopped by the fuzzer's own bound
            assert not isinstance(error.__cause__, MemoryError), source

    yield play
