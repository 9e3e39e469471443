"""Answers keep to their grammar, whatever is drafted, cut, preempted or begun anew; even those of a model that
chooses at random."""

import json
import random
import re
from functools import cache
from typing import Any
from unittest import mock

import jsonschema
import numpy as np
import pytest
from msgspec.structs import replace

import worker.grammar
from deploy.bench.schemas import schema
from kernels.adjust import allowed_ids
from shared.errors import BadRequest, NoEligibleWorker, WorkerFailed
from shared.messages import Adjust, Failed, Finished, Generate, Grammar, Proposal, Sampling
from shared.tokens import pack
from shared.vocabulary import Vocabulary
from tests.worker.builders import Bench, request
from worker.batch import Batch
from worker.grammar import Grammars
from worker.mask_times import MaskTimes
from worker.metrics import Metrics
from worker.mock_decoder import MockDecoder

END, START, PADDING = 300, 301, 302
WORDS = [b'{"', b'":', b'": "', b'",', b"name", b"true", b"null", b"    ", b'"}', "größe".encode(), b", "]
SIZE = 303
SCHEMAS = 300


TOKENS = [bytes([byte]) for byte in range(256)] + WORDS
# with every byte, a few words, two special tokens and one id without a token
VOCABULARY = Vocabulary("v", TOKENS + [b""] * (END - len(TOKENS)) + [b"<|end|>", b"<|start|>", b""], [END],
                        [END, START])


@cache
def grammars() -> Grammars:
    """Of that vocabulary."""
    return Grammars(lambda: VOCABULARY, SIZE)


def spell(tokens: list[int]) -> str:
    words = [bytes([byte]) for byte in range(256)] + WORDS
    return b"".join(words[token] for token in tokens if token < len(words)).decode()


def decoder(blocks: int = 128) -> MockDecoder:
    return MockDecoder(blocks=blocks, block_size_tokens=4, vocabulary_size=SIZE, context_length=2048)


def asked(grammar: Grammar, name: str = "r", seed: int = 1, **more: Any) -> Generate:
    # small pushes towards ends, so that what may go on at random does not go on for long
    ids = {ord('"'): 1.5, ord("}"): 1.5, ord("]"): 1.5, ord(" "): -3.0, ord("\n"): -3.0, ord("\t"): -3.0}
    adjust = Adjust(biased=pack(ids), biases=np.array([*ids.values()], "<f4").tobytes())
    return request(name, **({"prompt": [5, 9, 5], "max_tokens": 400, "stop_token_ids": (END,), "grammar": grammar,
                             "adjust": adjust, "sampling": Sampling(temperature=1.0, seed=seed)} | more))


def add(bench: Bench, generate: Generate) -> None:
    assert generate.grammar is not None
    generated = [int.from_bytes(generate.generated[at:at + 4], "little")
                 for at in range(0, len(generate.generated), 4)]
    bench.scheduler.add(generate, bench.now, generate.deadline, grammars().begin(generate.grammar, generated))


def answer(generate: Generate, blocks: int = 128, **limits: int) -> list[int]:
    bench = Bench(decoder(blocks), **({"step_tokens": 512, "max_draft_tokens": 0, "max_forced_tokens": 0} | limits))
    add(bench, generate)
    bench.finish()
    return bench.streams[generate.request_id, 1]


def drafted(generate: Generate, truth: list[int], chooser: random.Random) -> tuple[list[int], Bench]:
    """With drafts that are right up to a random place, where there is room for any beside what is forced."""
    bench = Bench(decoder(), step_tokens=64)
    add(bench, generate)
    while (length := bench.scheduler.length_of(generate.request_id)) is not None:
        draft = truth[length - 3:][:5]
        if draft and chooser.random() < 0.5:
            draft[chooser.randrange(len(draft))] = chooser.randrange(SIZE)
        if draft:
            bench.scheduler.speculation.drafts.offer(Proposal(generate.request_id, 1, length, pack(draft)))
        bench.scheduler.cost.observe(1, 0, 1.0)
        bench.step()
    return bench.streams[generate.request_id, 1], bench


@pytest.mark.parametrize("part", range(10))
def test_answers_fit_their_schemas_with_and_without_drafts(part: int) -> None:
    accepted = forced = 0
    for number in range(part, SCHEMAS, 10):
        made = schema(number)
        generate = asked(Grammar("json", json.dumps(made)), seed=number)
        tokens = answer(generate)
        if len(tokens) < 400:
            jsonschema.validate(json.loads(spell(tokens)), made)
        again, bench = drafted(generate, tokens, random.Random(number))
        assert again == tokens, made
        accepted += bench.scheduler.speculation.accepted_draft_tokens
        forced += bench.scheduler.speculation.forced_tokens
        assert len(tokens) < 400, (number, spell(tokens)[-80:])
    assert accepted > 20 and forced > 20


def test_chunks_company_preemption_and_a_second_attempt_change_no_token() -> None:
    wanted = [asked(Grammar("json", json.dumps(schema(number))), f"r{number}", number) for number in range(8)]
    truth = {one.request_id: answer(one) for one in wanted}
    longest = max(map(len, truth.values())) + 3
    bench = Bench(decoder(longest // 4 + 4), step_tokens=12, max_running=8)
    for one in wanted:
        add(bench, one)
    bench.finish()
    assert bench.scheduler.preemptions > 0
    for one in wanted:
        assert bench.streams[one.request_id, 1] == truth[one.request_id]
    for one in wanted:
        done = truth[one.request_id]
        half = len(done) // 2
        if half:
            assert done[:half] + answer(replace(one, generated=pack(done[:half]))) == done


def end_of(generate: Generate) -> tuple[str, Any]:
    bench = Bench(decoder(), step_tokens=512, max_draft_tokens=0, max_forced_tokens=0)
    add(bench, generate)
    bench.finish()
    (end,) = bench.ends[generate.request_id, 1]
    return spell(bench.streams.get((generate.request_id, 1), [])), end


def test_a_regular_expression_a_choice_and_a_lark_or_ebnf_grammar_are_kept_to() -> None:
    for seed in range(8):
        text, end = end_of(asked(Grammar("regex", "[a-c]{2,4}(x|yz)"), seed=seed))
        assert re.fullmatch("[a-c]{2,4}(x|yz)", text) and isinstance(end, Finished) and end.reason == "stop"
        text, _ = end_of(asked(Grammar("choice", '["red", "gr\\"een", "größe"]'), seed=seed))
        assert text in ("red", 'gr"een', "größe")
        text, _ = end_of(asked(Grammar("lark", 'start: "a" word\nword: /[0-9]{1,3}/'), seed=seed))
        assert re.fullmatch("a[0-9]{1,3}", text)
        text, _ = end_of(asked(Grammar("lark", 'root ::= "yes" | "no" tail\ntail ::= "!"'), seed=seed))
        assert text in ("yes", "no!")


def test_the_time_that_masks_take_is_told_of_each_stream_and_of_each_step() -> None:
    metrics = Metrics(dict)
    bench = Bench(decoder(), max_draft_tokens=0, max_forced_tokens=0)
    bench.batch = Batch(8, 512, SIZE, MaskTimes(metrics.mask_s.observe, metrics.step_masks_s.observe).fill)
    for name, text in (("a", "abcdef"), ("b", "xyz")):
        add(bench, asked(Grammar("regex", text), name))
    bench.add(request("plain", max_tokens=20))
    bench.finish()

    def read(name: str) -> float:
        value = metrics.registry.get_sample_value(f"mill_worker_{name}")
        assert value is not None
        return value

    steps = max(len(bench.streams["a", 1]), len(bench.streams["b", 1]))
    assert read("step_mask_seconds_count") == steps < 20
    assert read("mask_seconds_count") == len(bench.streams["a", 1]) + len(bench.streams["b", 1])
    assert 0.0 < read("mask_seconds_sum") == pytest.approx(read("step_mask_seconds_sum"))


def test_tokens_that_a_grammar_demands_are_computed_together_also_where_nobody_drafts() -> None:
    one = asked(Grammar("json", json.dumps({"const": "abcdefghijklmnop"})))
    steps = {}
    for most in (0, 8):
        bench = Bench(decoder(), step_tokens=512, max_draft_tokens=0, max_forced_tokens=most)
        add(bench, one)
        steps[most] = sum(1 for _ in bench.steps())
        assert json.loads(spell(bench.streams["r", 1])) == "abcdefghijklmnop"
        (end,) = bench.ends["r", 1]
        assert isinstance(end, Finished) and end.draft_tokens == 0
        assert bench.scheduler.speculation.forced_tokens == (0 if most == 0 else 18 - steps[8])
    assert steps[0] == 18 and steps[8] < 5


def test_an_answer_ends_when_its_grammar_does_without_a_token_more() -> None:
    text, end = end_of(asked(Grammar("choice", '["abc"]'), stop_token_ids=()))
    assert text == "abc" and end.reason == "stop" and end.completion_tokens == 3


def test_an_end_that_is_to_be_ignored_or_comes_too_early_is_chosen_only_where_nothing_else_is_left() -> None:
    grammar = Grammar("regex", "a{2,9}")
    longest = "a" * 9
    assert end_of(asked(grammar, stop_token_ids=()))[0] == longest
    assert end_of(asked(grammar, adjust=Adjust(min_tokens=400)))[0] == longest
    assert {end_of(asked(grammar, seed=seed))[0] for seed in range(12)} != {longest}


def test_a_draft_is_cut_where_the_grammar_forbids_it_or_ends() -> None:
    state = grammars().begin(Grammar("regex", "ab+c"), [])
    assert state.admitted([97, 98, 98, 99]) == 4
    assert state.admitted([97, 120]) == 1
    assert state.admitted([98]) == 0
    assert state.advance(97)
    assert state.admitted([98, END]) == 1  # an end cannot come here
    loose = grammars().begin(Grammar("regex", "ab*"), [97])
    assert loose.admitted([98, END, 98]) == 1  # it can, but what is behind it counts for nothing


def test_masks_of_drafts_leave_the_state_where_it_was() -> None:
    state = grammars().begin(Grammar("regex", "ab(c|d)e"), [97])
    masks = np.zeros((4, -(-SIZE // 32)), np.uint32)
    for _ in range(2):
        state.fill(masks, [98, 100, 101])
        allowed = [np.flatnonzero(allowed_ids(mask, SIZE)).tolist() for mask in masks]
        assert allowed == [[98], [99, 100], [101], [END]]
    assert state.forced(8)[:1] == [98] and not state.finished


def test_ids_without_a_token_and_special_ones_are_never_permitted() -> None:
    state = grammars().begin(Grammar("regex", "(.|\n)*"), [])
    masks = np.zeros((1, -(-SIZE // 32)), np.uint32)
    state.fill(masks, [])
    allowed = allowed_ids(masks[0], SIZE)
    assert allowed[97] and allowed[END] and not allowed[START] and not allowed[PADDING] and not allowed[290]


@pytest.mark.parametrize(("grammar", "says"), [
    (Grammar("json", '{"type": "nonsense"}'), "json"), (Grammar("json", "{"), "json"),
    (Grammar("regex", "(ab"), "regex"),
    (Grammar("lark", "start: missing"), "missing"), (Grammar("choice", "[]"), "choice")])
def test_a_grammar_that_cannot_be_used_is_refused(grammar: Grammar, says: str) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        grammars().begin(grammar, [])
    assert len(caught.value.message) < 500


def test_a_grammar_is_compiled_once_for_each_tenant_and_is_the_same_for_all() -> None:
    compiled, shared = [], grammars()
    source = worker.grammar._source
    with mock.patch("worker.grammar._source", lambda grammar: compiled.append(grammar) or source(grammar)):
        states = [shared.begin(Grammar("regex", "ab+c"), [97], owner) for owner in (b"one", b"one", b"two", b"one")]
    assert len(compiled) == 2
    assert {state.admitted([98, 98, 99]) for state in states} == {3}


def test_an_answer_that_the_grammar_does_not_permit_is_no_beginning() -> None:
    with pytest.raises(BadRequest, match="does not permit"):
        grammars().begin(Grammar("regex", "ab"), [98])


def test_without_a_vocabulary_or_a_state_a_request_is_refused_and_says_why() -> None:
    with pytest.raises(NoEligibleWorker, match="tokenmill pull") as missing:
        Grammars(lambda: None, SIZE).begin(Grammar("regex", "a"), [])
    bench = Bench(decoder())
    bench.add(asked(Grammar("regex", "a")))
    bench.finish()
    (end,) = bench.ends["r", 1]
    assert isinstance(end, Failed) and end.code == "invalid_request" and "no grammar" in end.message
    generate = asked(Grammar("regex", "a"), "elsewhere")
    bench.scheduler.add(generate, bench.now, generate.deadline, missing.value)
    bench.finish()
    (end,) = bench.ends["elsewhere", 1]
    assert isinstance(end, Failed) and end.code == "no_eligible_worker" and end.retryable


def test_what_grammar_and_allowed_ids_leave_nothing_of_ends_alone() -> None:
    bench = Bench(decoder(), step_tokens=512)
    add(bench, asked(Grammar("regex", "a+b"), "bad", adjust=Adjust(allowed=pack([97 + 7]))))
    add(bench, asked(Grammar("regex", "a{3}b"), "good"))
    bench.finish()
    (bad,) = bench.ends["bad", 1]
    assert isinstance(bad, Failed) and "exclude each other" in bad.message
    assert spell(bench.streams["good", 1]) == "aaab" and ("bad", 1) not in bench.streams


def test_a_grammar_that_breaks_ends_its_stream_with_an_error_and_no_other() -> None:
    """The library permits nothing but an end when it gives up: that must not pass for the end of an answer."""
    state = grammars().begin(Grammar("regex", "a{9}"), [])
    assert not state.advance(98) and "too complex" in state.broken
    bench = Bench(decoder(), step_tokens=512, max_draft_tokens=0, max_forced_tokens=0)
    bad, good = asked(Grammar("regex", "a{9}"), "bad"), asked(Grammar("regex", "a{9}"), "good")
    add(bench, bad)
    add(bench, good)
    for _ in range(3):
        bench.step()
    (broken,) = (one for one in bench.scheduler.running if one.request is bad)
    assert broken.adjuster is not None and broken.adjuster.grammar is not None
    broken.adjuster.grammar._matcher.consume_token(98)  # what it does not permit puts it into that state
    bench.finish()
    (end,) = bench.ends["bad", 1]
    assert isinstance(end, Failed) and "too complex" in end.message and not end.retryable
    assert spell(bench.streams["good", 1]) == "a" * 9 and spell(bench.streams["bad", 1]) == "aaa"


BOMB = Grammar("lark", "start: " + " | ".join(f"/[a-z]*{letter}[a-z]{{{length}}}/" for length, letter in
                                             enumerate("abcdefghijklmnopqrstuvwxyz", 12)))


def test_a_stream_that_breaks_its_grammar_spoils_it_for_no_later_one() -> None:
    """Copies share their lexer: once that was full, every later stream of the tenant was refused for good."""
    shared = Grammars(lambda: VOCABULARY, SIZE)
    masks, chooser = np.zeros((1, -(-SIZE // 32)), np.uint32), random.Random(1)
    with mock.patch("worker.grammar.LEXER_STATES", 200):
        first = shared.begin(BOMB, [])
    said: list[int] = []
    while not first.broken:
        first.fill(masks, [])
        assert len(said) < 400
        if not first.broken:
            said.append(chooser.choice([id for id in np.flatnonzero(allowed_ids(masks[0], SIZE)) if id < 256]).item())
            first.advance(said[-1])
    again = shared.begin(BOMB, said[:3])
    again.fill(masks, [])
    assert not again.broken and allowed_ids(masks[0], SIZE)[97]
    assert shared.compilations == 2


def test_an_answer_that_breaks_its_grammar_when_read_again_may_be_tried_elsewhere() -> None:
    shared = Grammars(lambda: VOCABULARY, SIZE)
    many = Grammar("json", json.dumps({"type": "object", "properties": {f"p{number}": {} for number in range(40)}}))
    with mock.patch("worker.grammar.ROW_ITEMS", 50), pytest.raises(WorkerFailed, match="too complex") as caught:
        shared.begin(many, [*b"{"])
    assert caught.value.retryable and shared.compilations == 2
    with pytest.raises(BadRequest, match="does not permit"):
        shared.begin(many, [49])


def test_text_that_the_vocabulary_cannot_spell_is_refused_or_breaks_off_without_an_exception() -> None:
    """A byte without a token raised KeyError inside the library."""
    tokens = [b"" if byte == 4 else bytes([byte]) for byte in range(256)] + [b"<|end|>"]
    poor = Grammars(lambda: Vocabulary("v", tokens, [256], [256]), 257)
    with pytest.raises(BadRequest, match="spell"):
        poor.begin(Grammar("choice", '["ok", "x\\u0004y"]'), [])
    state = poor.begin(Grammar("lark", 'start: "x" /\\x04y/'), [])
    assert state.forced(8) in ([], [120])
    assert poor.begin(Grammar("choice", '["ok"]'), []).forced(8)


@pytest.mark.parametrize("schema", [
    {"const": "größe"}, {"enum": [1, "a", ["größe"]]}, {"const": {"größe": 1}},
    {"type": "object", "properties": {"größe": {}}}, {"items": {"properties": {"a": {"enum": ["ö"]}}}}])
def test_a_schema_with_a_text_that_the_vocabulary_cannot_spell_is_refused_at_once(schema: dict[str, Any]) -> None:
    """The answer began, and its stream ended at the byte that there was no token for."""
    tokens = [b"" if byte == 0xC3 else bytes([byte]) for byte in range(256)] + [b"<|end|>"]
    poor = Grammars(lambda: Vocabulary("v", tokens, [256], [256]), 257)
    with pytest.raises(BadRequest, match="no tokens of this model spell"):
        poor.begin(Grammar("json", json.dumps(schema)), [])
    assert Grammars(lambda: VOCABULARY, SIZE).begin(Grammar("json", json.dumps(schema)), [])


def test_what_a_schema_only_tells_its_readers_need_not_be_spelt() -> None:
    tokens = [b"" if byte in (4, 0xC3) else bytes([byte]) for byte in range(256)] + [b"<|end|>"]
    poor = Grammars(lambda: Vocabulary("v", tokens, [256], [256]), 257)
    schema = {"properties": {"const": {"description": "größe", "type": "string"}, "enum": {"title": "größe"}}}
    assert poor.begin(Grammar("json", json.dumps(schema)), [])
    # what JSON escapes needs no byte of its own
    state = poor.begin(Grammar("json", json.dumps({"const": "x\x04y"})), [])
    said: list[int] = []
    while not state.finished and (forced := state.forced(64)):
        assert all(state.advance(token) for token in forced)
        said += forced
    assert json.loads(bytes(said)) == "x\x04y"


@pytest.mark.parametrize("schema", [
    {"type": "integer", "multipleOf": 9999991}, {"type": "number", "multipleOf": 0.9999991},
    {"properties": {"a": {"allOf": [{"multipleOf": 10**300}]}}},
    {"properties": {f"p{number}": {} for number in range(6000)}}, {"enum": [*range(6000)]}])
def test_what_would_be_compiled_for_long_is_refused_before_and_is_remembered(schema: dict[str, Any]) -> None:
    grammar, shared = Grammar("json", json.dumps(schema)), Grammars(lambda: VOCABULARY, SIZE)
    for _ in range(2):
        with pytest.raises(BadRequest, match="at most"):
            shared.begin(grammar, [])
    assert shared.compilations == 1


@pytest.mark.parametrize("number", [0.01, 5, 1000, 2.5, 86400 / 10])
def test_ordinary_multiples_are_compiled(number: float) -> None:
    Grammars(lambda: VOCABULARY, SIZE).begin(Grammar("json", json.dumps({"type": "number", "multipleOf": number})), [])


def test_one_tenant_has_few_grammars_remembered_and_pushes_out_its_own_alone() -> None:
    shared = Grammars(lambda: VOCABULARY, SIZE)
    shared.begin(Grammar("regex", "z"), [], b"other")
    for number in range(worker.grammar.REMEMBERED_OF_ONE + 1):
        shared.begin(Grammar("regex", f"a{{{number + 1}}}"), [], b"one")
    before = shared.compilations
    shared.begin(Grammar("regex", "z"), [], b"other")
    assert shared.compilations == before
    shared.begin(Grammar("regex", "a{1}"), [], b"one")
    assert shared.compilations == before + 1
