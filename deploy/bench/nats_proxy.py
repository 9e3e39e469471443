"""A connection to NATS seen message by message: delayed, lost, doubled, put in another order.

    async with NatsProxy(port_of_the_server, Weather(delay_s=0.01)) as proxy:
        ... a service with --nats proxy.url is ten milliseconds away, each way

Rules: what is no message, and messages whose subject `weather.touches` does not hold, are only delayed and stay in
their order; a message is never cut. `weather` may be replaced at any time, for what comes from then on.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

# with these a payload follows; its size is the last word
WITH_PAYLOAD = (b"PUB ", b"HPUB ", b"MSG ", b"HMSG ")
# a connection that lags behind by so many messages reads no more until some have left
MOST_WAITING = 10_000


@dataclass(frozen=True)
class Weather:
    """What becomes of messages. Chances from 0 to 1, times in seconds each way."""

    delay_s: float = 0.0  # of everything
    touches: str = ""  # part of a subject; only such messages are lost, doubled or reordered
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    reorder_s: float = 0.0  # a reordered message comes up to so much later, past those behind it


class NatsProxy:
    """Listens on a loopback port of its own while the block runs."""

    def __init__(self, server_port: int, weather: Weather, seed: int = 0) -> None:
        self.weather = weather
        self.lost = self.doubled = self.reordered = 0
        self._server_port = server_port
        self._rng = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"nats://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    @property
    def faults(self) -> int:
        return self.lost + self.doubled + self.reordered

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._start(self._connection(reader, writer))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
            try:
                # whoever hangs up first ends both ways
                ways = [asyncio.ensure_future(self._one_way(*way)) for way in
                        ((reader, far_writer), (far_reader, writer))]
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
            finally:
                far_writer.close()
        writer.close()

    async def _one_way(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_WAITING)
        leaving = asyncio.ensure_future(_leave(waiting, writer))
        try:
            async for subject, frame in frames(reader):
                await self._send(subject, frame, waiting, writer)
        finally:
            leaving.cancel()

    async def _send(self, subject: str, frame: bytes, waiting: "asyncio.Queue[tuple[float, bytes]]",
                    writer: asyncio.StreamWriter) -> None:
        weather, rng = self.weather, self._rng
        due = asyncio.get_running_loop().time() + weather.delay_s
        if weather.touches and weather.touches in subject:
            if rng.random() < weather.loss:
                self.lost += 1
                return
            if rng.random() < weather.duplication:
                self.doubled += 1
                await waiting.put((due, frame))
            if rng.random() < weather.reordering:
                self.reordered += 1
                self._start(_later(due + rng.uniform(0.0, weather.reorder_s), frame, writer))
                return
        await waiting.put((due, frame))


async def frames(reader: asyncio.StreamReader) -> AsyncIterator[tuple[str, bytes]]:
    """Each line of the protocol with its payload, and the subject if it is a message."""
    while line := await reader.readline():
        if not line.startswith(WITH_PAYLOAD):
            yield "", line
            continue
        words = line.split()
        yield words[1].decode(), line + await reader.readexactly(int(words[-1]) + 2)


async def _leave(waiting: "asyncio.Queue[tuple[float, bytes]]", writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due, frame = await waiting.get()
        if (left_s := due - loop.time()) > 0:
            await asyncio.sleep(left_s)
        writer.write(frame)
        await writer.drain()


async def _later(due: float, frame: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
    if not writer.is_closing():
        writer.write(frame)
