"""A small mesh for router tests: routers, workers that only keep a cache, a gateway that only listens.

Everything runs on the memory bus under virtual time, unless `connect` gives other buses.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from msgspec.structs import replace

from router import service
from router.service import Router
from shared import subjects
from shared.blocks import join_hashes, split_hashes
from shared.bus import Bus, BusUnavailable, Delivery
from shared.clock import LoopClock
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.messages import (
    Failed,
    Generate,
    KvEvent,
    KvEvents,
    KvSnapshot,
    Removed,
    RouterStatus,
    SnapshotRequest,
    Status,
    StepReplies,
    Stored,
    decode,
    encode,
)
from shared.settings import RouterSettings
from tests.router.builders import status


class Mesh:
    """The broker and everyone on it. Time is virtual; unix time starts at 1,000,000."""

    def __init__(self, faults: Faults | None = None, seed: int = 0,
                 connect: Callable[[], Awaitable[Bus]] | None = None) -> None:
        self.broker = MemoryBroker(faults, seed)
        self._connect = connect
        self.clock = LoopClock(wall_offset_s=1e6)
        self.tasks: asyncio.TaskGroup

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Mesh"]:
        async with asyncio.TaskGroup() as tasks:
            self.tasks = tasks
            running: list[asyncio.Task[None]] = []
            self._running = running
            try:
                yield self
            finally:
                for task in running:
                    task.cancel()

    async def bus(self) -> Bus:
        return MemoryBus(self.broker) if self._connect is None else await self._connect()

    async def router(self, name: str = "r0", **settings: Any) -> "RunningRouter":
        """A router that hears workers; it takes requests when it has caught up, or where it is alone."""
        bus = await self.bus()
        ready = asyncio.Event()
        made: list[Router] = []

        class Seen(Router):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                made.append(self)

        original, service.Router = service.Router, Seen  # type: ignore[misc]
        task = self.tasks.create_task(
            service.serve(bus, RouterSettings(id=name, **settings), self.clock, ready))
        self._running.append(task)
        await ready.wait()
        service.Router = original  # type: ignore[misc]
        return RunningRouter(made[0], bus, task)

    async def worker(self, name: str = "w0", epoch: int = 1, **fields: Any) -> "CachingWorker":
        worker = CachingWorker(await self.bus(), name, epoch, fields)
        await worker.start()
        self._running.append(self.tasks.create_task(worker.beat()))
        return worker

    async def gateway(self, name: str = "g") -> "ListeningGateway":
        gateway = ListeningGateway(await self.bus(), name)
        await gateway.start()
        return gateway


class RunningRouter:
    def __init__(self, router: Router, bus: Bus, task: "asyncio.Task[None]") -> None:
        self.router = router
        self.view = router.view
        self.bus = bus
        self.task = task

    def crash(self) -> None:
        """Gone without a word."""
        _crash(self.bus)
        self.task.cancel()

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


class CachingWorker:
    """Keeps the blocks of every request it gets, and tells of them."""

    def __init__(self, bus: Bus, name: str, epoch: int, fields: dict[str, Any]) -> None:
        self.bus = bus
        self.name = name
        self.epoch = epoch
        self.fields = fields
        self.seq = 0
        self.held: dict[bytes, None] = {}
        self.requests: list[Generate] = []
        self.headers: list[dict[str, str]] = []
        self.mute = False  # events get lost on the way out
        self.silent = False  # heartbeats do
        self.crashed = False
        self.snapshots_sent = 0
        self.deaf_to_requests = 0  # so many requests for a snapshot get lost
        self._outgoing: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    async def start(self) -> None:
        for zone in ("", self.fields.get("zone", "local")):
            await self.bus.subscribe(subjects.worker_generate(self.name, zone), self.on_generate)
        await self.bus.subscribe(subjects.worker_kv_request(self.name), self.on_kv_request)

    def on_generate(self, delivery: Delivery) -> None:
        request = decode(delivery.data, Generate)
        self.requests.append(request)
        self.headers.append(dict(delivery.headers))
        self.store(split_hashes(request.block_hashes))

    def on_kv_request(self, delivery: Delivery) -> None:
        decode(delivery.data, SnapshotRequest)
        if self.deaf_to_requests > 0:
            self.deaf_to_requests -= 1
            return
        self.snapshots_sent += 1
        held = list(self.held)
        middle = len(held) // 2
        for part, hashes in enumerate((held[:middle], held[middle:])):
            self._say(subjects.worker_kv(self.name),
                      encode(KvSnapshot(self.name, self.epoch, self.seq, join_hashes(hashes), part, 2)))

    def store(self, hashes: Sequence[bytes]) -> None:
        self.held |= dict.fromkeys(hashes)
        self._tell(Stored(join_hashes(hashes)))

    def remove(self, hashes: Sequence[bytes]) -> None:
        for block in hashes:
            self.held.pop(block, None)
        self._tell(Removed(join_hashes(hashes)))

    async def beat(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send())
            while not self.crashed:
                self.say_status()
                await asyncio.sleep(0.5)
            raise asyncio.CancelledError

    def say_status(self, **fields: Any) -> None:
        now = status(self.name, epoch=self.epoch, kv_seq=self.seq, **(self.fields | fields))
        if not self.silent:
            self._say(subjects.status("worker", self.name), encode(now))

    def crash(self) -> None:
        self.crashed = True
        _crash(self.bus)

    def _tell(self, *events: KvEvent) -> None:
        self.seq += 1
        if not self.mute:
            self._say(subjects.worker_kv(self.name), encode(KvEvents(self.name, self.epoch, self.seq, events)))

    def _say(self, subject: str, data: bytes) -> None:
        self._outgoing.put_nowait((subject, data))

    async def _send(self) -> None:
        while True:
            subject, data = await self._outgoing.get()
            with contextlib.suppress(BusUnavailable):
                await self.bus.publish(subject, data)


def _crash(bus: Bus) -> None:
    assert isinstance(bus, MemoryBus)
    bus.crash()


class ListeningGateway:
    """Sends requests and keeps what is refused."""

    def __init__(self, bus: Bus, name: str) -> None:
        self.bus = bus
        self.name = name
        self.replies: list[StepReplies] = []
        self.routers: list[RouterStatus] = []
        self.placed: list[Generate] = []
        self.unheard = 0

    async def start(self) -> None:
        await self.bus.subscribe(subjects.replies(self.name),
                                 lambda delivery: self.replies.append(decode(delivery.data, StepReplies)))
        await self.bus.subscribe(subjects.ALL_STATUS, self._on_status)
        await self.bus.subscribe(subjects.ALL_PLACED,
                                 lambda delivery: self.placed.append(decode(delivery.data, Generate)))

    async def ask(self, request: Generate, headers: dict[str, str] | None = None) -> None:
        def unheard() -> None:
            self.unheard += 1

        request = replace(request, gateway=self.name)
        if request.deadline == 1e12:
            request = replace(request, deadline=2e6)
        await self.bus.publish(subjects.generate(request.model), encode(request), headers, unheard)

    @property
    def refusals(self) -> list[Failed]:
        return [reply for step in self.replies for reply in step.replies if isinstance(reply, Failed)]

    def _on_status(self, delivery: Delivery) -> None:
        heard: Any = decode(delivery.data, Status)  # type: ignore[arg-type]
        if isinstance(heard, RouterStatus):
            self.routers.append(heard)
