"""A load of SSE streams on an OpenAI endpoint, on raw sockets so that the client costs little.

Counts what a client sees: the time to the first text, the time between chunks, tokens by the server's own usage.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Mill(msgspec.Struct):
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    mill: _Mill | None = None


class _Error(msgspec.Struct):
    message: str = ""


class _Event(msgspec.Struct):
    """Of a chunk only what is counted: the client must not be what a benchmark waits for."""

    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: _Error | None = None


_decode = msgspec.json.Decoder(_Event).decode


@dataclass
class Load:
    """What one run of streams saw. Times in seconds."""

    wall_s: float = 0.0
    cpu_s: float = 0.0  # of the client
    ttft_s: list[float] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    tpot_s: list[float] = field(default_factory=list)  # of each stream of two tokens or more: its mean behind the first
    e2e_s: list[float] = field(default_factory=list)
    chunks: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_draft_tokens: int = 0
    lengths: dict[int, int] = field(default_factory=dict)  # request number -> tokens of its answer
    failures: list[str] = field(default_factory=list)
    texts: dict[int, str] = field(default_factory=dict)  # request number -> what it said


async def run(url: str, bodies: Sequence[dict[str, object]], streams: int, timeout_s: float = 300.0,
              key: str = "") -> Load:
    """Send `bodies` (chat or completion requests), `streams` at a time, with the `key` of a tenant if there is one.

    Raises TimeoutError after `timeout_s`, ValueError for a `url` that is none.
    """
    load = Load()
    where = endpoint(url)
    todo = iter(enumerate(bodies))

    async def lane() -> None:
        for number, body in todo:
            try:
                await _one(where, number, body, load, key)
            except (OSError, asyncio.IncompleteReadError) as error:
                load.failures.append(repr(error))

    start, cpu = time.perf_counter(), time.process_time()
    async with asyncio.timeout(timeout_s):
        await asyncio.gather(*(lane() for _ in range(streams)))
    load.wall_s, load.cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return load


class Endpoint(NamedTuple):
    """Where an API is; `path` stands before `/v1`."""

    host: str
    port: int
    tls: bool
    path: str


def endpoint(url: str) -> Endpoint:
    """The parts of an address, with `/v1` at its end or without. Raises ValueError."""
    parts = urlsplit(url)
    tls = parts.scheme == "https"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of an API: write http://HOST:PORT")
    return Endpoint(parts.hostname, parts.port or (443 if tls else 80), tls,
                    parts.path.rstrip("/").removesuffix("/v1"))


async def _one(where: Endpoint, number: int, body: dict[str, object], load: Load, key: str) -> None:
    host = where.host
    path = where.path + ("/v1/chat/completions" if "messages" in body else "/v1/completions")
    data = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection(host, where.port, ssl=where.tls or None)
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    if key:
        head += f"authorization: Bearer {key}\r\n"
    start = time.perf_counter()
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    status = (await reader.readline()).split()[1].decode()
    text, first, last, tokens = [], None, None, 0
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            if status != "200" and line.startswith(b"{"):
                load.failures.append(f"{status} {line.decode()}")
            continue
        now = time.perf_counter()
        event = _decode(line[6:])
        if event.error is not None:
            load.failures.append(event.error.message)
        if event.usage is not None:
            tokens = load.lengths[number] = event.usage.completion_tokens
            details, mill = event.usage.prompt_tokens_details, event.usage.mill or _Mill()
            load.cached_tokens += (details and details.cached_tokens) or 0
            load.prompt_tokens += event.usage.prompt_tokens
            load.draft_tokens += mill.draft_tokens
            load.accepted_draft_tokens += mill.accepted_draft_tokens
        for choice in event.choices:
            if piece := choice.text or (choice.delta and choice.delta.content):
                text.append(piece)
                load.chunks += 1
                if first is None or last is None:
                    first = now
                    load.ttft_s.append(now - start)
                else:
                    load.itl_s.append(now - last)
                last = now
    writer.close()
    load.texts[number] = "".join(text)
    load.completion_tokens += tokens
    if first is not None and last is not None:
        load.e2e_s.append(last - start)
        if tokens > 1:
            load.tpot_s.append((last - first) / (tokens - 1))


def percentile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The value below which `share` of `seconds` lie, in milliseconds; None of nothing."""
    ordered = sorted(seconds)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3) if ordered else None
