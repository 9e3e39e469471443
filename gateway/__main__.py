"""`python -m gateway --model FOLDER --port 8000`: one gateway as a process of its own.

SIGTERM and SIGINT let it leave: not ready, nothing new, what runs ends (`drain_s` at most). A second one ends it at
once.
"""

import asyncio
import contextlib
import os
import signal
import sys

import uvloop
from msgspec.structs import replace

from gateway.model_files import UnusableModel
from gateway.service import serve
from shared import telemetry
from shared.bus import BusUnavailable
from shared.clock import LoopClock
from shared.ids import new_id
from shared.nats_bus import NatsBus
from shared.settings import GatewaySettings, load


async def main(settings: GatewaySettings) -> None:
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
        settings = load(GatewaySettings, "gateway", sys.argv[1:], os.environ)
        settings = replace(settings, id=settings.id or new_id("gateway"))
        telemetry.configure_logging("gateway", settings.id, settings.log, settings.log_level)
        uvloop.run(main(settings))
    except (ValueError, BusUnavailable, UnusableModel) as error:
        sys.exit(f"gateway: {error}")
    except OSError as error:
        sys.exit(f"gateway: {error.strerror}")
