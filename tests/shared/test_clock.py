"""Time as services see it."""

import time
from itertools import pairwise

import uvloop

from shared.clock import LoopClock, SystemClock


def test_under_uvloop_time_passes_in_less_than_milliseconds_and_never_back() -> None:
    async def seen() -> list[float]:
        clock, begun = LoopClock(), time.perf_counter()
        moments = [clock.now()]
        while time.perf_counter() - begun < 0.003:
            moments.append(clock.now())
        return moments

    moments = uvloop.run(seen())
    assert all(early <= late for early, late in pairwise(moments))
    assert len(set(moments)) > 20


def test_the_clock_of_a_process_is_that_of_its_loop() -> None:
    async def both() -> tuple[float, float, float]:
        return LoopClock().now(), SystemClock().now(), LoopClock().now()

    assert sorted(moments := uvloop.run(both())) == list(moments)
