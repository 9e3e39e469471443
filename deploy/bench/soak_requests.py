"""Clients of every kind for the soak: what they send, how they behave, and how each request ended.

    stream, plain, choices, text, shared     requests that are answered whole: exactly one end for each choice
    witness                                  one of five greedy requests, whose text must never change
    cancel, leave                            gone in mid-stream, or before the first word
    slow, stalled                            reads a little now and then; stops reading and hangs up
    bad                                      one of BAD, each with the status that it must be refused with
    deadline                                 a request on the bus with next to no time, as a gateway in a hurry sends it

Rule: a request that does not end as its kind must raises Wrong with a sentence; what a kind may end as is its outcome.
Random in everything, from the caller's generator alone.
"""

import asyncio
import json
import random
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from deploy.bench import prompts
from shared import subjects
from shared.bus import Bus, Delivery
from shared.messages import Cancel, Failed, Finished, Generate, StepReplies, decode, encode
from shared.tokens import pack

SHARED_PREFIXES = 6
PREFIX_SENTENCES = 16  # about 300 tokens
WITNESSES = 5
OUTPUT_TOKENS = (1, 64)  # short ones are more frequent
SMALL_BUFFER_BYTES = 4096
FILLED_AT_ONCE = 32
SAID_AT_ONCE = 2000
HURRIED_GATEWAY = "soak-in-a-hurry"

Body = dict[str, Any]


class Wrong(Exception):
    """A request did not end as it must."""


class BadCase:
    """One request that must be refused: how it is written and with which status."""

    def __init__(self, name: str, status: int, body: Body | bytes, path: str = "/v1/chat/completions",
                 method: str = "POST") -> None:
        self.name, self.status, self.path, self.method = name, status, path, method
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def _chat(**other: Any) -> Body:
    return {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 4} | other


BAD = [
    BadCase("broken JSON", 400, b'{"messages": [{"role": "user", "conte'),
    BadCase("no body", 400, b""),
    BadCase("a list", 400, b"[1, 2, 3]"),
    BadCase("no UTF-8", 400, b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}'),
    BadCase("deep nesting", 400, b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
    BadCase("unknown model", 404, _chat(model="no-such-model")),
    BadCase("no messages", 400, {"max_tokens": 4}),
    BadCase("messages of a wrong type", 400, _chat(messages="hello")),
    BadCase("negative max_tokens", 400, _chat(max_tokens=-1)),
    BadCase("max_tokens in words", 400, _chat(max_tokens="ten")),
    BadCase("temperature 9", 400, _chat(temperature=9)),
    BadCase("top_p 0", 400, _chat(top_p=0)),
    BadCase("no choices", 400, _chat(n=0)),
    BadCase("a thousand choices", 400, _chat(n=1000)),
    BadCase("empty stop string", 400, _chat(stop=["a", ""])),
    BadCase("seed too large", 400, _chat(seed=1 << 70)),
    BadCase("priority too high", 400, _chat(priority=1000)),
    BadCase("logprobs", 400, _chat(logprobs=3)),
    BadCase("unknown format", 400, _chat(response_format={"type": "xml"})),
    BadCase("too long a prompt", 400, _chat(messages=[{"role": "user", "content": "water and salt " * 4000}])),
    BadCase("token outside the vocabulary", 400, {"prompt": [1, 1 << 30], "max_tokens": 4}, "/v1/completions"),
    BadCase("empty prompt", 400, {"prompt": [], "max_tokens": 4}, "/v1/completions"),
    BadCase("wrong method", 405, b"", method="GET"),
    BadCase("unknown path", 404, _chat(), "/v1/nothing"),
]


@dataclass
class Mesh:
    """What the clients share."""

    host: str
    port: int
    witnesses: dict[int, str] = field(default_factory=dict)  # what each said the first time


def kinds(hurry: "Hurry") -> dict[str, tuple[float, Callable[[Mesh, random.Random], Awaitable[str]]]]:
    """Name -> how often, relative to the others, and the client; it returns the outcome or raises Wrong."""
    return {
        "stream": (24, _stream), "plain": (14, _plain), "choices": (3, _choices), "text": (8, _text),
        "shared": (14, _shared), "witness": (6, _witness), "cancel": (12, _cancel), "leave": (5, _leave),
        "slow": (3, _slow), "stalled": (1, _stalled), "bad": (14, _bad), "deadline": (4, hurry.send),
    }


# --- answered whole --------------------------------------------------------------------------------------------------


async def _stream(mesh: Mesh, chooser: random.Random) -> str:
    await _read_events(mesh, _body(chooser) | {"stream": True, "stream_options": {"include_usage": True}})
    return "done"


async def _plain(mesh: Mesh, chooser: random.Random) -> str:
    await _read_whole(mesh, _body(chooser))
    return "done"


async def _choices(mesh: Mesh, chooser: random.Random) -> str:
    stream = chooser.random() < 0.5
    body = _body(chooser) | {"n": chooser.randint(2, 4), "stream": stream}
    await (_read_events if stream else _read_whole)(mesh, body)
    return "done"


async def _text(mesh: Mesh, chooser: random.Random) -> str:
    """Several prompts of token ids at once, or one of text with a stop string."""
    body = _options(chooser)
    if chooser.random() < 0.5:
        ids = [[chooser.randrange(1000, 40_000) for _ in range(chooser.randint(1, 200))]
               for _ in range(chooser.randint(1, 3))]
        body |= {"prompt": ids, "n": 1}
        await _read_whole(mesh, body, choices=len(ids), path="/v1/completions")
    else:
        body |= {"prompt": prompts.words(chooser.getrandbits(32), 4), "stop": [" the", "."], "stream": True}
        await _read_events(mesh, body, path="/v1/completions")
    return "done"


async def _shared(mesh: Mesh, chooser: random.Random) -> str:
    prefix = prompts.words(chooser.randrange(SHARED_PREFIXES), PREFIX_SENTENCES)
    question = prompts.words(chooser.getrandbits(32), chooser.randint(1, 3))
    messages = [{"role": "system", "content": prefix}, {"role": "user", "content": question}]
    await _read_events(mesh, _options(chooser) | {"messages": messages, "stream": True})
    return "done"


async def _witness(mesh: Mesh, chooser: random.Random) -> str:
    number = chooser.randrange(WITNESSES)
    body = {"messages": [{"role": "user", "content": prompts.words(77_000 + number, 3 + 2 * number)}],
            "temperature": 0.0 if number % 2 else 0.8, "seed": number, "max_tokens": 32, "ignore_eos": True}
    if chooser.random() < 0.5:
        text = await _read_events(mesh, body | {"stream": True})
    else:
        text = await _read_whole(mesh, body)
    if (first := mesh.witnesses.setdefault(number, text)) != text:
        raise Wrong(f"witness {number} said {text!r}, and before {first!r}")
    return "same"


# --- clients that leave or dawdle ------------------------------------------------------------------------------------


async def _cancel(mesh: Mesh, chooser: random.Random) -> str:
    """Leaves after some events of a long answer, by the rules or with a reset."""
    body = _body(chooser) | {"stream": True, "max_tokens": 200, "ignore_eos": True, "n": chooser.choice([1, 1, 1, 3])}
    reader, writer = await _send(mesh, "POST", "/v1/chat/completions", json.dumps(body).encode())
    try:
        for _ in range(chooser.randint(2, 60)):
            if not await reader.readline():
                raise Wrong("the stream ended before its client left")
    finally:
        _hang_up(writer, chooser)
    return "left"


async def _leave(mesh: Mesh, chooser: random.Random) -> str:
    """Gone within 0.3 s: often before the first token, sometimes before the whole request was sent."""
    data = json.dumps(_body(chooser) | {"stream": chooser.random() < 0.5, "max_tokens": 200}).encode()
    sent = len(data) if chooser.random() < 0.7 else chooser.randrange(len(data))
    _, writer = await _send(mesh, "POST", "/v1/chat/completions", data, sent)
    try:
        await asyncio.sleep(0.3 * chooser.random() ** 2)
    finally:
        _hang_up(writer, chooser)
    return "left"


async def _slow(mesh: Mesh, chooser: random.Random) -> str:
    """Reads a little, then rests; gets everything all the same."""
    body = _body(chooser) | {"stream": True, "n": 4, "max_tokens": 64, "ignore_eos": True}
    await _read_events(mesh, body, rest_s=0.002 + 0.01 * chooser.random(), small=True)
    return "done"


async def _stalled(mesh: Mesh, chooser: random.Random) -> str:
    """Never reads and hangs up after a while."""
    body = _body(chooser) | {"stream": True, "n": 4, "max_tokens": 256, "ignore_eos": True}
    _, writer = await _send(mesh, "POST", "/v1/chat/completions", json.dumps(body).encode(), small=True)
    try:
        await asyncio.sleep(4 * chooser.random())
    finally:
        _hang_up(writer, chooser)
    return "left"


# --- refused ---------------------------------------------------------------------------------------------------------


async def _bad(mesh: Mesh, chooser: random.Random) -> str:
    case = chooser.choice(BAD)
    reader, writer = await _send(mesh, case.method, case.path, case.body)
    try:
        status, data = await _head(reader), await reader.read()
    finally:
        writer.close()
    if status != case.status:
        raise Wrong(f"{case.name}: status {status} instead of {case.status}: {data[:300]!r}")
    error = json.loads(data).get("error", {})
    if not error.get("message") or not error.get("code"):
        raise Wrong(f"{case.name}: an error without message or code: {data[:300]!r}")
    return f"refused {status}"


class Hurry:
    """A gateway of its own on the bus, whose requests have so little time that most end by their deadline."""

    def __init__(self, bus: Bus, model: str) -> None:
        self._bus, self._model = bus, model
        self._open: dict[str, asyncio.Future[Finished | Failed]] = {}
        self._sent = 0
        self.wrong: list[str] = []  # what a handler on the bus cannot raise

    async def listen(self) -> None:
        await self._bus.subscribe(subjects.replies(HURRIED_GATEWAY), self._hear)

    def _hear(self, delivery: Delivery) -> None:
        for reply in decode(delivery.data, StepReplies).replies:
            if isinstance(reply, Finished | Failed):
                waiter = self._open.get(reply.request_id)
                if waiter is None or waiter.done():
                    self.wrong.append(f"{reply.request_id} ended a second time: {reply}")
                else:
                    waiter.set_result(reply)

    async def fill(self, requests: int, worker: str) -> None:
        """Have so many requests and their cancels remembered by whoever does: they ask for no token and cost little."""
        for first in range(0, requests, FILLED_AT_ONCE):
            names = [f"filler-{number}" for number in range(first, min(first + FILLED_AT_ONCE, requests))]
            for name in names:
                self._open[name] = asyncio.get_running_loop().create_future()
                request = Generate(name, 1, HURRIED_GATEWAY, self._model, pack([1000]), 0, time.time() + 60.0)
                await self._bus.publish(subjects.generate(self._model), encode(request))
            for name in names:
                await self._open[name]
                del self._open[name]
                await self._bus.publish(subjects.worker_cancel(worker), encode(Cancel(name, 1)))

    async def fill_drafter(self, tokens: int) -> None:
        """Have so many tokens remembered as what streams have said: their answers come all but finished."""
        chooser = random.Random(0)
        while tokens > 0:
            name = f"said-{tokens}"
            said = [chooser.randrange(1000, 40_000) for _ in range(min(SAID_AT_ONCE, tokens))]
            waiter = self._open[name] = asyncio.get_running_loop().create_future()
            request = Generate(name, 1, HURRIED_GATEWAY, self._model, pack([1000]), len(said) + 1, time.time() + 60.0,
                               generated=pack(said))
            await self._bus.publish(subjects.generate(self._model), encode(request))
            if not isinstance(await waiter, Finished):
                raise Wrong(f"{name} ended as {waiter.result()}")
            tokens -= len(said)

    async def send(self, mesh: Mesh, chooser: random.Random) -> str:
        self._sent += 1
        name = f"hurried-{self._sent}"
        waiter = self._open[name] = asyncio.get_running_loop().create_future()
        tokens = [chooser.randrange(1000, 40_000) for _ in range(chooser.randint(1, 400))]
        request = Generate(name, 1, HURRIED_GATEWAY, self._model, pack(tokens), chooser.randint(*OUTPUT_TOKENS),
                           time.time() + 4 * chooser.random() ** 2, priority=chooser.randint(-1, 1))
        await self._bus.publish(subjects.generate(self._model), encode(request))
        reply = await waiter
        if isinstance(reply, Finished):
            return "done in time"
        if reply.code not in ("deadline_exceeded", "overloaded"):
            raise Wrong(f"a request with a short deadline ended as {reply.code}: {reply.message}")
        return str(reply.code)


# --- HTTP ------------------------------------------------------------------------------------------------------------


def _body(chooser: random.Random) -> Body:
    """A chat request; short prompts are more frequent than long ones."""
    sentences = round(2 ** chooser.uniform(0.0, 5.0))
    turns = [{"role": "user", "content": prompts.words(chooser.getrandbits(32), sentences)}]
    return _options(chooser) | {"messages": turns}


def _options(chooser: random.Random) -> Body:
    return {
        "max_tokens": round(OUTPUT_TOKENS[1] ** chooser.random()), "temperature": chooser.choice([0.0, 0.7, 1.0]),
        "top_p": chooser.choice([1.0, 0.9]), "top_k": chooser.choice([0, 0, 40]), "seed": chooser.getrandbits(32),
        "ignore_eos": chooser.random() < 0.5, "priority": chooser.choice([0, 0, 0, -1, 1]),
    }


async def _send(mesh: Mesh, method: str, path: str, data: bytes, sent: int | None = None,
                small: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request, or its first `sent` bytes of body. `small`: with a small buffer for what comes back."""
    place = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    place.setblocking(False)
    if small:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER_BYTES)
    try:
        await asyncio.get_running_loop().sock_connect(place, (mesh.host, mesh.port))
        reader, writer = await asyncio.open_connection(sock=place, limit=2 * SMALL_BUFFER_BYTES if small else 1 << 16)
    except BaseException:
        place.close()
        raise
    head = f"{method} {path} HTTP/1.1\r\nhost: {mesh.host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data[:sent])
    return reader, writer


def _hang_up(writer: asyncio.StreamWriter, chooser: random.Random) -> None:
    if chooser.random() < 0.5:
        writer.transport.abort()
    else:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> int:
    """The status; the reader then stands at the body."""
    line = await reader.readline()
    if not line.startswith(b"HTTP/1.1 "):
        raise Wrong(f"no HTTP answer: {line[:80]!r}")
    while (await reader.readline()).strip():
        pass
    return int(line.split()[1])


async def _read_whole(mesh: Mesh, body: Body, choices: int = 0, path: str = "/v1/chat/completions") -> str:
    """The text of a plain answer that has an end for each choice."""
    reader, writer = await _send(mesh, "POST", path, json.dumps(body).encode())
    try:
        status, data = await _head(reader), await reader.read()
    finally:
        writer.close()
    if status != 200:
        raise Wrong(f"status {status}: {data[:300]!r}")
    answer = json.loads(data)
    wanted = choices or body.get("n", 1)
    ends = [choice["finish_reason"] for choice in answer["choices"]]
    if len(ends) != wanted or not set(ends) <= {"stop", "length"}:
        raise Wrong(f"{wanted} choices were wanted, their ends are {ends}")
    texts: list[str] = [choice.get("text") or choice.get("message", {}).get("content") or ""
                        for choice in answer["choices"]]
    return "".join(texts)


async def _read_events(mesh: Mesh, body: Body, path: str = "/v1/chat/completions", rest_s: float = 0.0,
                       small: bool = False) -> str:
    """The text of a stream that ends once: one reason for each choice, nothing behind it, and one [DONE]."""
    reader, writer = await _send(mesh, "POST", path, json.dumps(body).encode(), small=small)
    text: list[str] = []
    ends: dict[int, str] = {}
    done = 0
    try:
        if (status := await _head(reader)) != 200:
            raise Wrong(f"status {status}: {(await reader.read())[:300]!r}")
        while line := await reader.readline():
            if rest_s:
                await asyncio.sleep(rest_s)
            if line.startswith(b"data: [DONE]"):
                done += 1
            elif line.startswith(b"data: "):
                event = json.loads(line[6:])
                if done or "error" in event:
                    raise Wrong(f"an event behind the end, or an error: {line[:300]!r}")
                for choice in event.get("choices", ()):
                    if choice["index"] in ends:
                        raise Wrong(f"choice {choice['index']} went on behind its end: {line[:300]!r}")
                    text.append(choice.get("text") or choice.get("delta", {}).get("content") or "")
                    if choice.get("finish_reason"):
                        ends[choice["index"]] = choice["finish_reason"]
    finally:
        writer.close()
    if done != 1 or len(ends) != body.get("n", 1):
        raise Wrong(f"{done} [DONE] and these ends: {ends}")
    return "".join(text)
