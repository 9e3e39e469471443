"""Calls and thoughts in text: the same parts however the text was cut, and what only looks like a call is text."""

import json
from collections.abc import Callable, Iterable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.dialects.dialect import Dialect, dialect_of, told
from gateway.dialects.json_object import JsonObject
from gateway.dialects.parts import Argued, Called, CallEnded, Part, Reader, Said, Thought, joined

OFFERED = ("f", "g")


def reader(calls: str = "none", thoughts: str = "none", opened: bool = False) -> Callable[[], Reader]:
    def made() -> Reader:
        found = Dialect(calls, thoughts).reader(OFFERED, opened)
        assert found is not None
        return found

    return made


HERMES, LLAMA, MISTRAL = reader("hermes"), reader("llama3"), reader("mistral")
HARMONY, THINKING, OPENED = reader("harmony", "harmony"), reader("hermes", "think"), reader("none", "think", True)


def read(make: Callable[[], Reader], pieces: Iterable[str]) -> list[Part]:
    made = make()
    parts = [part for piece in pieces for part in made.push(piece)]
    return joined([*parts, *made.flush()])


def read_however_cut(make: Callable[[], Reader], text: str) -> list[Part]:
    """What all ways of cutting `text` in two, and cutting it into single characters, agree on."""
    whole = read(make, [text])
    assert read(make, text) == whole
    for place in range(len(text) + 1):
        assert read(make, [text[:place], text[place:]]) == whole, place
    return whole


def call(name: str, arguments: str) -> list[Part]:
    return [Called(name), Argued(arguments), CallEnded()]


@pytest.mark.parametrize(("make", "text", "parts"), [
    (HERMES, 'Hi \n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n<tool_call>{"name": "g", '
             '"arguments": {}}</tool_call>\n bye',
     [Said("Hi"), *call("f", '{"a": 1}'), *call("g", "{}"), Said("bye")]),
    (HERMES, '<tool_call>[{"name": "f", "arguments": {}}, {"arguments": {"x": [{}, [1]]}, "name": "g"}]</tool_call>',
     [*call("f", "{}"), *call("g", '{"x": [{}, [1]]}')]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"q": "</tool_call>\\"}{"}}',
     call("f", '{"q": "</tool_call>\\"}{"}')),
    (HERMES, '<tool_call>{"id": 7, "name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', call("f", '{"a": 1}')),
    (HERMES, r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud83d\"}"}</tool_call>',
     call("f", r'{"a": "\ud83d"}')),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', call("f", "{}")),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call> so', [*call("f", '{"a": 1}'), Said("so")]),
    (LLAMA, '\n{"name": "f", "parameters": {"a": "b"}}; {"name": "g", "parameters": {}}\n so',
     [*call("f", '{"a": "b"}'), *call("g", "{}"), Said("so")]),
    (LLAMA, 'So: <|python_tag|>{"name": "f", "parameters": {}}', [Said("So:"), *call("f", "{}")]),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}, "id": "abcdefghi"}, {"name": "g", '
              '"arguments": {}}]',
     [*call("f", '{"a": [1]}'), *call("g", "{}")]),
    (MISTRAL, 'ok [TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}',
     [Said("ok"), *call("f", '{"a": 1}'), *call("g", "{}")]),
    (HARMONY, '<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.f '
              '<|constrain|>json<|message|>{"a": 1}', [Thought("hm"), *call("f", '{"a": 1}')]),
    (HARMONY, "<|channel|>commentary<|message|>Let me look. <|end|><|start|>assistant to=functions.g<|channel|>"
              "commentary json<|message|>{}<|call|>", [Said("Let me look. "), *call("g", "{}")]),
    (HARMONY, "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Hello.<|return|>",
     [Thought("a"), Said("Hello.")]),
    (THINKING, '<think>\na\nb\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>',
     [Thought("a\nb"), *call("f", "{}")]),
    (THINKING, "Hi <think>no</think>", [Said("Hi <think>no</think>")]),
    (OPENED, "a\n</think>\n\nb <think>", [Thought("a"), Said("b <think>")]),
    (OPENED, "never done", [Thought("never done")]),
])
def test_calls_and_thoughts_are_read_however_the_text_was_cut(
        make: Callable[[], Reader], text: str, parts: list[Part]) -> None:
    assert read_however_cut(make, text) == parts


@pytest.mark.parametrize(("make", "text"), [
    (HERMES, 'a <tool_call> is <tool_call>[1, {"name": "f"}] and </tool_call>'), (HERMES, "<tool_ca"), (HERMES, " \n "),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'), (HERMES, '<tool_call>{"name": "f", "argu'),
    (HERMES, r'<tool_call>{"name": "f", "arguments": "{\"a\": NaN}"}</tool_call>'),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'), (HERMES, '{"name": "f", "arguments": {}}'),
    (LLAMA, '{"name": "f"}'), (LLAMA, '{"name": "Bob", "parameters": {}}'),
    (LLAMA, 'x {"name": "f", "parameters": {}}'),
    (LLAMA, "<|python_tag|>print(1)"), (MISTRAL, "[TOOL_CALLS] [1, 2]"), (MISTRAL, "[TOOL_CALLS]h[ARGS]{}"),
    (MISTRAL, "[TOOL_CALLS]f" + 300 * " " + "{}"), (MISTRAL, "f[ARGS]{}"), (HARMONY, "just <|channel|> text"),
    (THINKING, "<thin"), (THINKING, "\n"), (HERMES, ""),
])
def test_what_only_looks_like_a_call_stays_text(make: Callable[[], Reader], text: str) -> None:
    assert read_however_cut(make, text) == joined([Said(text)])


def test_a_call_that_is_cut_off_has_no_end() -> None:
    for make, text in ((HERMES, '<tool_call>{"name": "f", "arguments": {"a": "b'),
                       (LLAMA, '{"name": "f", "parameters": {"a": "b'), (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": "b'),
                       (HARMONY, '<|channel|>commentary to=functions.f<|message|>{"a": "b')):
        assert read_however_cut(make, text) == [Called("f"), Argued('{"a": "b')]


def test_a_call_that_breaks_off_in_its_arguments_is_not_whole_and_the_rest_is_text() -> None:
    parts = read_however_cut(HERMES, '<tool_call>{"name": "f", "arguments": {"a": nul}}</tool_call> b')
    assert parts == [Called("f"), Argued('{"a": nul'), Said("}}</tool_call> b")]


def test_a_line_break_inside_a_string_becomes_its_escape() -> None:
    (_, argued, _) = read_however_cut(HERMES, '<tool_call>{"name": "f", "arguments": {"a": "x\ny\x01"}}')
    assert isinstance(argued, Argued) and json.loads(argued.text) == {"a": "x\ny\x01"}


PIECES = st.sampled_from([
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    "<|channel|>", "<|message|>", "<|end|>", "<|start|>", "assistant", "analysis", "final", "commentary",
    " to=functions.f", "{", "}", "[", "]", '"name"', ": ", '"f"', '"arguments"', '"parameters"', ", ", "; ", "f", " ",
    "\n", '{"name": "f", "arguments": {"a": 1}}', '{"name": "f", "parameters": {"a": "}"}}', '{"a": "b"}', "é", "<",
    "7"])


@settings(deadline=None, max_examples=300)
@given(text=st.lists(PIECES, max_size=14).map("".join), cuts=st.lists(st.integers(0, 300), max_size=8))
def test_any_text_gives_the_same_parts_however_it_is_cut(text: str, cuts: list[int]) -> None:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[low:high] for low, high in pairwise(edges)]
    for make in (HERMES, LLAMA, MISTRAL, HARMONY, THINKING, OPENED):
        whole = read(make, [text])
        assert read(make, pieces) == whole and read(make, text) == whole
        for part in whole:
            assert not isinstance(part, Called) or part.name in OFFERED


@settings(deadline=None)
@given(value=st.dictionaries(st.text(max_size=4), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8),
    max_size=4), tight=st.booleans())
def test_every_object_of_json_is_one_call_and_ends_where_it_ends(value: dict[str, object], tight: bool) -> None:
    text = json.dumps(value, ensure_ascii=tight, separators=(",", ":") if tight else None)
    for make, before, after in ((HERMES, '<tool_call>{"name": "f", "arguments": ', "}</tool_call>"),
                                (HERMES, '<tool_call>{"arguments": ', ', "name": "f"}</tool_call>'),
                                (MISTRAL, "[TOOL_CALLS]f", ""), (LLAMA, '{"name":"f","parameters":', "}")):
        assert read(make, before + text + after) == call("f", text)


@pytest.mark.parametrize("text", ["{,}", "{1: 2}", '{"a"}', '{"a":}', '{"a":1,}', "[", '{"a":[1,]}', '{"a":01}',
                                  '{"a":tru}', '{"a":"\\x"}', '{"a":"\\u12g4"}', '{"a":1 2}', '{"a":[1}', "{} x"])
def test_what_is_no_object_is_found_out(text: str) -> None:
    made = JsonObject()
    assert any(made.feed(character) is None for character in text)


# --- which dialect ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "special", "calls", "thoughts", "shows"), [
    ("{% if tools %}<tool_call>{% endif %}", (), "hermes", "none", False),
    ("{{ tools }}<tool_call></think>", (), "hermes", "think", False),
    ('{{ tools }}{"name": function name, "parameters": ...}', ("<|python_tag|>",), "llama3", "none", False),
    ("[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]", ("[TOOL_CALLS]",), "mistral", "none", False),
    ("<|channel|>{{ tools }}", ("<|channel|>",), "harmony", "harmony", False),
    ("{{ messages }}", (), "hermes", "none", True),
    ("{{ messages }}{{ tool_calls }}</think>", (), "none", "think", True),
    ("{{ messages }}</think>", (), "hermes", "think", True),
    ("{{ tools }}<tool_call><function=f>", (), "none", "none", False),
    ("{{ tools }}", (), "none", "none", False),
    ("", (), "none", "none", True),
])
def test_the_dialect_is_read_from_template_and_vocabulary(
        template: str, special: tuple[str, ...], calls: str, thoughts: str, shows: bool) -> None:
    found = dialect_of(template, special)
    assert (found.calls, found.thoughts, found.shows) == (calls, thoughts, shows) and found.why


def test_a_setting_has_the_last_word_and_must_know_what_it_says() -> None:
    found = told(dialect_of("{{ tools }}", ()), "mistral", "think")
    assert (found.calls, found.thoughts) == ("mistral", "think")
    with pytest.raises(ValueError, match="--tool-formats knows hermes, llama3"):
        told(found, "xml", None)
    with pytest.raises(ValueError, match="--reasoning-formats knows think"):
        told(found, None, "hermes")
