"""A broker, a worker and drafters as processes, and a client that speaks their messages: no gateway, no router.

    async with Rig(folder, WorkerSettings(...)) as rig:
        await rig.start_drafter(DrafterSettings(id="near", ...))
        stream = await rig.ask(prompt, Sampling(), 100, WITH_DRAFTS)

Whether a request has drafts is decided by its residency: drafters stand in a zone that not every request allows.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from deploy import broker
from deploy.supervisor import Child, Supervisor, foreign_command, last_lines, service_command
from shared import subjects
from shared.blocks import hash_chain, join_hashes
from shared.bus import Bus, BusUnavailable, Delivery
from shared.clock import LoopClock
from shared.messages import (
    Cancel,
    Failed,
    Finished,
    GatewayStatus,
    Generate,
    Residency,
    Sampling,
    Status,
    StepReplies,
    Tokens,
    WorkerStatus,
    decode,
    encode,
)
from shared.nats_bus import NatsBus
from shared.settings import DrafterSettings, WorkerSettings, to_flags
from shared.tokens import pack, unpack

WORKER, GATEWAY, MODEL = "worker-1", "bench", "m"
HERE, THERE = "bench-worker", "bench-drafter"  # zones
WITH_DRAFTS, WITHOUT = Residency(("bench",)), Residency((HERE,))
READY_WITHIN_S = 120.0
FIGURES = "mill_worker_"


class RigFailed(Exception):
    """Something did not start, or a request did not end as it should; the message says what."""


@dataclass
class Stream:
    """One answer as it came. Times of `time.perf_counter`."""

    sent_s: float
    ended: "asyncio.Future[Finished]"
    tokens: list[int] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)  # of each message with tokens
    on_tokens: Callable[["Stream"], None] = lambda stream: None

    @property
    def end(self) -> Finished:
        return self.ended.result()


class Rig:
    """Everything runs while the block does."""

    def __init__(self, data: Path, worker: WorkerSettings) -> None:
        self.port = broker.free_port()
        self.url = f"nats://127.0.0.1:{self.port}"
        self._data = data
        self._metrics_port = broker.free_port()
        self._worker = replace(worker, id=WORKER, nats=self.url, model_name=MODEL, zone=HERE,
                               metrics_port=self._metrics_port, log_level="warning")
        self._supervisor = Supervisor(lambda line: print(line, file=sys.stderr))
        self._clock = LoopClock()
        self._bus: Bus | None = None
        self._streams: dict[str, Stream] = {}
        self._numbers = itertools.count(1)
        self._statuses: dict[str, Status] = {}
        self._heard = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._beating is not None:
            self._beating.cancel()
        if self._bus is not None:
            await self._bus.close()
        services = [child for child in self._supervisor.children if child.name != "nats-server"]
        await self._supervisor.stop(services, 2.0)
        await self._supervisor.stop(self._supervisor.children, 2.0)

    # --- processes ---------------------------------------------------------------------------------------------------

    async def start_drafter(self, settings: DrafterSettings, nats: str = "", command: Sequence[str] = ()) -> None:
        """Start a drafter and wait until the worker follows it. `command`: instead of `python -m drafter`."""
        settings = replace(settings, nats=nats or self.url, zone=THERE, log_level="warning")
        flags = to_flags(settings)
        self._spawn(settings.id, [*command, *flags] if command else service_command("drafter", flags))
        await self.until(lambda: self.worker is not None and self.worker.drafter == settings.id,
                         f"the worker does not follow {settings.id}")

    async def stop_drafter(self, name: str) -> None:
        """End a drafter in order, and wait until the worker follows it no longer."""
        await self._supervisor.stop([child for child in self._supervisor.children if child.name == name], 5.0)
        self._supervisor.children[:] = [child for child in self._supervisor.children if child.name != name]
        await self.until(lambda: self.worker is not None and self.worker.drafter != name,
                         f"the worker still follows {name}")

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process; one that dies of it is started again."""
        child = next(child for child in self._supervisor.children if child.name == name)
        if child.pid is not None:
            os.kill(child.pid, number)

    def pid(self, name: str) -> int:
        """Of a process that runs."""
        pid = next(child for child in self._supervisor.children if child.name == name).pid
        if pid is None:
            raise RigFailed(f"{name} does not run")
        return pid

    async def until(self, condition: Callable[[], bool], otherwise: str, within_s: float = READY_WITHIN_S) -> None:
        """Until statuses show that `condition` holds. Raises RigFailed with `otherwise`."""
        try:
            async with asyncio.timeout(within_s):
                while not condition():
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            logs = "\n".join(last_lines(child.log) for child in self._supervisor.children)
            raise RigFailed(f"{otherwise}; the logs say:\n{logs}") from None

    @property
    def worker(self) -> WorkerStatus | None:
        """What the worker said of itself last."""
        status = self._statuses.get(WORKER)
        return status if isinstance(status, WorkerStatus) else None

    def status(self, name: str) -> Status | None:
        """What a service said of itself last."""
        return self._statuses.get(name)

    async def figures(self) -> dict[str, float]:
        """The worker's figures as Prometheus reads them, without their prefix."""
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"http://127.0.0.1:{self._metrics_port}/metrics")).text
        return {sample.name.removeprefix(FIGURES).removesuffix("_total"): sample.value
                for family in text_string_to_metric_families(text) for sample in family.samples
                if sample.name.startswith(FIGURES) and not sample.labels}

    # --- requests ----------------------------------------------------------------------------------------------------

    async def ask(self, prompt: Sequence[int], sampling: Sampling, max_tokens: int, residency: Residency,
                  stop_token_ids: Sequence[int] = (), tenant: str = "", within_s: float = 120.0,
                  on_tokens: Callable[[Stream], None] = lambda stream: None) -> Stream:
        """One answer to its end. A tenant of its own unless one is named: its drafter has heard nothing before.

        Raises RigFailed when it ends otherwise or not in time.
        """
        assert self._bus is not None
        name = f"r{next(self._numbers)}"
        stream = Stream(time.perf_counter(), asyncio.get_running_loop().create_future(), on_tokens=on_tokens)
        self._streams[name] = stream
        tokens = list(prompt)
        request = Generate(
            name, 1, GATEWAY, MODEL, pack(tokens), max_tokens, self._clock.wall() + within_s, sampling,
            tenant or name, block_hashes=join_hashes(hash_chain(tokens, b"")), stop_token_ids=tuple(stop_token_ids),
            residency=residency)
        await self._bus.publish(subjects.worker_generate(WORKER), encode(request))
        try:
            async with asyncio.timeout(within_s):
                await stream.ended
        except TimeoutError:
            raise RigFailed(f"{name} had {len(stream.tokens)} tokens after {within_s} s") from None
        finally:
            del self._streams[name]
            if not stream.ended.done():
                await self._bus.publish(subjects.worker_cancel(WORKER), encode(Cancel(name, 1)))
        return stream

    def _take(self, delivery: Delivery) -> None:
        now = time.perf_counter()
        for reply in decode(delivery.data, StepReplies).replies:
            stream = self._streams.get(reply.request_id)
            if stream is None or stream.ended.done():
                continue
            match reply:
                case Tokens(index=index, tokens=packed):
                    if index != len(stream.tokens):
                        stream.ended.set_exception(RigFailed(f"tokens are missing at {len(stream.tokens)}"))
                        continue
                    stream.tokens += unpack(packed)
                    stream.arrived_s.append(now)
                    stream.on_tokens(stream)
                case Finished(reason="cancelled"):
                    stream.ended.set_exception(RigFailed("the worker dropped it"))
                case Finished():
                    stream.ended.set_result(reply)
                case Failed(message=message):
                    stream.ended.set_exception(RigFailed(message))

    def _see(self, delivery: Delivery) -> None:
        status: Status = decode(delivery.data, Status)  # type: ignore[arg-type]
        self._statuses[status.id] = status
        self._heard.set()

    # --- the start ---------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        self._spawn("nats-server", foreign_command(broker.command(self.port, self._data)))
        self._bus = await self._connected()
        await self._bus.subscribe(subjects.replies(GATEWAY), self._take)
        await self._bus.subscribe(subjects.ALL_STATUS, self._see)
        self._beating = asyncio.create_task(self._beat(self._bus))
        self._spawn(WORKER, service_command("worker", to_flags(self._worker)))
        await self.until(lambda: self.worker is not None and self.worker.state == "ready", "the worker does not start")

    async def _connected(self) -> Bus:
        give_up = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                return await NatsBus.connect(self.url, name="rig", timeout_s=1.0)
            except BusUnavailable:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(0.05)

    async def _beat(self, bus: Bus) -> None:
        """Stay alive in the worker's eyes: streams of a silent gateway are dropped."""
        while True:
            with contextlib.suppress(BusUnavailable):
                await bus.publish(subjects.status("gateway", GATEWAY), encode(GatewayStatus(GATEWAY, 1)))
            await asyncio.sleep(0.5)

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        self._supervisor.start(Child(name, command, self._data / f"{name}.log", drain_s=2.0))
