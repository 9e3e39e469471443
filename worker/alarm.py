"""An alarm that rings on time.

Timers of uvloop count whole milliseconds and ring up to 1.5 ms late, as much again as a short wait lasts. A timer of
the kernel that is read like a socket rings 0.03 to 0.12 ms late. Where there is none (no Linux), and under loops with a
time of their own, the loop's timer has to do.
"""

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from typing import Self

_CLOCK_MONOTONIC = 1


class _Timespecs(ctypes.Structure):
    """`struct itimerspec`: how often again (never), and when."""

    _fields_ = [(name, ctypes.c_long) for name in ("again_s", "again_ns", "s", "ns")]


class Alarm:
    """One alarm of the running loop, set again and again while the `with` block runs."""

    def __init__(self, ring: Callable[[], None]) -> None:
        """`ring` is called in the loop when the time is over."""
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._library: ctypes.CDLL | None = None
        self._file = -1
        self._timer: asyncio.TimerHandle | None = None

    def __enter__(self) -> Self:
        if type(self._loop).__module__ == "uvloop":
            self._library = ctypes.CDLL(None)
            if hasattr(self._library, "timerfd_create"):
                # negative where the kernel has none to give
                self._file = self._library.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file >= 0:
            self._loop.add_reader(self._file, self._expired)
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1

    def set(self, seconds: float) -> None:
        """Ring once, after `seconds` > 0 from now; what was set before is forgotten."""
        if self._file >= 0:
            self._write(seconds)
            return
        self.stop()
        self._timer = self._loop.call_later(seconds, self._ring)

    def stop(self) -> None:
        """Do not ring."""
        if self._file >= 0:
            self._write(0.0)
        elif self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _write(self, seconds: float) -> None:
        assert self._library is not None
        nanoseconds = max(1, round(seconds * 1e9)) if seconds else 0
        times = _Timespecs(0, 0, *divmod(nanoseconds, 1_000_000_000))
        self._library.timerfd_settime(self._file, 0, ctypes.byref(times), None)

    def _expired(self) -> None:
        # stopped or set again since the loop saw it: nothing to read
        with contextlib.suppress(BlockingIOError):
            os.read(self._file, 8)
            self._ring()
