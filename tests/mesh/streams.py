"""A client's view of one stream, with a hook that runs when so many chunks have been read."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from deploy.local_mesh import LocalMesh

Hook = Callable[[], Awaitable[None]]


class Refused(AssertionError):
    """An answer other than 200, before anything was streamed: its body."""


@dataclass
class Stream:
    """What a client read."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    chunks: int = 0


async def read(
    url: str, body: dict[str, Any], at_chunk: int = 0, hook: Hook | None = None, headers: dict[str, str] | None = None
) -> Stream:
    """Stream a chat completion to its end; call `hook` once when `at_chunk` chunks with text have come."""
    seen = Stream()
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with (
        httpx.AsyncClient(timeout=90.0, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response,
    ):
        if response.status_code != 200:
            raise Refused(await response.aread())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            seen.usage = event.get("usage") or seen.usage
            for choice in event["choices"]:
                seen.finish_reason = choice["finish_reason"] or seen.finish_reason
                if piece := choice["delta"].get("content"):
                    seen.text += piece
                    seen.chunks += 1
                    if seen.chunks == at_chunk and hook is not None:
                        await hook()
    return seen


async def until_there(mesh: LocalMesh, workers: int, routers: int) -> None:
    """Until the gateway sees so many workers and routers."""
    async with asyncio.timeout(60), httpx.AsyncClient(trust_env=False) as client:
        while True:
            ready = (await client.get(f"{mesh.url}/ready")).json()
            if len(ready.get("workers", ())) == workers and len(ready.get("routers", ())) == routers:
                return
            await asyncio.sleep(0.1)


async def serving(mesh: LocalMesh) -> str:
    """The worker that has a stream running."""
    async with asyncio.timeout(10), httpx.AsyncClient(trust_env=False) as client:
        while True:
            workers = (await client.get(f"{mesh.url}/ready")).json()["workers"]
            busy = [worker["id"] for worker in workers if worker["running"]]
            if busy:
                return str(busy[0])
            await asyncio.sleep(0.05)


def chat(model: str, content: str, max_tokens: int = 96, **more: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": 0,
        "messages": [{"role": "user", "content": content}],
    } | more
