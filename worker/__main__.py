"""`python -m worker --engine mock --nats nats://127.0.0.1:4222`: one worker as a process of its own.

SIGTERM and SIGINT drain it: no new streams, what runs ends (`drain_s` at most), the rest goes elsewhere. A second one
ends it at once.
"""

import asyncio
import contextlib
import os
import signal
import sys

import uvloop
from msgspec.structs import replace

from shared import telemetry
from shared.bus import BusUnavailable
from shared.clock import LoopClock
from shared.ids import new_id
from shared.nats_bus import NatsBus
from shared.settings import WorkerSettings, load
from worker.service import serve


async def main(settings: WorkerSettings) -> None:
    """Serve on the broker until told to stop."""
    bus = await NatsBus.connect(settings.nats, name=settings.id)
    serving = asyncio.create_task(serve(bus, settings, LoopClock()))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, serving.cancel)
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await serving
    finally:
        await bus.close()


if __name__ == "__main__":
    try:
        settings = load(WorkerSettings, "worker", sys.argv[1:], os.environ)
        settings = replace(settings, id=settings.id or new_id("worker"))
        telemetry.configure_logging("worker", settings.id, settings.log, settings.log_level)
        uvloop.run(main(settings))
    except (ValueError, OSError, BusUnavailable) as error:
        sys.exit(f"worker: {error}")
