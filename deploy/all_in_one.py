"""The whole mesh in one process and one event loop, on the memory bus: no NATS, same code.

Every service is its own `serve` coroutine with a bus connection of its own, exactly as when each is a process. Tests
use `serve` under a virtual clock; `tokenmill up --all-in-one` uses it under the real one.
"""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import drafter.service
import gateway.service
import router.service
import worker.service
from deploy.local_mesh import Options, UpFailed, check_ports, plan, until_ready
from shared.clock import Clock, LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, Settings, WorkerSettings

SERVE: Mapping[type[Settings], Any] = {
    RouterSettings: router.service.serve,
    DrafterSettings: drafter.service.serve,
    WorkerSettings: worker.service.serve,
    GatewaySettings: gateway.service.serve,
}


async def serve(services: Sequence[Settings], clock: Clock, memory: MemoryBroker | None = None) -> None:
    """Run these services together until cancelled; the first that fails ends all."""
    memory = memory or MemoryBroker()
    async with asyncio.TaskGroup() as group:
        for settings in services:
            group.create_task(SERVE[type(settings)](MemoryBus(memory), settings, clock), name=settings.id)


class OneProcess:
    """The mesh of `tokenmill up --all-in-one`, with the same face as `LocalMesh`."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._mesh: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start every service as a task. Raises UpFailed."""
        check_ports(self.options)
        services = [settings for group in plan(self.options, nats="").values() for settings in group]
        self._mesh = asyncio.create_task(serve(services, LoopClock()))

    async def until_ready(self, stop: asyncio.Event | None = None) -> None:
        """Until /ready says 200, or `stop`. Raises UpFailed."""
        await self._unless_it_ends(until_ready([], self.options.url, stop))

    async def until_stopped(self, stop: asyncio.Event) -> None:
        """Until `stop`. Raises UpFailed when a service fails."""
        await self._unless_it_ends(stop.wait())

    async def stop(self) -> None:
        """Cancel every service: each drains."""
        self.kill()
        if self._mesh is not None:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._mesh

    def kill(self) -> None:
        """Cancel, and do not wait."""
        if self._mesh is not None:
            self._mesh.cancel()

    async def _unless_it_ends(self, waiting: Any) -> None:
        assert self._mesh is not None
        other = asyncio.ensure_future(waiting)
        await asyncio.wait({self._mesh, other}, return_when=asyncio.FIRST_COMPLETED)
        if self._mesh.done() and not other.done():
            other.cancel()
            raise UpFailed(f"the mesh ended: {_cause(self._mesh.exception())}")
        await other


def _cause(error: BaseException | None) -> BaseException | None:
    """The first real error inside task groups of task groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
