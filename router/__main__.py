"""`python -m router --nats nats://127.0.0.1:4222 --policy cost`: one router as a process of its own.

SIGTERM and SIGINT let it leave: no new requests, what is decided goes out, a last status says `draining`.
"""

import asyncio
import contextlib
import os
import signal
import sys

import uvloop

from router.service import checked, serve
from shared import telemetry
from shared.bus import BusUnavailable
from shared.clock import LoopClock
from shared.nats_bus import NatsBus
from shared.settings import RouterSettings, load


async def main(settings: RouterSettings) -> None:
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
        settings = checked(load(RouterSettings, "router", sys.argv[1:], os.environ))
        telemetry.configure_logging("router", settings.id, settings.log, settings.log_level)
        uvloop.run(main(settings))
    except (ValueError, OSError, BusUnavailable) as error:
        sys.exit(f"router: {error}")
