"""Streams over a real connection: the short way to the socket gives the same bytes as the long one."""

import asyncio
import contextlib
import gc
import gzip
import json
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gateway import direct
from gateway.answer import Answer
from gateway.service import Gateway, _serve_http
from gateway.streams import Stream
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Accepted, Finished, Generate, Reply, Tokens
from shared.settings import GatewaySettings
from shared.tokens import pack
from tests.gateway.fake_mesh import FakeMesh, tiny_model

BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": 40, "temperature": 0,
        "stream_options": {"include_usage": True}}


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[str, FakeMesh]]:
    """A gateway on a port of its own, and the mesh that answers it."""
    broker = MemoryBroker()
    gateway = Gateway(MemoryBus(broker), GatewaySettings(id="g1"), LoopClock(), tiny_model())
    mesh = FakeMesh(broker)
    ready = asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with gateway.running(), asyncio.TaskGroup() as tasks:
            await mesh.start()
            serving = tasks.create_task(_serve_http(gateway, listener, ready))
            await ready.wait()
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", mesh
            serving.cancel()


async def said(url: str, **more: object) -> dict[int, str]:
    """The text of each choice; every event has to be whole JSON and the last one `[DONE]`."""
    texts: dict[int, str] = {}
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        answer = await client.post("/v1/chat/completions", json=BODY | more)
    assert answer.status_code == 200
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    for event in events:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["delta"].get("content", "")
    return texts


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What every direct write answered."""
    answers: list[bool] = []
    write = direct.DirectBody.write

    def noted(self: direct.DirectBody, data: bytes) -> bool:
        answers.append(write(self, data))
        return answers[-1]

    monkeypatch.setattr(direct.DirectBody, "write", noted)
    return answers


async def test_the_middle_of_a_stream_goes_to_the_socket_and_the_text_is_whole(written: list[bool]) -> None:
    async with served() as (url, mesh):
        mesh.says, mesh.batch, mesh.pause_s = "Grüße, 世界! 🦀 and more".encode(), 1, 0.001
        assert await said(url) == {0: "Grüße, 世界! 🦀 and more"}
    assert written.count(True) > 10


async def test_several_choices_and_a_stop_string_end_as_they_should(written: list[bool]) -> None:
    async with served() as (url, mesh):
        mesh.says, mesh.batch, mesh.pause_s = b"one two three four", 1, 0.001
        assert await said(url, n=2, stop=[" three"]) == {0: "one two", 1: "one two"}
    assert any(written)


async def test_where_the_connection_takes_nothing_the_long_way_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct.DirectBody, "write", lambda self, data: False)
    async with served() as (url, mesh):
        mesh.says, mesh.batch, mesh.pause_s = b"one two three four", 1, 0.001
        assert await said(url) == {0: "one two three four"}


async def test_tokens_and_the_end_in_messages_that_arrive_together_lose_nothing() -> None:
    def script(request: Generate) -> list[Reply]:
        name, attempt = request.request_id, request.attempt
        return [Accepted(name, attempt, "w1"), *(Tokens(name, attempt, i, pack([65 + i])) for i in range(20)),
                Finished(name, attempt, "length", "w1", 3, 0, 20)]

    async with served() as (url, mesh):
        mesh.script = script
        assert await said(url, max_tokens=20) == {0: "ABCDEFGHIJKLMNOPQRST"}


async def test_an_error_on_the_short_way_ends_the_stream_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    write = direct.DirectBody.write

    def breaks(self: direct.DirectBody, data: bytes) -> bool:
        monkeypatch.setattr(direct.DirectBody, "write", write)
        raise RuntimeError("broken on purpose")

    async with served() as (url, mesh):
        mesh.says, mesh.batch, mesh.pause_s = b"one two three four", 1, 0.001
        monkeypatch.setattr(direct.DirectBody, "write", breaks)
        with pytest.raises(httpx.RemoteProtocolError):
            await said(url)
        assert await said(url) == {0: "one two three four"}


async def test_a_client_that_hangs_up_in_the_middle_stops_its_worker() -> None:
    async with served() as (url, mesh):
        mesh.says, mesh.batch, mesh.pause_s = b"one two three four " * 20, 1, 0.01
        async with (httpx.AsyncClient(base_url=url, trust_env=False) as client,
                    client.stream("POST", "/v1/chat/completions", json=BODY | {"max_tokens": 300}) as answer):
            async for _ in answer.aiter_bytes():
                break
        async with asyncio.timeout(5.0):
            await mesh.cancelled.wait()
        assert len(mesh.cancels) == 1


async def test_a_request_that_has_ended_leaves_nothing_to_the_collector() -> None:
    """It did: a gateway under 256 streams stood still for a quarter of a second whenever that was collected."""
    def left() -> list[object]:
        return [each for each in gc.get_objects() if isinstance(each, Answer | Stream | RequestResponseCycle)]

    async with served() as (url, mesh):
        mesh.says, mesh.batch, mesh.pause_s = b"one two three four", 1, 0.001
        gc.collect()
        gc.disable()
        try:
            assert await said(url) == {0: "one two three four"}
            assert await said(url, n=2, stop=[" three"]) == {0: "one two", 1: "one two"}
            async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
                whole = await client.post("/v1/chat/completions", json=BODY | {"stream": False, "stream_options": None})
                refused = await client.post("/v1/chat/completions", json=BODY | {"temperature": -1})
            assert (whole.status_code, refused.status_code) == (200, 400)
            async with asyncio.timeout(10):
                while left():
                    await asyncio.sleep(0.01)  # the connections' own ends
        finally:
            gc.enable()


async def over_a_socket(url: str, *pieces: bytes, wait_s: float = 0.0) -> bytes:
    """What a gateway says to these bytes until it ends the connection."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    with contextlib.suppress(ConnectionError):  # it may end while there is still more to say
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(wait_s)
    said = b""
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(10):
            said = await reader.read()
    writer.close()
    return said


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nconnection: close\r\n"


@pytest.mark.parametrize("head", [HEAD + (b"x-more: " + b"a" * 8000 + b"\r\n") * 9, HEAD + b"x-more: " + b"a" * 70_000,
                                  b"GET /" + b"a" * 70_000])
async def test_a_head_without_end_is_431_and_ends_its_connection(head: bytes) -> None:
    async with served() as (url, _):
        answer = await over_a_socket(url, head)
        assert answer.startswith(b"HTTP/1.1 431 ") and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert await said(url) == {0: "Hello, world!"}


async def test_more_headers_than_anybody_sends_end_the_connection() -> None:
    async with served() as (url, _):
        many = b"".join(b"a%d: b\r\n" % number for number in range(direct.MAX_HEADERS + 10))
        assert not (await over_a_socket(url, HEAD + many)).startswith(b"HTTP/1.1 200 ")
        assert await said(url) == {0: "Hello, world!"}


@pytest.mark.parametrize("pieces", [[], [b"POST /v1/ch"], [HEAD, b"x: y\r\n"],
                                    [b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n", b"GET /health HT"]])
async def test_a_head_that_does_not_come_to_its_end_ends_its_connection(
        pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "HEAD_S", 0.2)
    async with served() as (url, _):
        answer = await over_a_socket(url, *pieces, wait_s=0.05)
        assert (b"HTTP/1.1 408 " in answer) == bool(pieces)
        assert await said(url) == {0: "Hello, world!"}


async def test_a_compressed_body_is_not_opened() -> None:
    async with served() as (url, _):
        bomb = gzip.compress(bytes(64 << 20))
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            answer = await client.post("/v1/chat/completions", content=bomb, headers={"content-encoding": "gzip"})
        assert answer.status_code == 400 and answer.json()["error"]["message"]


async def test_a_body_in_chunks_without_end_is_413() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * (1 << 17)

    async with served() as (url, _), httpx.AsyncClient(base_url=url, trust_env=False) as client:
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            answer = await client.post("/v1/chat/completions", content=chunks())
            assert answer.status_code == 413
        assert await said(url) == {0: "Hello, world!"}
