"""What every Bus promises: each test runs on the memory bus and on a real nats-server."""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Iterator

import pytest

from shared.bus import Bus, BusUnavailable, Delivery
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.nats_bus import NatsBus
from tests.nats_server import NatsServer, nats_server

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


who = contextvars.ContextVar("who", default="nobody")


class Broker:
    """A broker of either kind, as tests use it."""

    def __init__(self, real: NatsServer | None) -> None:
        self._real = real
        self._memory = MemoryBroker()
        self._open: list[Bus] = []

    async def bus(self, name: str = "test") -> Bus:
        bus = await NatsBus.connect(self._real.url, name, probe_s=0.2) if self._real else MemoryBus(self._memory)
        self._open.append(bus)
        return bus

    def stop(self) -> None:
        (self._real.kill if self._real else self._memory.stop)()

    def start(self) -> None:
        (self._real or self._memory).start()

    async def close(self) -> None:
        for bus in self._open:
            await bus.close()


@pytest.fixture(scope="module")
def server() -> Iterator[NatsServer]:
    with nats_server() as running:
        yield running


@pytest.fixture(params=["memory", "nats"])
async def broker(request):
    made = Broker(request.getfixturevalue("server") if request.param == "nats" else None)
    yield made
    await made.close()


class Ear:
    """A handler that remembers, and lets a test wait."""

    def __init__(self) -> None:
        self.heard: list[Delivery] = []
        self._more = asyncio.Event()

    def __call__(self, delivery: Delivery) -> None:
        self.heard.append(delivery)
        self._more.set()

    @property
    def data(self) -> list[bytes]:
        return [delivery.data for delivery in self.heard]

    async def hears(self, count: int) -> list[bytes]:
        async with asyncio.timeout(10):
            while len(self.heard) < count:
                self._more.clear()
                await self._more.wait()
        return self.data


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def until_it_works(attempt: Callable[[], Awaitable[None]]) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                return await attempt()
            except BusUnavailable:
                await asyncio.sleep(0.02)


async def test_a_message_arrives_as_it_was_sent(broker):
    sender, receiver = await broker.bus("a"), await broker.bus("b")
    ear = Ear()
    await receiver.subscribe("mill.v1.x", ear)
    await sender.publish("mill.v1.x", b"\x00\xff data", {"traceparent": "00-ab-cd-01", "other": "é: 1"})
    await sender.publish("mill.v1.x", b"")
    assert await ear.hears(2) == [b"\x00\xff data", b""]
    assert ear.heard[0].subject == "mill.v1.x"
    assert dict(ear.heard[0].headers) == {"traceparent": "00-ab-cd-01", "other": "é: 1"}
    assert dict(ear.heard[1].headers) == {}


async def test_wildcards_hear_what_they_match_and_nothing_else(broker):
    bus = await broker.bus()
    one, rest, exact = Ear(), Ear(), Ear()
    await bus.subscribe("mill.v1.worker.*.kv", one)
    await bus.subscribe("mill.v1.status.>", rest)
    await bus.subscribe("mill.v1.worker.w1.kv", exact)
    for subject in ("mill.v1.worker.w1.kv", "mill.v1.worker.w2.kv", "mill.v1.worker.w1.kv_request", "mill.v1.status",
                    "mill.v1.status.worker.w1", "mill.v1.status.end"):
        await bus.publish(subject, subject.encode())
    await rest.hears(2)
    assert one.data == [b"mill.v1.worker.w1.kv", b"mill.v1.worker.w2.kv"]
    assert rest.data == [b"mill.v1.status.worker.w1", b"mill.v1.status.end"]
    assert exact.data == [b"mill.v1.worker.w1.kv"]


async def test_messages_of_one_sender_arrive_in_order_and_each_once(broker):
    sender, receiver = await broker.bus("a"), await broker.bus("b")
    ear = Ear()
    await receiver.subscribe("n.*", ear)
    for number in range(2000):
        await sender.publish(f"n.{number % 3}", str(number).encode())
    assert await ear.hears(2000) == [str(number).encode() for number in range(2000)]


async def test_a_queue_group_gets_each_message_once_and_others_still_get_all(broker):
    sender, first, second = await broker.bus("a"), await broker.bus("b"), await broker.bus("c")
    ears = [Ear(), Ear(), Ear()]
    await first.subscribe("work", ears[0], queue="router")
    await second.subscribe("work", ears[1], queue="router")
    await second.subscribe("work", ears[2])
    for number in range(200):
        await sender.publish("work", str(number).encode())
    expected = [str(number).encode() for number in range(200)]
    assert await ears[2].hears(200) == expected
    await until(lambda: len(ears[0].heard) + len(ears[1].heard) >= 200)
    assert sorted(ears[0].data + ears[1].data) == sorted(expected)
    assert min(len(ears[0].heard), len(ears[1].heard)) > 40


async def test_a_bus_hears_its_own_messages(broker):
    bus = await broker.bus()
    ear = Ear()
    await bus.subscribe("self", ear)
    await bus.publish("self", b"hello")
    assert await ear.hears(1) == [b"hello"]


async def test_a_publish_nobody_hears_is_reported_once_and_a_heard_one_never(broker):
    bus, other = await broker.bus("a"), await broker.bus("b")
    ear, reports = Ear(), []
    await bus.publish("nobody.home", b"?", unheard=lambda: reports.append("first"))
    await until(lambda: bool(reports))
    await other.subscribe("nobody.home", ear, queue="router")
    await bus.publish("nobody.home", b"?", unheard=lambda: reports.append("second"))
    await bus.publish("nobody.else", b"?", unheard=lambda: reports.append("third"))
    await ear.hears(1)
    await until(lambda: "third" in reports)
    assert reports == ["first", "third"]


async def test_after_unsubscribe_nothing_arrives_and_the_rest_goes_on(broker):
    bus = await broker.bus()
    gone, staying, reports = Ear(), Ear(), []
    subscription = await bus.subscribe("a.b", gone)
    await bus.subscribe("a.*", staying)
    await subscription.unsubscribe()
    await subscription.unsubscribe()
    await bus.publish("a.b", b"1")
    await staying.hears(1)
    assert gone.heard == []
    only = await bus.subscribe("c", gone)
    await only.unsubscribe()
    await bus.publish("c", b"", unheard=lambda: reports.append(1))
    await until(lambda: bool(reports))


async def test_a_handler_that_raises_is_counted_and_hears_the_next_message(broker):
    bus = await broker.bus()
    ear = Ear()

    def clumsy(delivery):
        ear(delivery)
        raise RuntimeError("a defect in a handler")

    await bus.subscribe("a", clumsy)
    for data in (b"1", b"2", b"3"):
        await bus.publish("a", data)
    assert await ear.hears(3) == [b"1", b"2", b"3"]
    counted = bus.broker if isinstance(bus, MemoryBus) else bus
    assert counted.handler_errors == 3


async def test_a_handler_runs_in_the_context_of_its_subscriber(broker):
    bus, sender = await broker.bus("a"), await broker.bus("b")
    ear, seen = Ear(), []

    async def subscribe_as(name):
        who.set(name)
        await bus.subscribe("a", lambda delivery: (seen.append(who.get()), ear(delivery)))

    for name in ("first", "second"):
        await asyncio.create_task(subscribe_as(name))
    who.set("sender")
    await sender.publish("a", b"")
    await ear.hears(2)
    assert sorted(seen) == ["first", "second"]


async def test_an_unheard_callback_that_raises_harms_nothing(broker):
    bus = await broker.bus()
    ear, called = Ear(), []

    def clumsy():
        called.append(1)
        raise RuntimeError("a defect in a callback")

    await bus.publish("nobody", b"", unheard=clumsy)
    await until(lambda: bool(called))
    await bus.subscribe("a", ear)
    await bus.publish("a", b"1")
    assert await ear.hears(1) == [b"1"]


async def test_a_message_that_is_too_large_is_refused_and_the_bus_lives_on(broker):
    bus = await broker.bus()
    ear = Ear()
    await bus.subscribe("a", ear)
    with pytest.raises(ValueError, match="1048577 bytes to a is over the broker's limit of 1048576"):
        await bus.publish("a", bytes((1 << 20) + 1), unheard=lambda: None)
    await bus.publish("a", bytes(1 << 20))
    assert [len(data) for data in await ear.hears(1)] == [1 << 20]


@pytest.mark.parametrize("subject", ["", "a b", "a..b", "a.*", "a.>", "a\r\nPUB x 0\r\n"])
async def test_a_subject_that_is_none_is_refused(broker, subject):
    bus = await broker.bus()
    with pytest.raises(ValueError):
        await bus.publish(subject, b"")
    if "*" not in subject and ">" not in subject:
        with pytest.raises(ValueError):
            await bus.subscribe(subject, lambda _: None)
    assert bus.connected


async def test_a_closed_bus_is_deaf_and_mute_and_can_be_closed_again(broker):
    bus, other = await broker.bus("a"), await broker.bus("b")
    ear, reports = Ear(), []
    await bus.subscribe("a", ear)
    await bus.close()
    await bus.close()
    assert not bus.connected
    with pytest.raises(BusUnavailable):
        await bus.publish("a", b"")
    with pytest.raises(BusUnavailable):
        await bus.subscribe("a", ear)
    await other.publish("a", b"", unheard=lambda: reports.append(1))
    await until(lambda: bool(reports))
    assert ear.heard == []


async def test_what_was_published_before_close_arrives(broker):
    sender, receiver = await broker.bus("a"), await broker.bus("b")
    ear = Ear()
    await receiver.subscribe("a", ear)
    for number in range(500):
        await sender.publish("a", str(number).encode())
    await sender.close()
    assert len(await ear.hears(500)) == 500


async def test_an_outage_refuses_at_once_delivers_nothing_late_and_ends_by_itself(broker):
    sender, receiver = await broker.bus("a"), await broker.bus("b")
    ear, grouped, during = Ear(), Ear(), Ear()
    await receiver.subscribe("a.*", ear)
    await receiver.subscribe("g", grouped, queue="router")
    await sender.publish("a.1", b"before")
    await ear.hears(1)

    broker.stop()
    await until(lambda: not sender.connected and not receiver.connected)
    for number in range(10):
        with pytest.raises(BusUnavailable):
            await sender.publish("a.1", b"during %d" % number)
    await receiver.subscribe("later", during)
    broker.start()

    await until(lambda: sender.connected and receiver.connected)
    # the receiver may be back after the sender: send until heard
    for number in range(500):
        await until_it_works(lambda number=number: sender.publish("a.1", b"after %d" % number))
        if len(ear.heard) > 1:
            break
        await asyncio.sleep(0.01)
    assert all(data.startswith(b"after") for data in ear.data[1:]) and len(ear.heard) > 1
    for subject, heard_by in (("g", grouped), ("later", during)):
        await sender.publish(subject, b"x")
        assert await heard_by.hears(1) == [b"x"]
