"""`python -m worker --engine mock --nats nats://127.0.0.1:4222`: one worker until SIGTERM or SIGINT, then drained."""

import asyncio
import os
import signal
import sys

import uvloop

from shared.clock import LoopClock
from shared.nats_bus import NatsBus
from shared.settings import WorkerSettings, load
from worker.service import serve


async def run(settings: WorkerSettings) -> None:
    """Connect, serve, part."""
    bus = await NatsBus.connect(settings.nats, settings.id or "worker")
    serving = asyncio.ensure_future(serve(bus, settings, LoopClock()))
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        # the first asks for a drain, the second cuts it short
        loop.add_signal_handler(name, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        pass
    finally:
        await bus.close()


def main() -> int:
    try:
        settings = load(WorkerSettings, "worker", sys.argv[1:], os.environ)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    uvloop.run(run(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
