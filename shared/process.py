"""A service as a process of its own: settings, log, broker, signals, and one sentence when it cannot start.

    if __name__ == "__main__":
        run("router", RouterSettings, serve)

SIGTERM and SIGINT cancel `serve`, which drains; a second one ends it at once.
"""

import asyncio
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import prometheus_client
import uvloop
from msgspec.structs import replace

from shared import telemetry
from shared.bus import Bus, BusRefused, BusUnavailable
from shared.bus_metrics import BusMetrics
from shared.clock import Clock, SystemClock
from shared.credentials import Credentials, credentials
from shared.errors import MillError
from shared.ids import new_id
from shared.nats_bus import NatsBus
from shared.settings import Settings, load
from shared.timeline import Timeline

# containers, and collections of the generations below: a crowd of 256 requests makes 100,000 that all live
COLLECT_AFTER = (50_000, 20, 20)

S = TypeVar("S", bound=Settings)
Serve = Callable[[Bus, S, Clock], Coroutine[Any, Any, None]]


def run(name: str, kind: type[S], serve: Serve[S], check: Callable[[S], S] = lambda settings: settings,
        timeline: Timeline | None = None) -> None:
    """Serve until told to stop. `check` refuses settings with a ValueError before anything is connected.

    `timeline` is marked with what happens before `serve`: imports, settings, bus.
    """
    timeline = timeline or Timeline.of_process()
    timeline.mark("imports")
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(name, kind()))
        return
    try:
        settings = load(kind, name, sys.argv[1:], os.environ)
        settings = check(replace(settings, id=settings.id or new_id(name)))
        telemetry.configure_logging(name, settings.id, settings.log, settings.log_level)
        timeline.mark("settings")
        # what imports made is there for good, and nearly all that a request makes dies without a collector
        gc.freeze()
        gc.set_threshold(*COLLECT_AFTER)
        shown = credentials(name, settings.zone, settings.id, settings.nats_creds, settings.nats_ca)
        uvloop.run(_serve(settings, serve, timeline, shown))
    except (ValueError, BusUnavailable, BusRefused, MillError) as error:
        sys.exit(f"{name}: {error}")
    except ExceptionGroup as group:
        if (refused := _first(group, BusRefused)) is None:
            raise
        sys.exit(f"{name}: {refused}")
    except OSError as error:
        sys.exit(f"{name}: {error.strerror or error}")


def _first(group: BaseExceptionGroup[BaseException], kind: type[BaseException]) -> BaseException | None:
    """The first of `kind` among the errors of tasks that ended together."""
    found: BaseException | None = group.subgroup(kind)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


def help_text(name: str, defaults: Settings) -> str:
    """Every setting of a service as a flag, with its default."""
    fields = {field: getattr(defaults, field) for field in defaults.__struct_fields__}
    width = max(len(field) for field in fields) + 4
    lines = [f"  {'--' + field.replace('_', '-'):<{width}}{value!r}" for field, value in fields.items()]
    head = f"python -m {name} [--setting value ...]      flag over TOKENMILL_SETTING over --config FILE over default"
    return "\n".join([head, "", *lines])


async def _serve(settings: S, serve: Serve[S], timeline: Timeline, shown: Credentials) -> None:
    bus = await NatsBus.connect(settings.nats, name=settings.id, credentials=shown)
    timeline.mark("bus")
    figures = BusMetrics(bus)
    bus.watched = figures.observe
    prometheus_client.REGISTRY.register(figures.registry)
    serving = asyncio.create_task(serve(bus, settings, SystemClock()))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    finally:
        await bus.close()
