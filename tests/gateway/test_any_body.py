"""No body, however odd, is a fault of the gateway: it is answered, or refused with a sentence in its API's shape."""

import copy
import json
import random
from typing import Any

import pytest

from tests.gateway.fake_mesh import gateway_and_mesh, tiny_model
from tests.gateway.test_tools import TIME, WEATHER

CALLS = [{"id": "call_1", "type": "function", "function": {"name": "time", "arguments": "{}"}}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "tiny", "tools": [WEATHER, TIME], "tool_choice": {"type": "function", "function": {"name": "time"}},
        "parallel_tool_calls": False, "reasoning_effort": "low", "chat_template_kwargs": {"a": 1}, "n": 1,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, "stop": ["x"],
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                     {"role": "assistant", "content": None, "tool_calls": CALLS, "reasoning_content": "hm"},
                     {"role": "tool", "tool_call_id": "call_1", "content": "noon"}]},
    "/v1/responses": {
        "model": "tiny", "instructions": "Be brief.",
        "tools": [{"type": "function", "name": "time", "parameters": SCHEMA}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "verbosity": "low"},
        "reasoning": {"effort": "low"}, "metadata": {"a": "b"}, "include": [], "max_output_tokens": 9,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                  {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                  {"type": "function_call", "call_id": "c", "name": "time", "arguments": "{}"},
                  {"type": "function_call_output", "call_id": "c", "output": "noon"}]},
    "/v1/messages": {
        "model": "tiny", "max_tokens": 9, "system": [{"type": "text", "text": "Be brief."}],
        "tools": [{"name": "time", "description": "", "input_schema": SCHEMA}], "metadata": {"user_id": "u"},
        "tool_choice": {"type": "tool", "name": "time", "disable_parallel_tool_use": True}, "stop_sequences": ["x"],
        "thinking": {"type": "disabled"}, "output_config": {"effort": "low"},
        "messages": [{"role": "user", "content": "Hi"},
                     {"role": "assistant", "content": [
                         {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "So."},
                         {"type": "tool_use", "id": "t", "name": "time", "input": {}}]},
                     {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": [
                         {"type": "text", "text": "noon"}]}]}]},
}
ODD: list[Any] = [None, True, 0, -1, 2**70, 1.5, "", "x", "\ud800", "none", [], [1], [None], {}, {"type": "x"},
                  {"a": [{}]}, {"type": "function", "function": "x"}, [[]], {"type": []}, "{", 1e308]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all that stands in a document."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, inner in below for found in places(inner, (*path, key))]


def changed(body: dict[str, Any], chooser: random.Random) -> dict[str, Any]:
    """`body` with one to three values that are something else, or gone."""
    made = copy.deepcopy(body)
    for _ in range(chooser.randint(1, 3)):
        *way, last = chooser.choice(places(made))
        inside: Any = made
        for key in way:
            inside = inside[key]
        if chooser.random() < 0.15 and isinstance(inside, dict):
            del inside[last]
        else:
            inside[last] = chooser.choice(ODD)
    return made


@pytest.mark.parametrize("path", BODIES)
async def test_any_body_is_answered_or_refused_with_a_sentence(path: str) -> None:
    chooser, statuses = random.Random(path), []
    async with gateway_and_mesh(tiny_model(context_length=4000)) as (client, mesh, gateway):
        mesh.says = b"{}"
        for number in range(400):
            body = changed(BODIES[path], chooser) if number else BODIES[path]
            response = await client.post(path, content=json.dumps(body))
            assert response.status_code in (200, 400, 404), (body, response.text)
            statuses.append(response.status_code)
            if response.status_code != 200:
                assert response.json()["error"]["message"] and response.json()["error"]["type"]
        assert statuses[0] == 200 and {200, 400} <= set(statuses)
        assert len(gateway.streams) == 0 and gateway.admission.active == 0
