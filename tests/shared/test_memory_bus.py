"""What a test can do to the broker in memory. What it shares with NATS stands in test_bus.py."""

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.bus import BusUnavailable
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from tests.virtual_time import run_virtual


async def arrivals(faults: Faults | None, seed: int = 0, messages: int = 300, pause_s: float = 0.001):
    """(second, number) of each arrival when one bus sends `messages` to another."""
    broker = MemoryBroker(faults, seed)
    sender, receiver = MemoryBus(broker), MemoryBus(broker)
    heard: list[tuple[float, int]] = []
    loop = asyncio.get_running_loop()
    await receiver.subscribe("a.*", lambda d: heard.append((loop.time(), int(d.data))))
    for number in range(messages):
        await sender.publish("a.b", str(number).encode())
        await asyncio.sleep(pause_s)
    await asyncio.sleep(10)
    return heard


def numbers(heard):
    return [number for _, number in heard]


def test_without_faults_everything_arrives_once_and_at_once():
    heard = run_virtual(arrivals(None))
    assert numbers(heard) == list(range(300))
    assert [second for second, _ in heard] == pytest.approx([n * 0.001 for n in range(300)])


def test_delay_keeps_the_order_of_a_sender():
    heard = run_virtual(arrivals(Faults(delay_s=(0.0, 0.5))))
    assert numbers(heard) == list(range(300))
    assert max(second - number * 0.001 for second, number in heard) > 0.2


def test_loss_duplication_and_reordering_each_do_what_they_say():
    lost = numbers(run_virtual(arrivals(Faults(loss=0.2))))
    assert 200 < len(lost) < 280 and lost == sorted(set(lost))
    doubled = numbers(run_virtual(arrivals(Faults(duplication=0.2))))
    assert 320 < len(doubled) < 400 and set(doubled) == set(range(300)) and doubled == sorted(doubled)
    mixed = numbers(run_virtual(arrivals(Faults(reordering=0.2))))
    assert mixed != sorted(mixed) and sorted(mixed) == list(range(300))


@given(st.integers(0, 2**32))
def test_a_seed_replays_its_history_exactly(seed):
    faults = Faults(delay_s=(0.0, 0.05), loss=0.1, duplication=0.1, reordering=0.3)
    assert run_virtual(arrivals(faults, seed, 30)) == run_virtual(arrivals(faults, seed, 30))


def test_different_seeds_differ():
    faults = Faults(delay_s=(0.0, 0.05), loss=0.1)
    assert run_virtual(arrivals(faults, 1)) != run_virtual(arrivals(faults, 2))


def test_an_override_decides_alone_for_its_subjects():
    faults = Faults(loss=1.0, overrides=(("a.>", Faults()),))
    assert numbers(run_virtual(arrivals(faults))) == list(range(300))
    assert Faults(loss=0.5, overrides=(("x.*", Faults()),)).on("a.b").fate(random.Random(1)) == ()


@pytest.mark.parametrize("wrong", [{"loss": 1.1}, {"duplication": -0.1}, {"delay_s": (0.2, 0.1)},
                                   {"reorder_s": (-1.0, 1.0)}, {"overrides": (("a..b", Faults()),)}])
def test_faults_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        Faults(**wrong)


def test_an_outage_loses_what_is_under_way_and_keeps_subscriptions():
    async def scenario():
        broker = MemoryBroker(Faults(delay_s=(0.5, 0.5)))
        sender, receiver = MemoryBus(broker), MemoryBus(broker)
        heard = []
        await receiver.subscribe("a", lambda d: heard.append(d.data))
        await sender.publish("a", b"under way")
        await asyncio.sleep(0.1)
        broker.stop()
        assert not sender.connected
        with pytest.raises(BusUnavailable):
            await sender.publish("a", b"during")
        broker.start()
        assert sender.connected
        await sender.publish("a", b"after")
        await asyncio.sleep(5)
        return heard, broker.lost

    assert run_virtual(scenario()) == ([b"after"], 1)


def test_an_outage_shorter_than_a_loop_turn_still_loses_what_was_under_way():
    async def scenario():
        broker = MemoryBroker()
        bus = MemoryBus(broker)
        heard = []
        await bus.subscribe("a", lambda d: heard.append(d.data))
        await bus.publish("a", b"under way")
        broker.stop()
        broker.start()
        await asyncio.sleep(1)
        return heard

    assert run_virtual(scenario()) == []


def test_a_crashed_bus_hears_nothing_more_and_its_group_goes_on_without_it():
    async def scenario():
        broker = MemoryBroker(seed=3)
        sender, crashing, surviving = (MemoryBus(broker) for _ in range(3))
        heard = {"crashing": 0, "surviving": 0}

        def count(name):
            return lambda _: heard.__setitem__(name, heard[name] + 1)

        await crashing.subscribe("work", count("crashing"), queue="group")
        await surviving.subscribe("work", count("surviving"), queue="group")
        for _ in range(100):
            await sender.publish("work", b"")
        crashing.crash()
        await asyncio.sleep(1)
        before = dict(heard)
        for _ in range(100):
            await sender.publish("work", b"")
        await asyncio.sleep(1)
        return before, heard

    before, after = run_virtual(scenario())
    assert before["crashing"] == 0 and 20 < before["surviving"] < 80
    assert after == {"crashing": 0, "surviving": before["surviving"] + 100}
