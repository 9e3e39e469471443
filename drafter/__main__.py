"""`python -m drafter --nats nats://127.0.0.1:4222`: one drafter as a process of its own.

SIGTERM and SIGINT let it leave: a last status says `draining`, and workers look for another drafter.
"""

import asyncio
import contextlib
import os
import signal
import sys

import uvloop

from drafter.service import checked, serve
from shared import telemetry
from shared.bus import BusUnavailable
from shared.clock import LoopClock
from shared.nats_bus import NatsBus
from shared.settings import DrafterSettings, load


async def main(settings: DrafterSettings) -> None:
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
        settings = checked(load(DrafterSettings, "drafter", sys.argv[1:], os.environ))
        telemetry.configure_logging("drafter", settings.id, settings.log, settings.log_level)
        uvloop.run(main(settings))
    except (ValueError, OSError, BusUnavailable) as error:
        sys.exit(f"drafter: {error}")
