"""`/v1/responses` through the official client: text, calls, thoughts, parsed answers, and events in their order."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pydantic
import pytest

from gateway.app import build_app
from shared.messages import Accepted, Generate, Reply, Tokens
from shared.tokens import pack, unpack
from tests.gateway.fake_mesh import FakeMesh, gateway_and_mesh, refusal, tiny_model
from tests.gateway.test_api import CHAT, chat
from tests.gateway.test_tools import ONE, TWO, real

RESPONSES = "/v1/responses"
WEATHER: Any = {"type": "function", "name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "unit": {"type": "string"}}}}
TIME: Any = {"type": "function", "name": "time", "parameters": {"type": "object", "properties": {}}}


@contextlib.asynccontextmanager
async def client_and_mesh(says: bytes = b"Hello, world!", **model: Any) -> AsyncIterator[
        tuple[openai.AsyncOpenAI, FakeMesh]]:
    async with gateway_and_mesh(tiny_model(context_length=4000, **model)) as (_, mesh, gateway):
        mesh.says, mesh.batch = says, 3
        async with httpx.AsyncClient(transport=httpx.ASGITransport(build_app(gateway))) as http, openai.AsyncOpenAI(
                base_url="http://gateway/v1", api_key="none", http_client=http, max_retries=0) as client:
            yield client, mesh


async def test_an_answer_is_one_message_with_its_text_and_counts() -> None:
    async with client_and_mesh() as (client, mesh):
        answer = await client.responses.create(
            model="tiny", input="Hi", instructions="Be brief.", max_output_tokens=50, temperature=0.5,
            metadata={"a": "b"}, extra_body={"seed": 3})
        assert answer.output_text == "Hello, world!" and answer.status == "completed" and answer.error is None
        (message,) = answer.output
        assert message.type == "message" and message.status == "completed" and message.id.startswith("msg_")
        assert answer.id.startswith("resp_") and (answer.instructions, answer.temperature) == ("Be brief.", 0.5)
        assert answer.usage and answer.usage.output_tokens == 14 and answer.metadata == {"a": "b"}
        assert answer.usage.input_tokens_details.cached_tokens == 16
        prompt = bytes(token for token in unpack(mesh.requests[0].tokens) if token < 256)
        assert prompt == b"system:Be brief.user:Hiassistant:" and mesh.requests[0].sampling.temperature == 0.5


async def test_an_answer_that_was_cut_is_incomplete() -> None:
    async with client_and_mesh() as (client, _):
        answer = await client.responses.create(model="tiny", input="Hi", max_output_tokens=5)
        assert answer.status == "incomplete" and answer.output_text == "Hello"
        assert answer.incomplete_details and answer.incomplete_details.reason == "max_output_tokens"
        assert answer.output[0].type == "message" and answer.output[0].status == "incomplete"
        events = [event async for event in await client.responses.create(
            model="tiny", input="Hi", max_output_tokens=5, stream=True)]
        assert events[-1].type == "response.incomplete" and events[-1].response.output_text == "Hello"


async def test_a_stream_opens_and_closes_each_item_in_the_order_that_the_official_client_expects() -> None:
    async with client_and_mesh(b"<think>hm</think>" + TWO, chat_template="{{ messages[0].content }}{# </think> #}") as (
            client, _):
        events: list[Any] = [event async for event in await client.responses.create(
            model="tiny", input="Hi", tools=[WEATHER, TIME], stream=True)]
    kinds = [event.type.removeprefix("response.") for event in events]
    shown = [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before]
    assert shown == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
        "output_item.done",
        *(["output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
           "output_item.done"] * 2),
        "completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    final = events[-1].response
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert [event.item.id for event in events if event.type == "response.output_item.added"] == [
        event.item.id for event in events if event.type == "response.output_item.done"] == [
        item.id for item in final.output]
    for number, item in enumerate(final.output):
        deltas = "".join(event.delta for event in events if hasattr(event, "delta") and event.output_index == number)
        assert deltas == (item.arguments if item.type == "function_call" else item.content[0].text)
    assert json.loads(final.output[2].arguments) == {"city": "Oslo", "unit": "C"}
    assert final.output[2].call_id != final.output[3].call_id
    assert final.usage.output_tokens_details.reasoning_tokens > 0


async def test_the_clients_own_accumulator_ends_with_the_same_response() -> None:
    async with client_and_mesh(ONE) as (client, _):
        async with client.responses.stream(model="tiny", input="Hi", tools=[WEATHER]) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[-1] == "response.completed" and final.output_text == "Let me look."
        assert final.output[1].type == "function_call" and final.output[1].name == "weather"
        whole = await client.responses.create(model="tiny", input="Hi", tools=[WEATHER])
        assert [item.type for item in whole.output] == ["message", "function_call"]


async def test_a_conversation_comes_back_as_the_items_it_was() -> None:
    template = ("{% for m in messages %}<{{ m.role }}|{{ m.content }}|{{ m.reasoning_content or '' }}|"
                "{{ m.tool_calls | tojson if m.tool_calls else '' }}>{% endfor %}{{ tools and '<tool_call>' }}")
    async with client_and_mesh(chat_template=template) as (client, mesh):
        await client.responses.create(model="tiny", input=[
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [
                {"type": "output_text", "text": "Let me look.", "annotations": []}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "time", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "call_2", "name": "time", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "output": "noon"},
            {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "late"}]},
            {"role": "developer", "content": "Go on."}])
        prompt = bytes(unpack(mesh.requests[0].tokens)).decode()
        assert prompt.startswith("<user|Hi||><assistant|Let me look.|hm|[{") and prompt.count('"name": "time"') == 2
        assert '"arguments": {"a": 1}' in prompt and "<tool|noon||><tool|late||><system|Go on.||>" in prompt


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)


async def test_a_demanded_call_and_a_parsed_answer_keep_to_their_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    async with real(monkeypatch) as client:
        answer: Any = await client.responses.parse(
            model="tiny", input="Where?", text_format=City, max_output_tokens=300,
            extra_body={"seed": 1, "logit_bias": {str(ord('"')): 3, "32": -5, "10": -5, "9": -5}})
        assert isinstance(answer.output_parsed, City)
        called = await client.responses.create(
            model="tiny", input="When?", tools=[TIME], tool_choice={"type": "function", "name": "time"},
            parallel_tool_calls=False, max_output_tokens=300)
        (call,) = [item for item in called.output if item.type == "function_call"]
        assert (call.name, call.arguments) == ("time", "{}")


@pytest.mark.parametrize(("more", "param"), [
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"), ({"prompt": {"id": "p"}}, "prompt"), ({"n": 2}, "n"),
    ({"input": None}, "input"), ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0]"),
    ({"input": [{"type": "computer_call"}]}, "input[0]"), ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"), ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"truncation": "some"}, "truncation"), ({"include": ["message.output_text.logprobs"]}, "include of logprobs"),
    ({"logprobs": True}, "logprobs"), ({"logprobs": 0}, "logprobs"), ({"prompt_logprobs": 0}, "prompt_logprobs"),
    ({"return_token_ids": True}, "return_token_ids"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"reasoning": {"effort": "much"}}, "reasoning.effort"), ({"max_output_tokens": 5, "min_tokens": 9}, "min_tokens"),
    ({"instructions": "Be brief.", "input": [{"role": "bot", "content": "Hi"}]}, "input[0].role"),
    ({"input": [{"content": "Hi"}]}, "input[0].role"),
    *(({"input": [{"type": "message", "role": "user", "content": "Hi"}, {"type": "function_call", "name": "time",
                                                                         "arguments": arguments}]},
       "input[1].arguments") for arguments in ('{"a": ', '{"a":' * 3000))])
async def test_what_is_wrong_or_would_need_a_store_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    async with gateway_and_mesh() as (client, mesh, _):
        response = await client.post(RESPONSES, json={"model": "tiny", "input": "Hi"} | more)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
        assert not mesh.requests


async def test_what_changes_nothing_is_said_in_a_header() -> None:
    async with gateway_and_mesh() as (client, _, _):
        response = await client.post(RESPONSES, json={
            "model": "tiny", "input": "Hi", "store": True, "truncation": "auto", "text": {"verbosity": "low"},
            "include": ["reasoning.encrypted_content"], "prompt_cache_key": "k", "user": "u", "stream_options": {}})
        assert response.status_code == 200
        assert response.headers["x-tokenmill-ignored"] == "verbosity, store, include, truncation"
        assert (await client.get(f"{RESPONSES}/resp_1")).status_code == 404
        response = await client.post(CHAT, json=chat(also_ignored=["mine"], names={"stop": "mine"}, stop=[""]))
        assert "x-tokenmill-ignored" not in response.headers and response.json()["error"]["param"] == "stop"


async def test_an_error_in_mid_stream_reaches_the_official_client() -> None:
    async with client_and_mesh() as (client, mesh):
        def script(request: Generate) -> list[Reply]:
            return [Accepted(request.request_id, 1, "w1"), Tokens(request.request_id, 1, 0, pack([72])),
                    *refusal(request, "invalid_request")]

        mesh.script = script
        seen = []
        with pytest.raises(openai.APIError, match="refused: invalid_request"):
            async for event in await client.responses.create(model="tiny", input="Hi", stream=True):
                seen.append(event.type)
        assert "response.output_text.delta" in seen
