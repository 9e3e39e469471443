"""`/v1/embeddings` through the official client, before a real router and real workers with the mock engine."""

import base64
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import worker.service
from gateway.app import build_app
from gateway.openai.embeddings import MAX_INPUTS
from gateway.openai.parameters import EMBEDDED_AT_ONCE
from shared.messages import Accepted, Finished, Generate, Reply
from shared.tokens import unpack
from tests.gateway.billed import MICRO, Billed, billed_gateway
from tests.gateway.fake_mesh import FakeMesh, gateway_and_mesh, refusal, tiny_model
from tests.gateway.world import World, world
from tests.worker.test_embedding import normalised, rows_of
from worker.mock_decoder import MockDecoder

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["The mill turns while the water runs.", "x", "Twice two hundred letters. " * 8]


@contextlib.asynccontextmanager
async def client_and_world(**settings: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, World]]:
    async with world(blocks=256, **settings) as made, httpx.AsyncClient(
            transport=httpx.ASGITransport(build_app(made.gateway))) as http, openai.AsyncOpenAI(
                base_url="http://gateway/v1", api_key="none", http_client=http, max_retries=0) as client:
        yield client, made


def expected(text: str | list[int], pooling: str = "mean") -> list[float]:
    tokens = [*text.encode()] if isinstance(text, str) else text
    rows = rows_of(tokens, MockDecoder(blocks=64, vocabulary_size=258)).astype(np.float64)
    total = np.zeros(rows.shape[1])
    for row in rows:
        total += row
    vector: list[float] = np.frombuffer(normalised(total if pooling == "mean" else rows[-1]), "<f4").tolist()
    return vector


async def test_each_text_has_its_vector_in_the_order_of_the_texts() -> None:
    async with client_and_world() as (client, _):
        # the client asks for base64 and decodes it, unless told otherwise
        for more in ({}, {"encoding_format": "float"}):
            answer = await client.embeddings.create(model="tiny", input=TEXTS, **more)
            assert [item.embedding for item in answer.data] == [expected(text) for text in TEXTS]
            assert [(item.index, item.object) for item in answer.data] == [(0, "embedding"), (1, "embedding"),
                                                                          (2, "embedding")]
            assert (answer.object, answer.model) == ("list", "tiny")
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, TEXTS))
        vector = np.array(answer.data[0].embedding)
        assert abs(float((vector * vector).sum()) - 1) < 1e-6


async def test_one_text_and_token_ids_and_the_last_row_are_taken_too() -> None:
    async with client_and_world() as (client, _):
        for given, texts in (("abc", ["abc"]), ([97, 98, 99], ["abc"]), ([[97, 98], [99]], ["ab", "c"])):
            answer = await client.embeddings.create(model="tiny", input=given)
            assert [item.embedding for item in answer.data] == [expected(text) for text in texts]
        answer = await client.embeddings.create(model="tiny", input="abc", extra_body={"pooling": "last"})
        assert answer.data[0].embedding == expected("abc", "last") != expected("abc")


async def test_many_texts_go_a_few_at_a_time_and_all_come_back() -> None:
    async with client_and_world() as (client, made):
        texts = [f"text number {number}" for number in range(3 * EMBEDDED_AT_ONCE)]
        most = 0
        opened = made.gateway.streams.open

        def counted(*arguments: Any) -> Any:
            nonlocal most
            stream = opened(*arguments)
            (answer,) = made.gateway.answers
            most = max(most, 1 + sum(other.ended is None for other in answer._streams))
            assert made.gateway.admission.active == EMBEDDED_AT_ONCE
            return stream

        made.gateway.streams.open = counted  # type: ignore[method-assign]
        answer = await client.embeddings.create(model="tiny", input=texts)
        assert [item.embedding for item in answer.data] == [expected(text) for text in texts]
        assert most <= EMBEDDED_AT_ONCE and made.gateway.admission.active == 0


async def test_what_an_embedding_computed_a_stream_finds_and_its_receipt_is_kept() -> None:
    async with client_and_world(zones=("eu",)) as (client, made):
        prompt = "Words that are long enough for blocks. " * 4
        raw = await client.embeddings.with_raw_response.create(model="tiny", input=prompt)
        told = await made.receipt(raw.headers["x-request-id"])
        assert told["choices"][0]["miss"] == "none" and told["response_id"].startswith("embd-")
        response = await made.ask(prompt)
        assert response.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 144


@pytest.mark.parametrize(("more", "param"), [
    ({"input": None}, "input"), ({"input": []}, "input"), ({"input": ""}, "input"), ({"input": ["a", ""]}, "input"),
    ({"input": ["a", 5]}, "input"), ({"input": [[]]}, "input"), ({"input": [258]}, "input"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"), ({"dimensions": 16}, "dimensions"),
    ({"encoding_format": "int8"}, "encoding_format"), ({"pooling": "max"}, "pooling"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"), ({"service_tier": "much"}, "service_tier")])
async def test_what_is_wrong_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        response = await client.post(EMBEDDINGS, json={"model": "tiny", "input": "a"} | more)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
        assert not mesh.requests


async def test_a_text_may_fill_the_context_and_one_that_is_longer_is_refused_by_its_length() -> None:
    async with client_and_world(offers=(tiny_model(context_length=200),)) as (client, _):
        (item,) = (await client.embeddings.create(model="tiny", input="a" * 200)).data
        assert item.embedding == expected("a" * 200)
        with pytest.raises(openai.BadRequestError, match="one text of input has 201: shorten it") as refused:
            await client.embeddings.create(model="tiny", input=["b", "a" * 201])
        assert refused.value.code == "context_length_exceeded"


def embedded(request: Generate, vector: bytes) -> list[Reply]:
    return [Accepted(request.request_id, request.attempt, "w1"),
            Finished(request.request_id, request.attempt, "stop", "w1", len(request.tokens) // 4, embedding=vector)]


async def test_a_request_asks_for_no_token_and_an_attempt_that_was_lost_is_repeated() -> None:
    async with gateway_and_mesh() as (client, mesh, gateway):
        vector = np.array([0.6, 0.8], "<f4").tobytes()
        mesh.script = lambda request: [] if request.attempt == 1 else embedded(request, vector)
        body = (await client.post(EMBEDDINGS, json={"input": "a" * 40, "encoding_format": "base64"})).json()
        assert body["data"] == [{"object": "embedding", "index": 0, "embedding": base64.b64encode(vector).decode()}]
        assert body["usage"] == {"prompt_tokens": 40, "total_tokens": 40}
        assert [request.attempt for request in mesh.requests] == [1, 2]
        assert {(request.pooling, request.block_hashes) for request in mesh.requests} == {("mean", b"")}
        assert unpack(mesh.requests[0].tokens) == [97] * 40
        text = gateway.metrics.exposition()[0].decode()
        assert 'gen_ai_server_request_duration_seconds_count{error_type="",gen_ai_operation_name="embeddings"' in text
        assert "mill_gateway_prompt_tokens_total 40.0" in text and "mill_gateway_completion_tokens_total 0.0" in text


async def test_a_vector_is_charged_by_its_prompt_and_one_that_fails_by_nothing(tmp_path: Path) -> None:
    billed = Billed(tmp_path)
    acme = billed.project("acme", concurrency=EMBEDDED_AT_ONCE)
    many = {"input": ["a" * 40, *["b"] * (EMBEDDED_AT_ONCE + 10)]}
    async with billed_gateway(billed) as (client, mesh, _):
        mesh.script = lambda request: embedded(request, bytes(8))
        told = await client.post(EMBEDDINGS, json=many, headers=acme | {"x-tokenmill-cost": "1"})
        silent = await client.post(EMBEDDINGS, json=many, headers=acme)
        mesh.script = lambda request: refusal(request, "overloaded")
        failed = await client.post(EMBEDDINGS, json=many, headers=acme)
    tokens = 40 + EMBEDDED_AT_ONCE + 10  # a micro-dollar each
    assert told.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens, "cost": tokens / 1_000_000}
    assert "cost" not in silent.json()["usage"] and failed.status_code == 503
    records = billed.records()
    assert [record.amount for record in records] == [tokens * MICRO, tokens * MICRO, 0]
    assert [(record.prompt_tokens, record.generated_tokens) for record in records] == [(tokens, 0), (tokens, 0), (0, 0)]
    assert billed.check().problems == []


@pytest.mark.parametrize(("script", "status", "code"), [
    (lambda request: embedded(request, b""), 500, "worker_failed"),
    (lambda request: refusal(request, "overloaded"), 503, "overloaded")])
async def test_one_vector_that_does_not_come_fails_the_request(script: Any, status: int, code: str) -> None:
    async with gateway_and_mesh(max_attempts=1) as (client, mesh, gateway):
        vector = bytes(8)
        mesh.script = lambda request: embedded(request, vector) if request.tokens[0] == 97 else script(request)
        response = await client.post(EMBEDDINGS, json={"input": ["a", "b", "a"]})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert gateway.admission.active == 0


async def test_workers_that_cannot_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.service, "Embedding", FakeMesh)
    async with client_and_world() as (client, made):
        with pytest.raises(openai.InternalServerError, match="embeddings") as refused:
            await client.embeddings.create(model="tiny", input="a")
        assert refused.value.code == "no_eligible_worker"
        await made.ask()
