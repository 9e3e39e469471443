"""Time, as services see it.

Rule: a service never imports `time`. It is given a clock, so that a test can run the whole mesh under a loop whose time
jumps from event to event. `now` follows the running event loop; `wall` is what travels in messages as a deadline.
"""

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds, twice: monotonic for durations, unix for deadlines that cross a process boundary."""

    def now(self) -> float:
        """Monotonic seconds; only differences mean anything."""

    def wall(self) -> float:
        """Unix seconds."""

    def cpu(self) -> float:
        """Seconds of CPU that this process has taken; 0 where time is made up."""

    async def sleep(self, seconds: float) -> None:
        """Give way for `seconds`."""


def stopwatch() -> float:
    """Real seconds, of which only differences mean anything, for work in a thread where no loop runs."""
    return time.perf_counter()


class LoopClock:
    """The clock of the running event loop. Under a virtual-time loop all of it is virtual.

    uvloop counts whole milliseconds, and only when it turns: too coarse for what a step costs, so the same clock is
    read from the system there.
    """

    def __init__(self, wall_offset_s: float | None = None) -> None:
        self._wall_offset_s = wall_offset_s

    def now(self) -> float:
        loop = asyncio.get_running_loop()
        return time.monotonic() if type(loop).__module__ == "uvloop" else loop.time()

    def wall(self) -> float:
        if self._wall_offset_s is None:
            return time.time()
        return self._wall_offset_s + self.now()

    def cpu(self) -> float:
        return time.process_time() if self._wall_offset_s is None else 0.0

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SystemClock(LoopClock):
    """The same where uvloop is known to run. A request asks for the time a hundred times, and looking costs 0.5 us."""

    now = staticmethod(time.monotonic)
