"""How long each phase of a start took.

    timeline = Timeline.of_process()      first thing in a process: what came before are the imports
    timeline.mark("imports")              the phase that ends now, from the mark before
    log.info("started", **timeline.milliseconds())

Real time always, also where a service runs on a clock that jumps; a mark may be set from any thread.
"""

import os
import time
from pathlib import Path
from typing import Self


class Timeline:
    """Phases in the order they ended."""

    def __init__(self, age_s: float = 0.0) -> None:
        """`age_s`: how long ago the first phase began."""
        self._began = self._last = time.monotonic() - age_s
        self._phases: dict[str, float] = {}

    @classmethod
    def of_process(cls) -> Self:
        """Begun when the system started this process."""
        return cls(process_age_s())

    def mark(self, phase: str) -> None:
        """End a phase. One that comes twice is added up."""
        now = time.monotonic()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def milliseconds(self) -> dict[str, int]:
        """`<phase>_ms` of each, and `total_ms` from the beginning to the last mark."""
        phases = {f"{phase}_ms": round(1000 * seconds) for phase, seconds in self._phases.items()}
        return phases | {"total_ms": round(1000 * (self._last - self._began))}


def process_age_s() -> float:
    """Seconds since the system started this process, to its tick (10 ms); elsewhere than on Linux the CPU time so far.

    Imports are CPU time for the most part, so the second is a lower bound that comes close.
    """
    try:
        started_ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    except (OSError, IndexError, ValueError):
        return time.process_time()
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK"))
