"""The whole mesh in one process and one event loop, on the memory bus: no NATS, same code.

Every service is its own `serve` coroutine with a bus connection of its own, exactly as when each is a process. `serve`
runs them until cancelled; `OneProcess` is what `tokenmill up --all-in-one` starts, logs, shows and drains.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import structlog

import drafter.service
import gateway.service
import router.service
import worker.service
from deploy.local_mesh import (
    Options,
    UpFailed,
    Waiting,
    check_aliases,
    check_drafter,
    check_ports,
    folder_problems,
    plan,
    until_ready,
)
from deploy.paths import claim
from shared import telemetry
from shared.bus import Bus
from shared.clock import Clock, LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.settings import (
    DrafterSettings,
    GatewaySettings,
    RouterSettings,
    Settings,
    WorkerSettings,
    load,
    to_flags,
)

SERVE: Mapping[type[Settings], Any] = {
    RouterSettings: router.service.serve,
    DrafterSettings: drafter.service.serve,
    WorkerSettings: worker.service.serve,
    GatewaySettings: gateway.service.serve,
}
KINDS: Mapping[type[Settings], str] = {
    RouterSettings: "router",
    DrafterSettings: "drafter",
    WorkerSettings: "worker",
    GatewaySettings: "gateway",
}
LOG = "all-in-one.log"

log = structlog.get_logger("deploy.all_in_one")


async def serve(services: Sequence[Settings], clock: Clock, memory: MemoryBroker | None = None) -> None:
    """Run these services together until cancelled; the first that fails ends all."""
    memory = memory or MemoryBroker()
    async with asyncio.TaskGroup() as group:
        for settings in services:
            group.create_task(_serve_one(settings, clock, memory), name=settings.id)


async def _serve_one(settings: Settings, clock: Clock, memory: MemoryBroker) -> None:
    kind = type(settings)
    structlog.contextvars.bind_contextvars(service=KINDS[kind], id=settings.id)
    await SERVE[kind](MemoryBus(memory), settings, clock)


@dataclass
class Service:
    """One service as the live table shows it."""

    name: str
    task: asyncio.Task[None]
    since: float
    restarts: int = 0

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def state(self) -> str:
        return "stopped" if self.task.done() else "stopping" if self.task.cancelling() else "running"


class OneProcess:
    """The mesh of `tokenmill up --all-in-one`, with the same face as `LocalMesh`. Services log into one file."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.children: list[Service] = []
        self._memory = MemoryBroker()
        self._claim: IO[str] | None = None
        self._insisting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start every service as a task. Raises UpFailed."""
        options = self.options
        check_drafter(options)
        check_aliases(options)
        check_ports(options)
        with folder_problems(options.data):
            self._claim = claim(options.data)
            services = [_with_environment(made) for group in plan(options, nats="").values() for made in group]
            _log_into(options.data / "logs" / LOG, services[0].log, services[0].log_level)
        clock = LoopClock()
        for settings in services:
            task = asyncio.create_task(_serve_one(settings, clock, self._memory), name=settings.id)
            self.children.append(Service(settings.id, task, time.monotonic()))

    async def connect(self) -> Bus:
        """A bus of its own on the mesh's broker."""
        return MemoryBus(self._memory)

    async def until_ready(self, stop: asyncio.Event | None = None, waiting: Waiting = lambda reason: None) -> None:
        """Until /ready says 200, or `stop`; `waiting` hears what is missing. Raises UpFailed."""
        await self.unless_it_ends(until_ready([], self.options.url, stop, waiting, self.options.verify))

    async def unless_it_ends(self, waiting: Awaitable[Any]) -> None:
        """Await `waiting`. Raises UpFailed when a service fails before."""
        other = asyncio.ensure_future(waiting)
        try:
            await asyncio.wait({other, *(child.task for child in self.children)}, return_when=asyncio.FIRST_COMPLETED)
            for child in self.children:
                if child.task.done():
                    error = None if child.task.cancelled() else child.task.exception()
                    log.error("service_ended", service=child.name, exc_info=error)
                    raise UpFailed(f"{child.name} ended: {_cause(error)}")
            await other
        finally:
            other.cancel()

    async def stop(self) -> None:
        """Let every service drain: gateways first, so that nothing new comes in."""
        for gateways in (True, False):
            tasks = [child.task for child in self.children if child.name.startswith("gateway") == gateways]
            for task in tasks:
                if not task.cancelling():
                    task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._claim is not None:
            self._claim.close()

    def kill(self) -> None:
        """Cut every drain short; `stop` then returns soon."""
        self._insisting = asyncio.create_task(self._insist())

    async def _insist(self) -> None:
        # the first cancellation begins a drain, the next one ends it
        while any(not child.task.done() for child in self.children):
            for child in self.children:
                child.task.cancel()
            await asyncio.sleep(0.1)


def _with_environment(settings: Settings) -> Settings:
    """These settings as the service would have them in a process of its own. Raises UpFailed."""
    kind = type(settings)
    try:
        found = load(kind, KINDS[kind], to_flags(settings), os.environ)
    except ValueError as error:
        raise UpFailed(str(error)) from None
    own = {name: getattr(settings, name) for name in ("port", "metrics_port") if hasattr(settings, name)}
    return msgspec.structs.replace(found, **own)


def _log_into(path: Path, style: str, level: str) -> None:
    """What services and libraries log goes into this file from now on, to the last word of the event loop."""
    # configure_logging takes standard error as it finds it
    with contextlib.redirect_stderr(path.open("w", buffering=1)):
        telemetry.configure_logging("tokenmill", "up", style, level)


def _cause(error: BaseException | None) -> str:
    """The first real error inside task groups of task groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
