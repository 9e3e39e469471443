"""The loop that tests of the whole mesh stand on."""

import asyncio
import random

import pytest

from shared.clock import LoopClock
from tests.virtual_time import Deadlock, VirtualTimeout, run_virtual


def test_an_hour_of_sleep_takes_no_real_time_and_ends_exactly():
    async def scenario():
        clock = LoopClock(wall_offset_s=1_700_000_000.0)
        await clock.sleep(0.1)
        await clock.sleep(3599.9)
        return clock.now(), clock.wall()

    assert run_virtual(scenario(), timeout_s=4000) == (3600.0, 1_700_003_600.0)


def test_a_sleep_longer_than_a_day_works():
    async def scenario():
        await asyncio.sleep(10 * 86400)
        return asyncio.get_running_loop().time()

    assert run_virtual(scenario(), timeout_s=1e9) == 864000.0


def test_timeouts_and_task_groups_work():
    async def scenario():
        woken = []

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            woken.append(seconds)

        async with asyncio.TaskGroup() as group:
            for seconds in (3, 1, 2):
                group.create_task(sleeper(seconds))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.Event().wait()
        return woken, asyncio.get_running_loop().time()

    assert run_virtual(scenario()) == ([1, 2, 3], 8.0)


def test_waiting_for_nobody_is_reported_with_the_place():
    async def wait_for_godot():
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="in wait"):
        run_virtual(wait_for_godot())


def test_a_scenario_that_runs_on_is_stopped_at_its_virtual_timeout():
    async def heartbeat():
        clock = LoopClock()
        while True:
            await clock.sleep(1)

    with pytest.raises(VirtualTimeout, match="60 virtual seconds"):
        run_virtual(heartbeat(), timeout_s=60)


def test_tasks_left_behind_are_cancelled_and_may_clean_up_with_sleeps():
    cleaned = []

    async def tidy():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(100)
            cleaned.append(True)

    async def scenario():
        asyncio.get_running_loop().left_behind = asyncio.create_task(tidy())
        await asyncio.sleep(1)

    run_virtual(scenario(), timeout_s=2)
    assert cleaned == [True]


def test_the_same_seed_gives_the_same_history():
    async def scenario(seed):
        rng, history = random.Random(seed), []

        async def walker(name):
            try:
                while True:
                    await asyncio.sleep(rng.choice((0.0, 0.1, 0.2)))
                    history.append((asyncio.get_running_loop().time(), name))
            finally:
                history.append(("cancelled", name))

        with pytest.raises(ExceptionGroup):
            async with asyncio.TaskGroup() as group:
                for name in range(20):
                    group.create_task(walker(name))
                await asyncio.sleep(5)
                raise ValueError
        return history

    assert run_virtual(scenario(7)) == run_virtual(scenario(7)) != run_virtual(scenario(8))
