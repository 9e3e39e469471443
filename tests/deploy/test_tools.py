"""A demanded call from the real default model: the whole mesh in one process, official clients, real text."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import structlog

from deploy import broker
from deploy.all_in_one import OneProcess
from deploy.local_mesh import Options
from tests.models import default_folder

WEATHER: dict[str, Any] = {
    "type": "object", "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"], "additionalProperties": False}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "get_weather", "description": "The weather in a city.",
                                                      "parameters": WEATHER}}]
ASK: list[Any] = [{"role": "user", "content": "What is the weather in Oslo, in degrees Celsius?"}]


@pytest.fixture
def logging_restored() -> Iterator[None]:
    handlers, configuration = logging.getLogger().handlers[:], structlog.get_config()
    yield
    logging.getLogger().handlers[:] = handlers
    structlog.configure(**configuration)
    structlog.contextvars.clear_contextvars()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_the_default_model_calls_when_it_has_to_in_every_api(tmp_path: Path, logging_restored: None) -> None:
    anthropic = pytest.importorskip("anthropic")
    name = default_folder().name
    mesh = OneProcess(options := Options(model=default_folder(), data=tmp_path, port=broker.free_port(), drain_s=5.0))
    mesh.start()
    try:
        await mesh.until_ready()
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=f"{options.url}/v1", api_key="none", http_client=http) as client:
            answer = await client.chat.completions.create(
                model=name, messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
                temperature=0, max_tokens=120)
            (call,) = answer.choices[0].message.tool_calls or []
            assert call.type == "function" and call.function.name == "get_weather"
            jsonschema.validate(json.loads(call.function.arguments), WEATHER)
            text = ""
            async for chunk in await client.chat.completions.create(
                    model=name, messages=ASK, tools=TOOLS, parallel_tool_calls=False, temperature=0,
                    max_tokens=120, tool_choice={"type": "function", "function": {"name": "get_weather"}}, stream=True):
                for delta in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
                    text += delta.function.arguments or "" if delta.function else ""
            # drafts and forced tokens change nothing, and neither does asking for it as a stream
            assert text == call.function.arguments
            response = await client.responses.create(
                model=name, input=ASK, temperature=0, max_output_tokens=120, tool_choice="required",
                parallel_tool_calls=False, tools=[{"type": "function", **TOOLS[0]["function"], "strict": True}])
            assert [item.arguments for item in response.output if item.type == "function_call"] == [text]
        async with anthropic.AsyncAnthropic(base_url=options.url, api_key="none",
                                            http_client=anthropic.DefaultAsyncHttpxClient(trust_env=False)) as client:
            message = await client.messages.create(
                model=name, messages=ASK, max_tokens=120, extra_body={"temperature": 0}, tools=[
                    {"name": "get_weather", "description": "The weather in a city.", "input_schema": WEATHER}],
                tool_choice={"type": "any", "disable_parallel_tool_use": True})
            assert message.stop_reason == "tool_use" and message.content[0].input == json.loads(text)
            counted = await client.messages.count_tokens(model=name, messages=ASK)
            assert counted.input_tokens > 10
    finally:
        await mesh.stop()
