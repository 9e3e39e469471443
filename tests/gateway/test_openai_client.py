"""The official client and plain sockets against the real server: streaming, errors, and clients that hang up."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec
import openai
import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import gateway.service
from gateway.service import serve
from shared import telemetry
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Accepted, Generate, Reply, Tokens
from shared.settings import GatewaySettings
from shared.tokens import pack
from tests.gateway.fake_mesh import MODEL, FakeMesh, refusal, tiny_model

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@asynccontextmanager
async def served(monkeypatch: pytest.MonkeyPatch, context: int = 400, **settings: Any
                 ) -> AsyncIterator[tuple[str, FakeMesh, "asyncio.Task[None]"]]:
    """`serve` on a free port, with a mesh that answers."""
    monkeypatch.setattr(gateway.service.ServedModel, "load", lambda folder, name: tiny_model(context_length=context))
    told = GatewaySettings(**({"id": "g1", "port": free_port(), "model": "tiny", "model_name": MODEL, "accept_s": 0.4,
                               "drain_s": 5.0} | settings))
    broker = MemoryBroker()
    mesh = FakeMesh(broker)
    await mesh.start()
    beating = asyncio.create_task(mesh.beat())
    ready = asyncio.Event()
    serving = asyncio.create_task(serve(MemoryBus(broker), told, LoopClock(), ready))
    await asyncio.wait_for(ready.wait(), 10)
    url = f"http://127.0.0.1:{told.port}"
    async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(10):
        while (await client.get(f"{url}/ready")).status_code != 200:
            await asyncio.sleep(0.01)
    try:
        yield url, mesh, serving
    finally:
        beating.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


def client_of(url: str, **more: Any) -> openai.AsyncOpenAI:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", http_client=http, **({"max_retries": 0} | more))


async def test_the_official_client_reads_answers_streams_and_usage(
        monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, _, _), client_of(url) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=HELLO)
        assert whole.choices[0].message.content == "Hello, world!"
        assert whole.choices[0].finish_reason == "stop"
        assert whole.usage and whole.usage.prompt_tokens_details
        assert (whole.usage.completion_tokens, whole.usage.prompt_tokens_details.cached_tokens) == (14, 16)
        chunks = [chunk async for chunk in await client.chat.completions.create(
            model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True})]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "Hello, world!"
        assert chunks[-1].usage and chunks[-1].usage.total_tokens == whole.usage.total_tokens
        text = await client.completions.create(model=MODEL, prompt=[72, 105], n=2, seed=1, temperature=0.7)
        assert [choice.text for choice in text.choices] == ["Hello, world!"] * 2
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "tokenmill"


async def test_the_official_client_raises_its_own_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, mesh, _), client_of(url) as client:
        with pytest.raises(openai.BadRequestError) as wrong:
            await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
        assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.NotFoundError) as unknown:
            await client.chat.completions.create(model="gpt-9", messages=HELLO)
        assert unknown.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            await client.completions.create(model=MODEL, prompt="a" * 500)
        assert long.value.code == "context_length_exceeded"
        mesh.script = lambda request: refusal(request, "no_eligible_worker")
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as nobody:
                await client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)  # type: ignore[call-overload]
            assert nobody.value.status_code == 503
            assert nobody.value.request_id


async def test_the_official_client_retries_a_refusal_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch, max_attempts=1) as (url, mesh, _), client_of(url, max_retries=1) as client:
        mesh.script = lambda request: refusal(request, "overloaded", True, 0.01) if len(mesh.requests) == 1 else None
        whole = await client.chat.completions.create(model=MODEL, messages=HELLO)
        assert whole.choices[0].message.content == "Hello, world!"
        assert len(mesh.requests) == 2


async def test_an_error_in_mid_stream_reaches_the_official_client(
        monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, mesh, _), client_of(url) as client:

        def script(request: Generate) -> list[Reply]:
            name = request.request_id
            return [Accepted(name, 1, "w1"), Tokens(name, 1, 0, pack([72])),
                    *refusal(request, "invalid_request")]

        mesh.script = script
        seen = []
        with pytest.raises(openai.APIError, match="refused: invalid_request"):
            async for chunk in await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True):
                seen.append(chunk.choices[0].delta.content)
        assert seen == ["", "H"]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_hangs_up_stops_its_worker(
        stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, mesh, _):
        mesh.script = lambda request: [Accepted(request.request_id, 1, "w1"),
                                       Tokens(request.request_id, 1, 0, pack([72]))]
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        body = json.dumps({"model": MODEL, "messages": HELLO, "stream": stream}).encode()
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                     b"content-length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
        if stream:
            await asyncio.wait_for(reader.readuntil(b'"content":"H"'), 5)
        while not mesh.requests:
            await asyncio.sleep(0.01)
        assert not mesh.cancels
        writer.close()
        await asyncio.wait_for(mesh.cancelled.wait(), 5)
        assert (mesh.cancels[0].request_id, mesh.cancels[0].attempt) == (mesh.requests[0].request_id, 1)
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(5):
            while 'status="499"' not in (await client.get(f"{url}/metrics")).text:
                await asyncio.sleep(0.01)


async def test_a_client_that_does_not_read_is_parted_from_and_its_worker_stopped(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.answer.WRITE_S", 0.2)
    async with served(monkeypatch, context=100_000) as (url, mesh, _):
        mesh.says, mesh.batch = b"x" * 90_000, 1
        plug = socket.socket()
        plug.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        plug.connect(("127.0.0.1", httpx.URL(url).port))
        body = json.dumps({"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 90_000}).encode()
        plug.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: "
                     + str(len(body)).encode() + b"\r\n\r\n" + body)
        await asyncio.wait_for(mesh.cancelled.wait(), 30)
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.timeout(5):
            while "mill_gateway_active_streams 0.0" not in (text := (await client.get(f"{url}/metrics")).text):
                await asyncio.sleep(0.01)
        assert 'status="499"' in text
        plug.close()


async def test_tokens_reach_the_client_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, mesh, _), httpx.AsyncClient(trust_env=False) as client:
        go_on = asyncio.Event()
        mesh.script = lambda request: [Accepted(request.request_id, 1, "w1"),
                                       Tokens(request.request_id, 1, 0, pack([72]))]
        body = {"model": MODEL, "messages": HELLO, "stream": True, "max_tokens": 2}
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            async for line in lines:
                if '"content":"H"' in line:
                    go_on.set()
                    break
            assert go_on.is_set()
            request = mesh.requests[0]
            await mesh.reply("g1", Tokens(request.request_id, 1, 1, pack([105])), mesh.finished(request, [72, 105]))
            rest = [line async for line in lines if line]
        assert '"content":"i"' in rest[0] and '"finish_reason":"length"' in rest[1] and rest[2] == "data: [DONE]"


async def test_being_told_to_stop_lets_a_stream_end_and_then_closes_the_port(
        monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(monkeypatch) as (url, mesh, serving), client_of(url) as client:
        mesh.batch, mesh.pause_s = 1, 0.03
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        text = ""
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if text == "Hel":
                serving.cancel()
                await asyncio.sleep(0)
                async with httpx.AsyncClient(trust_env=False) as other:
                    assert (await other.get(f"{url}/ready")).status_code == 503
        assert text == "Hello, world!"
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(serving), 10)
        async with httpx.AsyncClient(trust_env=False) as other:
            with pytest.raises(httpx.ConnectError):
                await other.get(f"{url}/health")


async def test_a_port_in_use_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = GatewaySettings(port=taken.getsockname()[1])
        with pytest.raises(OSError, match=r"cannot listen on 127.0.0.1:\d+ .*choose another with --port"):
            await serve(MemoryBus(MemoryBroker()), settings, LoopClock())


async def test_one_request_is_one_span_and_its_context_travels_to_the_mesh(
        monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    configure = telemetry.configure_tracing
    monkeypatch.setattr(telemetry, "configure_tracing", lambda *args: configure(*args[:2], exporter=exporter))
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with served(monkeypatch) as (url, mesh, _), client_of(url) as client:
        await client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers={
            "traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
        async with asyncio.timeout(5):
            while not exporter.get_finished_spans():
                await asyncio.sleep(0.01)
        (span,) = exporter.get_finished_spans()
        assert (span.name, span.kind.name) == (f"chat {MODEL}", "SERVER")
        assert f"{span.context.trace_id:032x}" == trace and span.parent and span.parent.span_id == 0xF067AA0BA902B7
        assert mesh.headers[0]["traceparent"] == f"00-{trace}-{span.context.span_id:016x}-01"
        assert [event.name for event in span.events] == ["first_token", "last_token"]
        told = dict(span.attributes or {})
        assert told["gen_ai.usage.output_tokens"] == 14 and told["gen_ai.response.finish_reasons"] == ("stop",)
        assert told["gen_ai.operation.name"] == "chat" and told["mill.worker"] == "w1"
        assert not any("Hi" in str(value) or "Hello" in str(value) for value in told.values())


async def test_logs_and_latencies_name_the_trace_of_their_request(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    configure = telemetry.configure_tracing
    monkeypatch.setattr(telemetry, "configure_tracing",
                        lambda *args: configure(*args[:2], exporter=InMemorySpanExporter()))
    telemetry.configure_logging("gateway", "g1", "json")
    try:
        async with served(monkeypatch) as (url, mesh, _), client_of(url) as client:
            await client.chat.completions.create(model=MODEL, messages=HELLO, extra_headers={
                "traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
            async with httpx.AsyncClient(trust_env=False) as plain:
                asked = {"accept": "application/openmetrics-text;version=1.0.0"}
                figures = await plain.get(f"{url}/metrics", headers=asked)
                assert "trace_id" not in (await plain.get(f"{url}/metrics")).text
            span = mesh.headers[0]["traceparent"].split("-")[2]
    finally:
        structlog.reset_defaults()
    said = [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    [ended] = [line for line in said if line["event"] == "request_ended"]
    assert (ended["trace_id"], ended["span_id"]) == (trace, span)
    assert figures.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    linked = f'# {{span_id="{span}",trace_id="{trace}"}}'
    for name in ("gen_ai_server_request_duration_seconds", "gen_ai_server_time_to_first_token_seconds",
                 "mill_time_to_first_token_seconds", "mill_time_per_output_token_seconds"):
        [line] = [line for line in figures.text.splitlines() if line.startswith(f"{name}_bucket") and " # " in line]
        assert sorted(linked[3:-1].split(",")) == sorted(line.split("# ")[1].split("}")[0][1:].split(","))


async def test_a_request_that_is_refused_late_is_logged_with_its_trace(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    telemetry.configure_logging("gateway", "g1", "json")
    try:
        async with served(monkeypatch) as (url, mesh, _), httpx.AsyncClient(trust_env=False) as client:
            mesh.script = lambda request: refusal(request, "no_eligible_worker")
            body = {"model": MODEL, "messages": HELLO}
            for headers in ({"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}, {}):
                await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    finally:
        structlog.reset_defaults()
    said = [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    first, second = [line for line in said if line["event"] == "request_refused"]
    assert first["trace_id"] == trace and "trace_id" not in second

async def test_the_port_of_the_figures_has_probes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    async with served(monkeypatch, metrics_port=port), httpx.AsyncClient(trust_env=False) as client:
        page = f"http://127.0.0.1:{port}"
        assert [(await client.get(page + path)).status_code for path in ("/health", "/ready")] == [200, 200]
        text = (await client.get(f"{page}/metrics")).text
        assert text.count("# HELP mill_gateway_active_streams ") == 1 and text.count("# HELP python_info ") == 1
