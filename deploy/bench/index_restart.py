"""A router is killed and started again: how long until its cache hits are what they were.

Real processes over a real NATS: the router is one, the workers are this one, with nothing but a cache each. Requests
for prompts that some worker holds come all the time; the hit rate is what the router credits of what is there. Time
runs from the start of the new process, so the interpreter's and all imports count.
"""

import asyncio
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from deploy import broker
from deploy.bench import machine
from shared import subjects
from shared.blocks import BLOCK_SIZE_TOKENS, HASH_BYTES, fold, split_hashes
from shared.bus import BusUnavailable, Delivery
from shared.messages import Generate, RouterStatus, Status, WorkerStatus, decode, encode
from shared.nats_bus import NatsBus
from shared.parity import expected_answer
from worker.outbox import Outbox

CHAIN_BLOCKS = 100
ASK_EVERY_S = 0.02
WINDOW = 20  # placements in a row that must be as good as before
RECOVERED = 0.95
HEARTBEAT_S = 0.5


async def measure(blocks: int, workers: int, restarts: int) -> list[dict[str, Any]]:
    """One row per restart."""
    with tempfile.TemporaryDirectory() as folder:
        port = broker.free_port()
        url = f"nats://127.0.0.1:{port}"
        async with _process(*broker.command(port, Path(folder)), log=Path(folder) / "nats.log"):
            bus = await NatsBus.connect(url, "bench")
            fleet = _Fleet(bus, blocks, workers)
            await fleet.start()
            tasks = [asyncio.create_task(work) for work in (fleet.beat(), fleet.ask())]
            try:
                return [await _restart(fleet, url, Path(folder), number) for number in range(restarts)]
            finally:
                for task in tasks:
                    task.cancel()
                await bus.close()


async def _restart(fleet: "_Fleet", url: str, folder: Path, number: int) -> dict[str, Any]:
    command = (sys.executable, "-m", "router", f"--nats={url}", f"--id=router-{number}", "--log-level=warning")
    fleet.indexed.clear()
    async with _process(*command, log=folder / "router.log") as first:
        steady = await fleet.steady()
        first.kill()
        await first.wait()
    began_s = time.perf_counter()
    fleet.placed.clear()
    fleet.indexed.clear()
    fleet.snapshots_sent = 0
    async with _process(*command, log=folder / "router.log") as again:
        heard_s = await fleet.heard() - began_s
        recovered_s = await fleet.recovered(steady) - began_s
        indexed_s = await fleet.indexed_again() - began_s
        cpu_s = machine.cpu_seconds([again.pid])
        memory_mib = machine.peak_rss_mib(again.pid)
    return {
        "blocks": fleet.blocks, "workers": len(fleet.caches), "hit_rate": round(steady, 3),
        "seconds_to_first_word": round(heard_s, 2), "seconds_to_95_percent": round(recovered_s, 2),
        "seconds_to_all_blocks_told": round(indexed_s, 2), "snapshots_sent": fleet.snapshots_sent,
        "router_cpu_s": round(cpu_s, 2), "router_peak_mib": round(memory_mib)}


class _Cache:
    """What an `Outbox` must know of a block pool, of one that never changes."""

    def __init__(self, blocks: int) -> None:
        self.hashes = os.urandom(HASH_BYTES * blocks)
        self._names = split_hashes(self.hashes)

    def names(self) -> list[bytes]:
        return self._names

    def take_events(self) -> tuple[()]:
        return ()


class _Fleet:
    """Workers that hold blocks, get requests and say so."""

    def __init__(self, bus: NatsBus, blocks: int, workers: int) -> None:
        self.caches = [_Cache(blocks // workers) for _ in range(workers)]
        self.blocks = sum(len(cache.names()) for cache in self.caches)
        self.placed: list[tuple[float, float]] = []  # when a request arrived, and the share of it that was credited
        self.indexed: list[tuple[float, int]] = []  # when a router spoke, and of how many blocks
        self.snapshots_sent = 0
        self._bus = bus
        self._outboxes = [Outbox(f"worker-{number}", 1) for number in range(workers)]
        self._wanted = [asyncio.Event() for _ in range(workers)]
        self._news = asyncio.Event()
        self._router_started = asyncio.Event()  # workers answer that with a status at once
        self._routers: set[tuple[str, int]] = set()
        for outbox, cache in zip(self._outboxes, self.caches, strict=True):
            outbox.kv_seq = 1
            outbox._digest = fold(cache.hashes)

    async def start(self) -> None:
        for number in range(len(self.caches)):
            await self._bus.subscribe(subjects.worker_kv_request(f"worker-{number}"),
                                      lambda _, wanted=self._wanted[number]: wanted.set())  # type: ignore[misc]
            await self._bus.subscribe(subjects.worker_generate(f"worker-{number}"), self._on_generate)
        await self._bus.subscribe(subjects.status("router", "*"), self._on_router)

    async def beat(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(len(self.caches)):
                tasks.create_task(self._send_snapshots(number))
            while True:
                for number in range(len(self.caches)):
                    await self._publish(subjects.status("worker", f"worker-{number}"), encode(self._status(number)))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(HEARTBEAT_S):
                        await self._router_started.wait()
                self._router_started.clear()

    async def ask(self) -> None:
        """Requests without end, each for a prompt that one worker holds to the last block."""
        rng = random.Random(1)
        tokens = bytes(4 * (CHAIN_BLOCKS * BLOCK_SIZE_TOKENS + 1))
        for number in range(sys.maxsize):
            cache = rng.choice(self.caches)
            first = HASH_BYTES * CHAIN_BLOCKS * rng.randrange(len(cache.names()) // CHAIN_BLOCKS)
            request = Generate(f"request-{number}", 1, "gateway-1", "m", tokens, 16, time.time() + 60.0,
                               block_hashes=cache.hashes[first:first + HASH_BYTES * CHAIN_BLOCKS])
            await self._publish(subjects.generate("m"), encode(request))
            await asyncio.sleep(ASK_EVERY_S)

    async def steady(self) -> float:
        """The hit rate of a router that has heard of every block."""
        await self.indexed_again()
        self.placed.clear()
        while len(self.placed) < 5 * WINDOW:
            await self._next()
        return _mean(self.placed)

    async def recovered(self, steady: float) -> float:
        """When the first of `WINDOW` placements in a row arrived that were together as good as before."""
        at = 0
        while True:
            while at + WINDOW <= len(self.placed):
                if _mean(self.placed[at:at + WINDOW]) >= RECOVERED * steady:
                    return self.placed[at][0]
                at += 1
            await self._next()

    async def heard(self) -> float:
        """When a router first spoke: interpreter and imports lie behind it."""
        while not self.indexed:
            await self._next()
        return self.indexed[0][0]

    async def indexed_again(self) -> float:
        """When a router said that it knows every block."""
        while not any(blocks >= self.blocks for _, blocks in self.indexed):
            await self._next()
        return next(at_s for at_s, blocks in self.indexed if blocks >= self.blocks)

    async def _next(self) -> None:
        async with asyncio.timeout(60):
            await self._news.wait()
        self._news.clear()

    def _on_generate(self, delivery: Delivery) -> None:
        placement = decode(delivery.data, Generate).placement
        credited = placement.cached_tokens if placement is not None else 0
        self.placed.append((time.perf_counter(), credited / (CHAIN_BLOCKS * BLOCK_SIZE_TOKENS)))
        self._news.set()

    def _on_router(self, delivery: Delivery) -> None:
        status: Any = decode(delivery.data, Status)  # type: ignore[arg-type]
        if isinstance(status, RouterStatus):
            self.indexed.append((time.perf_counter(), status.indexed_blocks))
            self._news.set()
            if (status.id, status.epoch) not in self._routers:
                self._routers.add((status.id, status.epoch))
                self._router_started.set()

    async def _send_snapshots(self, number: int) -> None:
        while True:
            await self._wanted[number].wait()
            self._wanted[number].clear()
            self.snapshots_sent += 1
            for subject, message in self._outboxes[number].snapshot(self.caches[number]):  # type: ignore[arg-type]
                await self._publish(subject, encode(message))
            await asyncio.sleep(0.1)

    async def _publish(self, subject: str, data: bytes) -> None:
        with contextlib.suppress(BusUnavailable):
            await self._bus.publish(subject, data)

    def _status(self, number: int) -> WorkerStatus:
        name = f"worker-{number}"
        return WorkerStatus(name, 1, "m", max_running=256, prefill_tok_s=20_000.0, step_base_s=0.001, step_row_s=1e-6,
                            kv_seq=1, kv_digest=self._outboxes[number].kv_digest, parity=expected_answer(name, 1, 16))


@contextlib.asynccontextmanager
async def _process(*command: str, log: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("ab") as sink:
        process = await asyncio.create_subprocess_exec(*command, stdout=sink, stderr=sink)
        try:
            yield process
        finally:
            if process.returncode is None:
                process.terminate()
            await process.wait()


def _mean(placed: list[tuple[float, float]]) -> float:
    return sum(share for _, share in placed) / max(1, len(placed))
