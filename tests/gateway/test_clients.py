"""Programs that speak OpenAI's or Anthropic's API, unmodified, against the real server.

openai and anthropic are installed for every test run. The others are heavy, and skipped where they are missing: see
"Clients" in docs/api.md for the command that runs them.
"""

import asyncio
import os
from collections.abc import Callable
from typing import Any, TypeVar

import openai
import pytest

from tests.gateway.fake_mesh import FakeMesh
from tests.gateway.test_openai_client import served
from tests.gateway.test_tools import ONE, WEATHER

T = TypeVar("T")
ASK: list[Any] = [{"role": "user", "content": "Well?"}]
LOOK = "Let me look."


async def against(monkeypatch: pytest.MonkeyPatch, use: Callable[[str], T], says: bytes = b"Hello, world!",
                  see: Callable[[FakeMesh], None] = lambda mesh: None) -> T:
    """What a client that blocks makes of a gateway that answers `says`: `use(url)`, in a thread."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with served(monkeypatch, context=4000) as (url, mesh, _):
        mesh.says, mesh.batch = says, 3
        found = await asyncio.to_thread(use, url)
        see(mesh)
        return found


async def test_the_synchronous_openai_client_chats_streams_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(url: str) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(model="tiny", messages=ASK, tools=[WEATHER])
            assert whole.choices[0].message.tool_calls and whole.choices[0].finish_reason == "tool_calls"
            with client.chat.completions.stream(model="tiny", messages=ASK, tools=[WEATHER]) as stream:
                for _ in stream:
                    pass
                assert stream.get_final_completion().choices[0].message.tool_calls
            with client.responses.stream(model="tiny", input="Well?") as responses:
                for _ in responses:
                    pass
                assert responses.get_final_response().output_text.startswith(LOOK)
            assert client.responses.create(model="tiny", input="Well?", tools=[
                {"type": "function", **WEATHER["function"], "strict": False}]).output[1].type == "function_call"

    await against(monkeypatch, use, ONE)


async def test_the_synchronous_anthropic_client_streams_and_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    anthropic = pytest.importorskip("anthropic")
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}

    def use(url: str) -> None:
        with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
            with client.messages.stream(model="tiny", max_tokens=300, messages=ASK, tools=[tool]) as stream:
                assert "".join(stream.text_stream) == LOOK
                final = stream.get_final_message()
            assert final.stop_reason == "tool_use" and final.content[1].input == {"city": "Oslo", "unit": "C"}

    await against(monkeypatch, use, ONE)


async def test_litellm_speaks_both_apis_and_reads_calls_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm")

    def use(url: str) -> None:
        for model, base in (("openai/tiny", f"{url}/v1"), ("anthropic/tiny", url)):
            asked = {"model": model, "api_base": base, "api_key": "none", "messages": ASK, "tools": [WEATHER],
                     "max_tokens": 300, "num_retries": 0}
            whole = litellm.completion(**asked)
            assert whole.choices[0].finish_reason == "tool_calls"
            assert whole.choices[0].message.tool_calls[0].function.name == "weather"
            assert whole.usage.completion_tokens > 0
            chunks = list(litellm.completion(**asked, stream=True))
            built = litellm.stream_chunk_builder(chunks)
            assert built.choices[0].message.content.startswith(LOOK), model
            assert built.choices[0].message.tool_calls[0].function.arguments == '{"city": "Oslo", "unit": "C"}'
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(model="openai/tiny", api_base=f"{url}/v1", api_key="none", num_retries=0,
                               messages=[{"role": "user", "content": "a" * 5000}])

    await against(monkeypatch, use, ONE)


async def test_langchain_binds_tools_streams_and_parses(monkeypatch: pytest.MonkeyPatch) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")

    def use(url: str) -> None:
        for more in ({}, {"use_responses_api": True}):
            model = langchain_openai.ChatOpenAI(
                model="tiny", base_url=f"{url}/v1", api_key="none", max_retries=0, stream_usage=True, **more)
            message = model.bind_tools([WEATHER]).invoke("Well?")
            assert [(call["name"], call["args"]) for call in message.tool_calls] == [
                ("weather", {"city": "Oslo", "unit": "C"})]
            whole = None
            for chunk in model.bind_tools([WEATHER]).stream("Well?"):
                whole = chunk if whole is None else whole + chunk
            assert whole is not None and whole.tool_calls[0]["args"] == {"city": "Oslo", "unit": "C"}
            assert whole.usage_metadata and whole.usage_metadata["output_tokens"] > 0

    await against(monkeypatch, use, ONE)

    def parse(url: str) -> None:
        model = langchain_openai.ChatOpenAI(model="tiny", base_url=f"{url}/v1", api_key="none", max_retries=0)
        schema = {"title": "city", "type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"],
                  "additionalProperties": False}
        assert model.with_structured_output(schema, method="json_schema").invoke("Well?") == {"name": "Oslo"}

    def see(mesh: FakeMesh) -> None:
        assert mesh.requests[-1].grammar is not None and mesh.requests[-1].grammar.kind == "json"

    await against(monkeypatch, parse, b'{"name": "Oslo"}', see)


async def test_llm_chats_and_calls_a_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("LLM_USER_PATH", os.fspath(tmp_path))
    llm = pytest.importorskip("llm")
    from llm.default_plugins.openai_models import Chat  # type: ignore[import-not-found]

    def use(url: str) -> None:
        model = Chat(model_id="tiny", model_name="tiny", api_base=f"{url}/v1", supports_tools=True)
        for stream in (True, False):
            assert model.prompt("Well?", stream=stream, key="none").text().startswith(LOOK)
        asked = model.prompt("Well?", key="none", tools=[llm.Tool(
            name="weather", description="", input_schema=WEATHER["function"]["parameters"])])
        assert [(call.name, call.arguments) for call in asked.tool_calls()] == [
            ("weather", {"city": "Oslo", "unit": "C"})]

    await against(monkeypatch, use, ONE)
