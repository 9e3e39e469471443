import asyncio
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from worker.alarm import Alarm

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["uvloop", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    return uvloop.run if request.param == "uvloop" else asyncio.run


def test_an_alarm_rings_once_each_time_that_it_is_set(run: Run) -> None:
    async def case() -> None:
        rung = asyncio.Event()
        with Alarm(rung.set) as alarm:
            for seconds in (1e-9, 0.0003, 0.002):
                rung.clear()
                alarm.set(seconds)
                await asyncio.wait_for(rung.wait(), 5.0)
                rung.clear()
                await asyncio.sleep(0.005)
                assert not rung.is_set()

    run(case())


def test_an_alarm_that_was_stopped_does_not_ring_even_when_its_time_was_over(run: Run) -> None:
    async def case() -> None:
        rung = asyncio.Event()
        with Alarm(rung.set) as alarm:
            alarm.set(0.001)
            time.sleep(0.003)  # the loop stands still meanwhile
            alarm.stop()
            await asyncio.sleep(0.01)
            assert not rung.is_set()

    run(case())


def test_setting_an_alarm_again_forgets_what_was_set_before(run: Run) -> None:
    async def case() -> None:
        rings = []
        with Alarm(lambda: rings.append(1)) as alarm:
            alarm.set(0.002)
            alarm.set(3600.0)
            await asyncio.sleep(0.02)
            assert not rings
            alarm.set(0.001)
            await asyncio.sleep(0.05)
            assert rings == [1]

    run(case())


def test_an_alarm_that_ends_leaves_no_file_open_and_does_not_ring(run: Run) -> None:
    async def case() -> None:
        rings = []
        before = sorted(os.listdir("/proc/self/fd"))
        with Alarm(lambda: rings.append(1)) as alarm:
            alarm.set(0.002)
        assert sorted(os.listdir("/proc/self/fd")) == before
        await asyncio.sleep(0.01)
        assert not rings

    run(case())
