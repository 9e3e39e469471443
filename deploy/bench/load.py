"""A load of SSE streams on an OpenAI endpoint, on raw sockets so that the client costs little.

Counts what a client sees: the time to the first text, the time between chunks, tokens by the server's own usage.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Load:
    """What one run of streams saw. Times in seconds."""

    wall_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    e2e_s: list[float] = field(default_factory=list)
    chunks: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    failures: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)  # request number -> what it said


async def run(url: str, bodies: Sequence[dict[str, object]], streams: int, timeout_s: float = 300.0) -> Load:
    """Send `bodies` (chat or completion requests), `streams` at a time. Raises TimeoutError after `timeout_s`."""
    load = Load()
    host, port = url.removeprefix("http://").split(":")
    todo = iter(enumerate(bodies))

    async def lane() -> None:
        for number, body in todo:
            try:
                await _one(host, int(port), number, body, load)
            except (OSError, asyncio.IncompleteReadError) as error:
                load.failures.append(repr(error))

    start = time.perf_counter()
    async with asyncio.timeout(timeout_s):
        await asyncio.gather(*(lane() for _ in range(streams)))
    load.wall_s = time.perf_counter() - start
    return load


async def _one(host: str, port: int, number: int, body: dict[str, object], load: Load) -> None:
    path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    start = time.perf_counter()
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    status = (await reader.readline()).split()[1].decode()
    text, last = [], None
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            if status != "200" and line.startswith(b"{"):
                load.failures.append(f"{status} {line.decode()}")
            continue
        now = time.perf_counter()
        event = json.loads(line[6:])
        if "error" in event:
            load.failures.append(event["error"]["message"])
        if usage := event.get("usage"):
            load.completion_tokens += usage["completion_tokens"]
            load.cached_tokens += (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        for choice in event.get("choices", ()):
            piece = choice.get("text") or choice.get("delta", {}).get("content")
            if piece:
                text.append(piece)
                load.chunks += 1
                if last is None:
                    load.ttft_s.append(now - start)
                else:
                    load.itl_s.append(now - last)
                last = now
    writer.close()
    load.texts[number] = "".join(text)
    if last is not None:
        load.e2e_s.append(last - start)


def percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The value below which `share` of `seconds` lie, in milliseconds; None of nothing."""
    ordered = sorted(seconds)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
