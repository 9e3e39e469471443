"""Whatever a grammar of calls lets a model write, the reader of its dialect reads: walked at random by llguidance."""

import json
import random
from functools import cache
from typing import Any

import jsonschema
import numpy as np
import pytest

from gateway.dialects.dialect import MARKS, Dialect
from gateway.dialects.grammars import enforced
from gateway.dialects.parts import Argued, Called, CallEnded, Part, Said, Thought, joined
from gateway.tools import Tool, Tools
from shared.errors import BadRequest
from shared.messages import Grammar
from shared.vocabulary import Vocabulary
from worker.grammar import Grammars

END = 256
SPECIAL = ["[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>",
           "<|constrain|>"]
WORDS = [*(bytes([byte]) for byte in range(256)), b"<|return|>", *(mark.encode() for mark in SPECIAL),
         b"<tool_call>", b"</tool_call>", b"<think>", b"</think>"]
IDS = {mark: 257 + number for number, mark in enumerate(SPECIAL)}
WEATHER = Tool("weather", "how it is", {"type": "object", "properties": {
    "city": {"type": "string", "maxLength": 4}, "days": {"enum": [1, 2]}}, "required": ["city", "days"]}, True)
TIME = Tool("time")
FORM = Grammar("json", '{"type":"object","properties":{"a":{"enum":[1]}},"required":["a"],'
                       '"additionalProperties":false}')
DIALECTS = [Dialect("hermes"), Dialect("llama3"), Dialect("mistral"), Dialect("harmony", "harmony"),
            Dialect("hermes", "think")]


@cache
def grammars() -> Grammars:
    return Grammars(lambda: Vocabulary("v", WORDS, [END], [END, *IDS.values()]), len(WORDS))


def offer(required: bool, parallel: bool = True) -> Tools:
    return Tools((WEATHER, TIME), frozenset({"weather", "time"}), required, parallel)


def walk(grammar: Grammar, seed: int, most: int = 3000) -> str | None:
    """Any answer that the grammar permits; None where it did not end in time."""
    chooser, state, written = random.Random(seed), grammars().begin(grammar, []), b""
    masks = np.zeros((1, -(-len(WORDS) // 32)), np.uint32)
    for _ in range(most):
        state.fill(masks, [])
        ids = [id for id in range(len(WORDS)) if masks[0, id // 32] >> np.uint32(id % 32) & 1]
        # marks, braces and the end are likelier than other bytes, or nothing would ever begin or end
        likely = [1 if id < 256 and id not in b'{"' else 60 for id in ids]
        id = chooser.choices(ids, likely if len(ids) > 8 else None)[0]
        assert state.advance(id)
        if id == END:
            return written.decode()
        written += WORDS[id]
    return None


def read(dialect: Dialect, text: str, opened: bool = False) -> list[Part]:
    reader = dialect.reader(("weather", "time"), opened)
    assert reader is not None
    return joined([*reader.push(text), *reader.flush()])


def check_calls(parts: list[Part]) -> int:
    """How many there are; each is whole and fits the schema of its tool."""
    names = [part.name for part in parts if isinstance(part, Called)]
    arguments = [json.loads(part.text) for part in parts if isinstance(part, Argued)]
    assert len(names) == len(arguments) == sum(isinstance(part, CallEnded) for part in parts)
    for name, given in zip(names, arguments, strict=True):
        if name == "weather":
            jsonschema.validate(given, WEATHER.parameters)
        else:
            assert given == {}
    return len(names)


@pytest.mark.parametrize("named_arguments", [True, False])
@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: f"{dialect.calls}-{dialect.thoughts}")
def test_a_demanded_call_is_always_there(dialect: Dialect, named_arguments: bool) -> None:
    special = {mark: id for mark, id in IDS.items() if named_arguments or mark != "[ARGS]"}
    for parallel in (True, False):
        grammar = enforced(dialect, offer(True, parallel), None, False, special)
        assert grammar is not None
        ended = [text for seed in range(8) if (text := walk(grammar, seed)) is not None]
        assert len(ended) >= 3
        for text in ended:
            parts = read(dialect, text)
            assert check_calls(parts) >= 1 and (parallel or check_calls(parts) == 1)
            # preambles of harmony are text
            assert dialect.calls == "harmony" or not any(isinstance(part, Said) for part in parts), text


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: f"{dialect.calls}-{dialect.thoughts}")
def test_where_a_tool_is_strict_whatever_is_a_call_fits(dialect: Dialect) -> None:
    grammar = enforced(dialect, offer(False), None, False, IDS)
    assert grammar is not None
    seen = 0
    for seed in range(25):
        text = walk(grammar, seed, 800)
        seen += check_calls(read(dialect, text)) if text is not None else 0
    assert seen


def test_a_strict_call_is_reached_behind_text_too() -> None:
    grammar = enforced(Dialect("hermes"), offer(False), None, False, IDS)
    assert grammar is not None
    said = 'So: <tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert grammars().begin(grammar, list(said.encode())) is not None
    with pytest.raises(BadRequest, match="does not permit"):
        grammars().begin(grammar, list(said.replace("{}", '{"a": 1}').encode()))
    with pytest.raises(BadRequest, match="does not permit"):
        grammars().begin(grammar, list(said.replace("time", "date").encode()))


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: f"{dialect.calls}-{dialect.thoughts}")
@pytest.mark.parametrize("form", [FORM, Grammar("regex", "a/b|c\\/d"), Grammar("choice", '["y\\"","é"]')])
def test_an_answer_has_its_form_or_is_a_call(dialect: Dialect, form: Grammar) -> None:
    for tools in (offer(False), None):
        grammar = enforced(dialect, tools, form, False, IDS)
        assert grammar is not None
        for seed in range(6):
            text = walk(grammar, seed, 600)
            if text is None:
                continue
            if grammar is form:
                parts: list[Part] = [Said(text)]
            else:
                parts = [part for part in read(dialect, text) if not isinstance(part, Thought)]
            if not check_calls(parts):
                assert isinstance(parts[-1], Said) and fits(form, parts[-1].text), text


def fits(form: Grammar, text: str) -> bool:
    if form.kind == "json":
        return bool(json.loads(text[text.rindex("{"):]) == {"a": 1})
    return text.endswith(("a/b", "c/d") if form.kind == "regex" else ('y"', "é"))


def test_thoughts_come_first_and_are_free_whether_or_not_the_prompt_has_opened_them() -> None:
    dialect, call = Dialect("hermes", "think"), '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    for opened, before in ((True, "what? <tool_call> {</think>\n\n"), (False, "<think>what?</think>"), (False, "")):
        grammar = enforced(dialect, offer(True), None, opened, IDS)
        assert grammar is not None
        grammars().begin(grammar, list((before + call).encode()))
        assert check_calls(read(dialect, before + call, opened)) == 1
    with pytest.raises(BadRequest, match="does not permit"):
        grammars().begin(grammar, list(("what? " + call).encode()))


def test_without_anything_to_enforce_there_is_no_grammar_and_a_form_alone_stays_as_it_is() -> None:
    free = Tools((TIME,), frozenset({"time"}))
    assert enforced(Dialect("hermes"), free, None, False, {}) is None
    assert enforced(Dialect("hermes", "think"), None, None, False, {}) is None
    assert enforced(Dialect("hermes"), None, FORM, False, {}) is FORM
    own = Grammar("lark", 'start: "a"')
    assert enforced(Dialect("hermes", "think"), None, own, False, {}) is own


@pytest.mark.parametrize(("parameters", "fit", "unfit"), [
    (None, "{}", '{"a": 1}'), ({}, '{"a": 1}', "[]"), ({"type": "object"}, '{"a": 1}', "5"),
    ({"type": "object", "properties": {}}, "{}", '{"a": 1}'),
    ({"type": "object", "properties": {}, "additionalProperties": True}, '{"a": 1}', "5")])
def test_a_tool_without_a_schema_takes_nothing_and_one_whose_schema_names_nothing_takes_anything(
        parameters: dict[str, Any] | None, fit: str, unfit: str) -> None:
    tools = Tools((Tool("time", None, parameters),), frozenset({"time"}), required=True)
    grammar = enforced(Dialect("hermes"), tools, None, False, {})
    assert grammar is not None
    written = '<tool_call>\n{"name": "time", "arguments": %s}\n</tool_call>'
    grammars().begin(grammar, list((written % fit).encode()))
    with pytest.raises(BadRequest, match="does not permit"):
        grammars().begin(grammar, list((written % unfit).encode()))


@pytest.mark.parametrize(("tools", "answer", "reason"), [
    (offer(True), Grammar("lark", 'start: "a"'), "excludes tools")])
def test_what_does_not_go_together_is_refused(tools: Any, answer: Any, reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        enforced(Dialect("hermes"), tools, answer, False, {})
    with pytest.raises(BadRequest, match="not known to call tools"):
        enforced(Dialect(), offer(False), None, False, {})


def test_every_mark_that_is_a_token_of_its_own_is_named_by_its_id() -> None:
    assert set(SPECIAL) <= {mark for marks in MARKS.values() for mark in marks} | {"[CALL_ID]"}
    grammar = enforced(Dialect("harmony", "harmony"), offer(True), None, False, IDS)
    assert grammar is not None and not any(mark in grammar.text for mark in SPECIAL)
