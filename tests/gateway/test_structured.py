"""Structured outputs from the official client to a real worker and back: the answer fits, or says why it cannot."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

import worker.service
from gateway.app import build_app
from gateway.model_files import load_card, prepare
from shared.messages import Grammar
from shared.vocabulary import FILE, Vocabulary, load_vocabulary
from tests.gateway.fake_mesh import END, START, byte_tokenizer, gateway_and_mesh, tiny_model
from tests.gateway.test_api import CHAT, chat
from tests.gateway.test_tools import TIME
from tests.gateway.world import world

# the mock chooses at random: small pushes towards ends, so that answers stay short
ENDS = {str(ord(character)): push for character, push in {'"': 1.5, "}": 1.5, " ": -3, "\n": -3, "\t": -3}.items()}


class City(pydantic.BaseModel):
    name: Literal["Oslo", "Rome"]
    people: int = pydantic.Field(ge=0, le=999)
    coast: bool | None


@contextlib.asynccontextmanager
async def clients(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[openai.AsyncOpenAI, httpx.AsyncClient]]:
    """The official client and a plain one before real workers that know the vocabulary of bytes."""
    known = byte_tokenizer()
    words = Vocabulary("v", [known.token_bytes(id) for id in range(258)], [END], [START, END])
    monkeypatch.setattr(worker.service, "vocabulary_file", lambda settings: words)
    async with world() as made:
        transport = httpx.ASGITransport(build_app(made.gateway))
        async with httpx.AsyncClient(transport=transport) as http, openai.AsyncOpenAI(
                base_url="http://gateway/v1", api_key="none", http_client=http, max_retries=0) as client:
            yield client, made.client


async def test_the_official_client_parses_an_answer_of_a_model_class(monkeypatch: pytest.MonkeyPatch) -> None:
    async with clients(monkeypatch) as (client, _):
        for seed in range(5):
            answer = await client.chat.completions.parse(
                model="tiny", messages=[{"role": "user", "content": "Where?"}], response_format=City, seed=seed,
                max_tokens=200, logit_bias=ENDS)
            city = answer.choices[0].message.parsed
            assert isinstance(city, City) and answer.choices[0].finish_reason == "stop"


async def test_every_form_of_asking_is_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    async with clients(monkeypatch) as (client, _):
        async def ask(**more: Any) -> str:
            extra = more.pop("extra", {})
            answer = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "?"}], max_tokens=120, seed=4,
                logit_bias=ENDS, extra_body=extra, **more)
            return answer.choices[0].message.content or ""

        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                  "additionalProperties": False}
        assert isinstance(json.loads(await ask(response_format={"type": "json_object"})), dict)
        for extra in ({"structured_outputs": {"json": schema}}, {"guided_json": json.dumps(schema)}):
            assert json.loads(await ask(extra=extra)) in ({"a": 1}, {"a": 2})
        assert json.loads(await ask(extra={"structured_outputs": {"json_object": True}})) is not None
        for extra in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]},
                      {"structured_outputs": {"regex": "yes|no"}}, {"guided_regex": "yes|no"},
                      {"structured_outputs": {"grammar": 'start: "yes" | "no"'}},
                      {"guided_grammar": 'root ::= "yes" | "no"'}):
            assert await ask(extra=extra) in ("yes", "no")


async def test_a_grammar_that_cannot_be_used_is_the_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async with clients(monkeypatch) as (client, plain):
        with pytest.raises(openai.BadRequestError, match="json grammar"):
            await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "?"}],
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "what"}}})
        streamed = await plain.post("/v1/completions", json={"prompt": "a", "guided_regex": "(", "stream": True})
        assert streamed.status_code == 400 and "regex" in streamed.json()["error"]["message"]


async def test_a_grammar_goes_with_penalties_several_choices_and_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    async with clients(monkeypatch) as (client, _):
        answer = await client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "?"}], n=3, seed=2, logprobs=True, max_tokens=40,
            presence_penalty=0.5, extra_body={"guided_regex": "[ab]{6}"})
        texts = [choice.message.content or "" for choice in answer.choices]
        assert all(set(text) <= {"a", "b"} and len(text) == 6 for text in texts) and len(set(texts)) > 1
        for choice in answer.choices:
            assert choice.logprobs and len(choice.logprobs.content or []) == 6


async def test_what_is_asked_travels_as_one_grammar() -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        for more, grammar in (
            ({"response_format": {"type": "json_object"}}, Grammar("json", '{"type":"object"}')),
            ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "null"}}}},
             Grammar("json", '{"type":"null"}')),
            ({"guided_choice": ["a", "é"]}, Grammar("choice", '["a","é"]')),
            ({"response_format": {"type": "text"}, "structured_outputs": {}}, None)):
            assert (await client.post(CHAT, json=chat(**more))).status_code == 200
            assert mesh.requests[-1].grammar == grammar


@pytest.mark.parametrize("schema", ["", "{", "abc", '"abc"', "5", "null", "[]", '{"a":' * 2000])
@pytest.mark.parametrize(("more", "param"), [
    (lambda schema: {"guided_json": schema}, "guided_json"),
    (lambda schema: {"structured_outputs": {"json": schema}}, "structured_outputs.json")])
async def test_text_that_is_no_schema_is_refused_by_the_name_of_its_parameter(schema: str, more: Any,
                                                                              param: str) -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        for tools in ([], [TIME]):
            response = await client.post(CHAT, json=chat(tools=tools, **more(schema)))
            assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
        assert not mesh.requests


async def test_a_schema_beside_tools_is_what_it_is_alone() -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        for schema, form in (("true", '%json {"x-guidance":{'), ("false", "%json false"),
                             ('{"type":"null"}', '"null"')):
            assert (await client.post(CHAT, json=chat(guided_json=schema))).status_code == 200
            assert mesh.requests[-1].grammar == Grammar("json", schema)
            strict = TIME | {"function": TIME["function"] | {"strict": True}}
            assert (await client.post(CHAT, json=chat(guided_json=schema, tools=[strict]))).status_code == 200
            grammar = mesh.requests[-1].grammar
            assert grammar is not None and any(
                line.startswith("form: ") and form in line for line in grammar.text.splitlines())


def test_a_prepared_model_has_its_vocabulary_as_bytes(tmp_path: Any) -> None:
    from tests.models import default_folder

    folder = default_folder()
    vocabulary, card = load_vocabulary(folder / FILE), load_card(folder)
    assert vocabulary is not None
    assert vocabulary.digest == card.vocabulary and len(vocabulary.tokens) >= card.vocabulary_size
    assert vocabulary.end_ids == list(card.stop_token_ids) and set(card.special_tokens.values()) <= set(
        vocabulary.special_ids)
    assert b" the" in vocabulary.tokens
    assert load_vocabulary(tmp_path / FILE) is None
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match="tokenmill pull"):
        load_vocabulary(tmp_path / FILE)


def test_a_model_prepared_before_is_given_one(tmp_path: Any) -> None:
    from tests.models import default_model

    (tmp_path / "model.gguf").symlink_to(default_model())
    card = prepare(tmp_path, tmp_path)
    (tmp_path / FILE).unlink()
    assert prepare(tmp_path, tmp_path) == card and (tmp_path / FILE).is_file()
