"""The whole mesh in one process and one event loop, on the memory bus: no NATS, same code.

Every service is its own `serve` coroutine with a bus connection of its own, exactly as when each is a process. Tests use
it under a virtual clock; `tokenmill up --all-in-one` under the real one.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

import drafter.service
import gateway.service
import router.service
import worker.service
from deploy.up import Options, UpFailed, plan, print_curl, show_answer, until_ready
from deploy import broker
from gateway.model_files import load_card
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
    """Run these services together until cancelled; the first that fails ends all. Clients go through the gateways' sockets."""
    memory = memory or MemoryBroker()
    async with asyncio.TaskGroup() as group:
        for settings in services:
            group.create_task(SERVE[type(settings)](MemoryBus(memory), settings, clock), name=settings.id)


async def up(options: Options, console: Console) -> None:
    """`tokenmill up --all-in-one`. Raises UpFailed."""
    if not broker.port_is_free(options.host, options.port):
        raise UpFailed(f"port {options.port} on {options.host} is in use: stop what listens there, "
                       "or choose another with --port")
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    start = time.perf_counter()
    services = [settings for group in plan(options, nats="").values() for settings in group]
    mesh = asyncio.create_task(serve(services, LoopClock()))
    waiting = asyncio.create_task(stop.wait())
    try:
        url, name = f"http://{options.host}:{options.port}", load_card(options.model).name
        ready = asyncio.create_task(until_ready([], url, stop))
        await asyncio.wait({mesh, ready}, return_when=asyncio.FIRST_COMPLETED)
        if mesh.done():
            raise UpFailed(f"the mesh ended before it was ready: {_cause(mesh)}")
        await ready
        if stop.is_set():
            return
        console.print(f"[green]ready[/] in {time.perf_counter() - start:.1f} s, all in one process", highlight=False)
        if not options.quiet:
            await show_answer(url, name, console)
        print_curl(url, name, console)
        await asyncio.wait({mesh, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if mesh.done():
            raise UpFailed(f"the mesh ended: {_cause(mesh)}")
    finally:
        waiting.cancel()
        mesh.cancel()
        with contextlib.suppress(asyncio.CancelledError, ExceptionGroup):
            await mesh
        console.print("stopped")


def _cause(mesh: "asyncio.Task[None]") -> BaseException | None:
    """The first real error inside the task group's group of groups."""
    error = mesh.exception()
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
