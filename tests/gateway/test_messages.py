"""`/v1/messages` through the official client: text, tools, thoughts, stop reasons, counts, events in order, errors."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

import worker.service
from gateway.anthropic.messages import decode
from gateway.app import build_app
from shared.errors import BadRequest
from shared.messages import Accepted, Generate, Reply, Tokens
from shared.tokens import pack, unpack
from shared.vocabulary import Vocabulary
from tests.gateway.fake_mesh import END, START, FakeMesh, byte_tokenizer, gateway_and_mesh, refusal, tiny_model
from tests.gateway.test_tools import TWO
from tests.gateway.world import world

anthropic, httpx2 = pytest.importorskip("anthropic"), pytest.importorskip("httpx2")

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {"name": "weather", "description": "How it is.", "input_schema": {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}}
TIME: Any = {"name": "time", "input_schema": {"type": "object", "properties": {}}}


@contextlib.asynccontextmanager
async def client_of(app: Any) -> AsyncIterator[Any]:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as http, anthropic.AsyncAnthropic(
            base_url="http://gateway", api_key="none", http_client=http, max_retries=0) as client:
        yield client


@contextlib.asynccontextmanager
async def client_and_mesh(says: bytes = b"Hello, world!", **model: Any) -> AsyncIterator[tuple[Any, FakeMesh]]:
    async with gateway_and_mesh(tiny_model(context_length=4000, **model)) as (_, mesh, gateway):
        mesh.says, mesh.batch = says, 3
        async with client_of(build_app(gateway)) as client:
            yield client, mesh


async def test_a_message_has_its_text_stop_reason_and_counts() -> None:
    async with client_and_mesh() as (client, mesh):
        message = await client.messages.create(model="tiny", max_tokens=50, messages=HELLO, system=[
            {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            extra_body={"temperature": 0.5, "top_k": 7})
        assert [block.type for block in message.content] == ["text"] and message.content[0].text == "Hello, world!"
        assert (message.stop_reason, message.stop_sequence, message.role) == ("end_turn", None, "assistant")
        request = mesh.requests[0]
        assert bytes(token for token in unpack(request.tokens) if token < 256) == b"system:Be brief.user:Hiassistant:"
        assert (request.sampling.temperature, request.sampling.top_k, request.max_tokens) == (0.5, 7, 50)
        usage = message.usage
        assert (usage.input_tokens + usage.cache_read_input_tokens, usage.cache_read_input_tokens) == (
            len(unpack(request.tokens)), 16)
        assert usage.output_tokens == 14
        counted = await client.messages.count_tokens(model="tiny", messages=HELLO, system="Be brief.")
        assert counted.input_tokens == len(unpack(request.tokens))
        told = await client.get(f"/v1/requests/{message.id}/receipt", cast_to=httpx2.Response)
        assert told.json()["response_id"] == message.id


@pytest.mark.parametrize(("more", "reason", "stopped"), [
    ({"max_tokens": 5}, "max_tokens", None), ({"stop_sequences": ["wor", "x"]}, "stop_sequence", "wor"),
    ({"stop_sequences": ["x"]}, "end_turn", None)])
async def test_why_it_stopped_is_said_in_both_ways(more: dict[str, Any], reason: str, stopped: str | None) -> None:
    async with client_and_mesh() as (client, _):
        asked = {"model": "tiny", "max_tokens": 50, "messages": HELLO} | more
        message = await client.messages.create(**asked)
        assert (message.stop_reason, message.stop_sequence) == (reason, stopped)
        async with client.messages.stream(**asked) as stream:
            final = await stream.get_final_message()
        assert (final.stop_reason, final.stop_sequence) == (reason, stopped)
        assert final.content[0].text == message.content[0].text
        assert final.usage.output_tokens == message.usage.output_tokens


async def test_a_stream_opens_and_closes_each_block_in_order() -> None:
    async with client_and_mesh(b"<think>hm</think>" + TWO, chat_template="{{ messages[0].content }}{# </think> #}") as (
            client, _):
        events = [event async for event in await client.messages.create(
            model="tiny", max_tokens=500, messages=HELLO, tools=[WEATHER, TIME], stream=True)]
        whole = await client.messages.create(model="tiny", max_tokens=500, messages=HELLO, tools=[WEATHER, TIME])
        async with client.messages.stream(
                model="tiny", max_tokens=500, messages=HELLO, tools=[WEATHER, TIME]) as stream:
            final = await stream.get_final_message()
    kinds = [event.type for event in events]
    assert [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before] == [
        "message_start", *(["content_block_start", "content_block_delta", "content_block_stop"] * 4), "message_delta",
        "message_stop"]
    assert [event.index for event in events if event.type == "content_block_start"] == [0, 1, 2, 3]
    assert events[0].message.content == [] and events[0].message.usage.input_tokens > 0
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert (final.content[0].thinking, final.content[1].text) == ("hm", "Let me look.")
    assert (final.content[2].name, final.content[2].input) == ("weather", {"city": "Oslo", "unit": "C"})
    assert final.content[2].id.startswith("toolu_") and final.content[2].id != final.content[3].id
    assert final.stop_reason == whole.stop_reason == "tool_use"
    told = [[(block.type, getattr(block, "input", None)) for block in message.content] for message in (final, whole)]
    assert told[0] == told[1]


async def test_what_tools_gave_back_reaches_the_template_as_such() -> None:
    template = ("{% for m in messages %}<{{ m.role }}|{{ m.content }}|{{ m.reasoning_content or '' }}|"
                "{{ m.tool_calls | tojson if m.tool_calls else '' }}>{% endfor %}{{ tools and '<tool_call>' }}")
    async with client_and_mesh(chat_template=template) as (client, mesh):
        await client.messages.create(model="tiny", max_tokens=9, tools=[WEATHER], messages=[
            *HELLO,
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "Let me look."},
                {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Oslo"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "text", "text": "So?"}]}])
        prompt = bytes(unpack(mesh.requests[0].tokens)).decode()
        assert prompt.startswith("<user|Hi||><assistant|Let me look.|hm|[{") and '{"city": "Oslo"}' in prompt
        assert "<tool|rain||><user|So?||>" in prompt


async def test_input_of_a_tool_that_is_nested_deeper_than_can_be_read_is_shown_empty_and_no_fault() -> None:
    deep = b'{"a": ' + b"[" * 1500 + b"]" * 1500 + b"}"
    async with client_and_mesh(b'<tool_call>{"name": "time", "arguments": ' + deep + b"}</tool_call>") as (client, _):
        message = await client.messages.create(model="tiny", max_tokens=3500, messages=HELLO, tools=[TIME])
        assert message.stop_reason == "tool_use" and [block.input for block in message.content] == [{}]


async def test_input_of_a_tool_is_shown_as_it_was_written() -> None:
    written = rb'{"a": "\ud83d", "b": 1.50}'
    async with client_and_mesh(b'<tool_call>{"name": "time", "arguments": %b}</tool_call>' % written) as (client, _):
        raw = await client.messages.with_raw_response.create(model="tiny", max_tokens=99, messages=HELLO, tools=[TIME])
        assert b'"input":' + written in await raw.read()


def test_input_that_comes_back_however_deeply_nested_is_taken_or_refused() -> None:
    refused = 0
    for depth in range(700, 1000):
        content = '[{"type": "tool_use", "id": "t", "name": "time", "input": ' + "[" * depth + "]" * depth + "}]"
        body = '{"max_tokens": 5, "messages": [{"role": "assistant", "content": ' + content + "}]}"
        try:
            decode(body.encode())
        except BadRequest:
            refused += 1
    assert 0 < refused < 300


@pytest.mark.parametrize(("choice", "names"), [
    ({"type": "any", "disable_parallel_tool_use": True}, {"weather", "time"}),
    ({"type": "tool", "name": "weather"}, {"weather"})])
async def test_a_demanded_call_comes_and_fits(
        choice: Any, names: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    known = byte_tokenizer()
    words = Vocabulary("v", [known.token_bytes(id) for id in range(258)], [END], [START, END])
    monkeypatch.setattr(worker.service, "vocabulary_file", lambda settings: words)
    async with world(blocks=256, offers=(tiny_model(context_length=4000),)) as made, client_of(
            build_app(made.gateway)) as client:
        message = await client.messages.create(
            model="tiny", max_tokens=900, messages=HELLO, tools=[WEATHER, TIME], tool_choice=choice)
        calls = [block for block in message.content if block.type == "tool_use"]
        assert calls and len(calls) == len(message.content) and {call.name for call in calls} <= names
        for call in calls if message.stop_reason == "tool_use" else calls[:-1]:
            assert set(call.input) == ({"city"} if call.name == "weather" else set())


@pytest.mark.parametrize(("more", "words"), [
    ({"temperature": 1.5}, "temperature"), ({"tool_choice": {"type": "some"}}, "tool_choice"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "own"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "not text"),
    ({"tools": [{"name": "a b", "input_schema": {}}]}, "name"),
    ({"stop_sequences": [""]}, "stop_sequences must"),
    ({"output_config": {"effort": "much"}}, "output_config.effort must"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format must"),
    ({"output_format": {"type": "json_schema"}}, "output_format.schema is missing")])
async def test_what_is_wrong_is_refused_in_the_shape_of_anthropics_errors(more: dict[str, Any], words: str) -> None:
    async with client_and_mesh() as (client, mesh):
        with pytest.raises(anthropic.BadRequestError, match=words) as refused:
            await client.messages.create(model="tiny", max_tokens=5, messages=HELLO, extra_body=more)
        assert refused.value.body["type"] == "error" and refused.value.body["error"]["type"] == "invalid_request_error"
        assert refused.value.request_id == refused.value.body["request_id"] and not mesh.requests


async def test_every_failure_has_the_class_that_the_official_client_has_for_it() -> None:
    async with client_and_mesh() as (client, mesh):
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(model="gpt-9", max_tokens=5, messages=HELLO)
        mesh.script = lambda request: refusal(request, "overloaded")
        with pytest.raises(anthropic.InternalServerError) as full:
            await client.messages.create(model="tiny", max_tokens=5, messages=HELLO)
        assert full.value.body["error"]["type"] == "overloaded_error"

        def script(request: Generate) -> list[Reply]:
            return [Accepted(request.request_id, 1, "w1"), Tokens(request.request_id, 1, 0, pack([72])),
                    *refusal(request, "invalid_request")]

        mesh.script = script
        seen = []
        with pytest.raises(anthropic.APIStatusError, match="refused: invalid_request"):
            async for event in await client.messages.create(model="tiny", max_tokens=5, messages=HELLO, stream=True):
                seen.append(event.type)
        assert "content_block_delta" in seen


async def test_a_body_without_max_tokens_and_a_path_that_is_unknown_are_errors_of_the_same_shape() -> None:
    async with gateway_and_mesh() as (client, _, _):
        for response in (await client.post("/v1/messages", json={"model": "tiny", "messages": HELLO}),
                         await client.post("/v1/messages/what", json={}),
                         await client.get("/v1/messages/count_tokens")):
            body = json.loads(response.content)
            assert body["type"] == "error" and body["error"]["message"] and response.headers["request-id"]
