"""Tools from the official client to the mesh and back: calls in streams and in one piece, demanded and free."""

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest

import worker.service
from gateway.app import build_app
from gateway.service import Gateway
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.settings import GatewaySettings
from shared.tokens import unpack
from shared.vocabulary import Vocabulary
from tests.gateway.fake_mesh import END, START, FakeMesh, byte_tokenizer, gateway_and_mesh, tiny_model
from tests.gateway.test_api import CHAT, chat, events
from tests.gateway.world import world

WEATHER = {"type": "function", "function": {
    "name": "weather", "description": "How it is outside.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8},
                                                    "unit": {"enum": ["C", "F"]}}, "required": ["city", "unit"]}}}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
ASK: list[Any] = [{"role": "user", "content": "Well?"}]
ONE = b'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "unit": "C"}}\n</tool_call>'
TWO = ONE + b'\n<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
KNOWS_TOOLS = ("{% for tool in tools %}{{ tool | tojson }}<tool_call>{% endfor %}{% for message in messages %}"
               "{{ message.role }}:{{ message.name ~ ':' if message.name }}{{ message.content }}"
               "{{ message.tool_calls | tojson if message.tool_calls }}\n"
               "{% endfor %}")


@contextlib.asynccontextmanager
async def openai_client(says: bytes, **model: Any) -> AsyncIterator[tuple[openai.AsyncOpenAI, FakeMesh, Gateway]]:
    async with gateway_and_mesh(tiny_model(context_length=4000, **model)) as (_, mesh, gateway):
        mesh.says, mesh.batch = says, 3
        async with httpx.AsyncClient(transport=httpx.ASGITransport(build_app(gateway))) as http, openai.AsyncOpenAI(
                base_url="http://gateway/v1", api_key="none", http_client=http, max_retries=0) as client:
            yield client, mesh, gateway


async def test_calls_come_in_one_piece_and_nothing_of_them_is_text() -> None:
    async with openai_client(TWO) as (client, _, _):
        answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER, TIME])
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me look."
        first, second = choice.message.tool_calls or []
        assert first.type == second.type == "function" and first.id != second.id
        assert (first.function.name, json.loads(first.function.arguments)) == ("weather", {"city": "Oslo", "unit": "C"})
        assert (second.function.name, second.function.arguments) == ("time", "{}")


@pytest.mark.parametrize("batch", [1, 2, 7, 1000])
async def test_a_stream_says_each_call_once_and_then_only_its_arguments(batch: int) -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        mesh.says, mesh.batch = TWO, batch
        found = events(await client.post(CHAT, json=chat(stream=True, tools=[WEATHER, TIME])))
        deltas = [event["choices"][0]["delta"] for event in found]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        begins = [call for call in calls if "id" in call]
        assert [(call["index"], call["type"], call["function"]) for call in begins] == [
            (0, "function", {"name": "weather", "arguments": ""}), (1, "function", {"name": "time", "arguments": ""})]
        assert all(set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
                   for call in calls if "id" not in call)
        assert all(len(delta.get("tool_calls", ())) <= 1 for delta in deltas)
        arguments = ["".join(call["function"]["arguments"] for call in calls if call["index"] == i) for i in (0, 1)]
        assert arguments == ['{"city": "Oslo", "unit": "C"}', "{}"]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Let me look."
        assert [event["choices"][0]["finish_reason"] for event in found][-2:] == [None, "tool_calls"]


async def test_the_clients_own_stream_helper_puts_calls_together() -> None:
    async with openai_client(ONE) as (client, _, _), client.chat.completions.stream(
            model="tiny", messages=ASK, tools=[WEATHER]) as stream:
        done = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = await stream.get_final_completion()
    assert [(event.name, json.loads(event.arguments)) for event in done] == [
        ("weather", {"city": "Oslo", "unit": "C"})]
    assert final.choices[0].finish_reason == "tool_calls"


async def test_what_only_looks_like_a_call_and_what_nobody_offered_is_text() -> None:
    for says, tools in ((ONE, []), (ONE, [TIME]), (b"see <tool_call> and </tool_call>", [WEATHER])):
        async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
            mesh.says = says
            (choice,) = (await client.post(CHAT, json=chat(tools=tools))).json()["choices"]
            assert choice["message"] == {"role": "assistant", "content": says.decode(), "refusal": None}
            assert choice["finish_reason"] == "stop"
            body = chat(tools=[WEATHER], tool_choice="none")
            assert (await client.post(CHAT, json=body)).json()["choices"][0]["message"]["content"] == says.decode()


async def test_a_call_that_was_cut_reports_length_and_is_shown_as_far_as_it_came() -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        mesh.says = ONE
        (choice,) = (await client.post(CHAT, json=chat(tools=[WEATHER], max_tokens=len(ONE) - 25))).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert '{"city": "Oslo", "unit": "C"}'.startswith(choice["message"]["tool_calls"][0]["function"]["arguments"])
        streamed = events(await client.post(CHAT, json=chat(tools=[WEATHER], max_tokens=len(ONE) - 25, stream=True)))
        assert streamed[-1]["choices"][0]["finish_reason"] == "length"


async def test_without_parallel_calls_the_first_one_ends_the_answer_and_its_worker() -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        mesh.says, mesh.batch, mesh.pause_s = TWO, 1, 0.0001
        for stream in (False, True):
            response = await client.post(CHAT, json=chat(
                tools=[WEATHER, TIME], parallel_tool_calls=False, stream=stream))
            assert response.text.count('"name":') == 1 and '"tool_calls"' in response.text
            assert '"finish_reason":"tool_calls"' in response.text
        whole = (await client.post(CHAT, json=chat(tools=[WEATHER, TIME], parallel_tool_calls=False))).json()
        # up to the brace that ends the arguments
        assert whole["usage"]["completion_tokens"] == ONE.index(b"}}") + 1
        await mesh.cancelled.wait()


async def test_a_stop_string_stops_text_and_never_a_call() -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        mesh.says = ONE + b"\nDone. And more"
        for stop, content in (("Oslo", "Let me look.Done. And more"), ("And", "Let me look.Done. "),
                              ("look", "Let me ")):
            message = (await client.post(CHAT, json=chat(tools=[WEATHER], stop=stop))).json()["choices"][0]["message"]
            assert message["content"] == content
            assert ("tool_calls" in message) == (stop != "look")


async def test_thoughts_are_told_apart_and_counted() -> None:
    thinking = tiny_model(context_length=4000, chat_template="{{ messages[0].content }}{# </think> #}")
    async with gateway_and_mesh(thinking) as (client, mesh, _):
        mesh.says = b"<think>\nhm\n</think>\n\nYes."
        body = (await client.post(CHAT, json=chat())).json()
        assert body["choices"][0]["message"] == {
            "role": "assistant", "content": "Yes.", "refusal": None, "reasoning_content": "hm"}
        assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("<think>\nhm\n</think>") - 6
        found = events(await client.post(CHAT, json=chat(stream=True)))
        deltas = [event["choices"][0]["delta"] for event in found]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes."
        hidden = (await client.post(CHAT, json=chat(include_reasoning=False))).json()["choices"][0]["message"]
        assert hidden == {"role": "assistant", "content": "Yes.", "refusal": None}
        mesh.says = b"hm</think>Yes."
        opened = [{"role": "user", "content": "Well?<think>\n"}]
        message = (await client.post(CHAT, json=chat(messages=opened))).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "Yes.")


async def test_a_template_that_knows_tools_shows_them_itself() -> None:
    async with openai_client(ONE, chat_template=KNOWS_TOOLS) as (client, mesh, _):
        history = [*ASK, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}]},
            {"role": "tool", "tool_call_id": "call_1", "content": "noon"}]
        await client.chat.completions.create(model="tiny", messages=history, tools=[TIME])
        prompt = bytes(unpack(mesh.requests[0].tokens)).decode()
        shown = ('{"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": '
                 '"object", "properties": {}}}}<tool_call>')
        assert prompt.startswith(shown) and '"arguments": {"zone": "UTC"}' in prompt and "tool:time:noon" in prompt


async def test_for_a_template_without_tools_the_gateway_shows_them_and_what_came_of_calls() -> None:
    async with openai_client(ONE) as (client, mesh, _):
        history = [{"role": "system", "content": "Be brief."}, *ASK, {"role": "assistant", "tool_calls": [
            {"id": f"call_{i}", "type": "function", "function": {"name": "time", "arguments": "{}"}} for i in (1, 2)]},
            {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
            {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "night"}]}]
        await client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER])
        prompt = bytes(token for token in unpack(mesh.requests[0].tokens) if token < 256).decode()
        assert prompt.startswith("system:Be brief.\n\n") and '"name": "weather"' in prompt and "<tool_call>" in prompt
        assert prompt.count('<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>') == 2
        assert ("user:<tool_response>\nnoon\n</tool_response>\n<tool_response>\nnight\n</tool_response>") in prompt


@pytest.mark.parametrize(("more", "param"), [
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
    ({"tools": [TIME, TIME]}, "tools"), ({"tools": [TIME], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"), ({"tools": [TIME] * 129}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "tools[0]"),
    ({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": []}}}, "tool_choice"),
    *(({"tools": [TIME], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}},
       "tool_choice") for mode in ("auto", "required") for tools in (5, True, "time", {"a": 1}, [], None)),
    ({"functions": [{"name": "a"}]}, "functions"), ({"reasoning_effort": "much"}, "reasoning_effort"),
    ({"tools": [TIME], "tool_choice": "required", "guided_grammar": 'start: "a"'}, "tools"),
])
async def test_wrong_tools_are_refused_by_name(more: dict[str, Any], param: str) -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        response = await client.post(CHAT, json=chat(**more))
        assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
        assert not mesh.requests


@pytest.mark.parametrize(("path", "more"), [
    (CHAT, {"tools": [TIME], "tool_choice": {"type": "function", "function": {"name": "my secret"}}}),
    ("/v1/responses", {"input": [{"type": "my secret"}]})])
async def test_what_stands_in_a_wrong_field_is_not_repeated_in_an_error(path: str, more: dict[str, Any]) -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, _, _):
        response = await client.post(path, json=chat(**more))
        assert response.status_code == 400 and "my secret" not in response.text


async def test_a_call_may_hold_half_a_surrogate_pair() -> None:
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, _):
        for arguments in (rb'{\"a\": \"\ud83d\"}', rb'{\"a\": \"\\ud83d\"}'):
            mesh.says = b'<tool_call>{"name": "time", "arguments": "' + arguments + b'"}</tool_call>'
            for stream in (False, True):
                response = await client.post(CHAT, json=chat(tools=[TIME], stream=stream))
                assert response.status_code == 200 and '"finish_reason":"tool_calls"' in response.text


async def test_a_model_whose_form_of_calls_is_unknown_refuses_tools_until_it_is_told() -> None:
    unknown = tiny_model(context_length=4000, chat_template="{{ tools }}{{ messages }}")
    async with gateway_and_mesh(unknown) as (client, mesh, _):
        response = await client.post(CHAT, json=chat(tools=[TIME]))
        assert response.status_code == 400 and "--tool-formats" in response.json()["error"]["message"]
        assert (await client.get("/v1/models")).json()["data"][0]["tools"] == "none"
        assert (await client.post(CHAT, json=chat())).status_code == 200
    async with gateway_and_mesh(unknown, tool_formats="tiny=mistral") as (client, mesh, _):
        mesh.says = b"[TOOL_CALLS]time[ARGS]{}"
        (call,) = (await client.post(CHAT, json=chat(tools=[TIME]))).json()["choices"][0]["message"]["tool_calls"]
        assert len(call["id"]) == 9 and call["id"].isalnum()
    for setting in ({"tool_formats": "tiny=what"}, {"tool_formats": "other=hermes"}, {"reasoning_formats": "tiny=x"}):
        with pytest.raises(ValueError):
            Gateway(MemoryBus(MemoryBroker()), GatewaySettings(model_name="tiny", **setting), LoopClock(), unknown)


# --- demanded, through a real worker --------------------------------------------------------------------------------


class Weather(pydantic.BaseModel):
    city: str = pydantic.Field(max_length=8)
    unit: str = pydantic.Field(pattern="^[CF]$")


@contextlib.asynccontextmanager
async def real(monkeypatch: pytest.MonkeyPatch, **model: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client before real workers whose model chooses at random."""
    known = byte_tokenizer()
    words = Vocabulary("v", [known.token_bytes(id) for id in range(258)], [END], [START, END])
    monkeypatch.setattr(worker.service, "vocabulary_file", lambda settings: words)
    async with world(blocks=256, offers=(tiny_model(context_length=4000, **model),)) as made:
        transport = httpx.ASGITransport(build_app(made.gateway))
        async with httpx.AsyncClient(transport=transport) as http, openai.AsyncOpenAI(
                base_url="http://gateway/v1", api_key="none", http_client=http, max_retries=0) as client:
            yield client


# the mock chooses at random: pushes towards ends
ENDS = {str(ord('"')): 3, str(END): 8}


async def test_a_demanded_call_always_comes_and_fits_its_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    async with real(monkeypatch) as client:
        for seed, choice, names in ((1, "required", {"weather", "time"}), (2, "required", {"weather", "time"}),
                                    (3, {"type": "function", "function": {"name": "weather"}}, {"weather"}),
                                    (4, {"type": "allowed_tools", "allowed_tools": {
                                        "mode": "required", "tools": [{"type": "function", "function": {
                                            "name": "time"}}]}}, {"time"})):
            for stream in (False, True):
                answer: Any = await client.chat.completions.create(
                    model="tiny", messages=ASK, tools=[WEATHER, TIME], tool_choice=choice, seed=seed, max_tokens=600,
                    logit_bias=ENDS, stream=stream)
                if stream:
                    calls, reasons = {}, []
                    async for chunk in answer:
                        reasons.append(chunk.choices[0].finish_reason)
                        assert not chunk.choices[0].delta.content
                        for call in chunk.choices[0].delta.tool_calls or ():
                            name, text = calls.get(call.index, ("", ""))
                            calls[call.index] = (call.function.name or name, text + (call.function.arguments or ""))
                    found, reason = list(calls.values()), reasons[-1]
                else:
                    message, reason = answer.choices[0].message, answer.choices[0].finish_reason
                    assert message.content is None
                    found = [(call.function.name, call.function.arguments) for call in message.tool_calls]
                assert reason == "tool_calls" and found and {name for name, _ in found} <= names
                for name, arguments in found:
                    if name == "weather":
                        jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
                    else:
                        assert json.loads(arguments) == {}


async def test_one_call_and_no_more_where_calls_may_not_be_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    async with real(monkeypatch) as client:
        for seed in range(3):
            answer = await client.chat.completions.create(
                model="tiny", messages=ASK, tools=[TIME], tool_choice="required", seed=seed, max_tokens=600,
                parallel_tool_calls=False)
            assert len(answer.choices[0].message.tool_calls or []) == 1


async def test_the_official_client_parses_the_arguments_of_a_strict_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    async with real(monkeypatch) as client:
        answer = await client.chat.completions.parse(
            model="tiny", messages=ASK, tools=[openai.pydantic_function_tool(Weather)], tool_choice="required", seed=5,
            max_tokens=600, logit_bias=ENDS, parallel_tool_calls=False)
        (call,) = answer.choices[0].message.tool_calls or []
        assert isinstance(call.function.parsed_arguments, Weather)


async def test_tools_and_the_form_of_the_answer_hold_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async with real(monkeypatch) as client:
        seen = set()
        for seed in range(8):
            answer = await client.chat.completions.create(
                model="tiny", messages=ASK, tools=[TIME], seed=seed, max_tokens=600,
                parallel_tool_calls=False, response_format={"type": "json_schema", "json_schema": {
                    "name": "n", "schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                                            "additionalProperties": False}}},
                logit_bias={str(ord(" ")): -5, str(ord("\n")): -5, str(ord("\t")): -5, str(ord("<")): 1})
            message = answer.choices[0].message
            if message.tool_calls:
                assert message.tool_calls[0].type == "function" and message.tool_calls[0].function.arguments == "{}"
            else:
                assert json.loads(message.content or "") in ({"a": 1}, {"a": 2})
            seen.add(answer.choices[0].finish_reason)
        assert seen == {"tool_calls", "stop"}
