"""What NatsBus adds to nats-py: each known defect of the client, reproduced, leaves a bus that hears.

The promises of every bus stand in test_bus.py.
"""

import asyncio
import contextlib
import json
import socket
import time

import pytest
from nats import errors

from deploy.nats_config import new_seed
from shared import nats_bus
from shared.bus import BusUnavailable
from shared.bus_metrics import BusMetrics
from shared.credentials import Credentials
from shared.nats_bus import NatsBus
from tests.nats_server import NatsServer, certificate, free_port, nats_server


@pytest.fixture(scope="module")
def server():
    with nats_server() as running:
        yield running


@pytest.fixture
async def connect(server):
    """Connects a bus whose watchdog never acts unless a test asks for a short `probe_s`."""
    made: list[NatsBus] = []

    async def connect_to(probe_s: float = 3600.0, url: str | None = None) -> NatsBus:
        made.append(await NatsBus.connect(url or server.url, "test", probe_s=probe_s))
        return made[-1]

    yield connect_to
    for bus in made:
        await bus.close()


async def until(condition, seconds: float = 20.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def assert_hears(bus: NatsBus):
    """A message to itself, tried until the broker knows the subscription."""
    heard: list[bytes] = []
    subscription = await bus.subscribe("are.you.there", lambda delivery: heard.append(delivery.data))

    async def call() -> None:
        while not heard:
            if bus.connected:
                await bus.publish("are.you.there", b"yes")
            await asyncio.sleep(0.02)

    async with asyncio.timeout(20):
        await call()
    assert heard[0] == b"yes"
    await subscription.unsubscribe()


async def test_a_cancelled_flush_does_not_deafen(connect):
    bus = await connect()
    for _ in range(3):
        flush = asyncio.create_task(bus._client.flush())
        await asyncio.sleep(0)
        flush.cancel()
        await asyncio.gather(flush, return_exceptions=True)
    await bus._client.flush()
    await assert_hears(bus)
    assert bus.reconnects == 0


async def test_a_flush_that_timed_out_does_not_deafen(connect, server):
    bus = await connect()
    server.pause()
    try:
        with pytest.raises(errors.FlushTimeoutError):
            await bus._client.flush(timeout=0.05)
    finally:
        server.resume()
    await bus._client.flush()
    await assert_hears(bus)
    assert bus.reconnects == 0


async def test_an_error_callback_that_fails_does_not_deafen(connect, monkeypatch):
    bus = await connect()

    class ClosedLog:
        def __getattr__(self, _):
            raise ValueError("I/O operation on closed file")

    with monkeypatch.context() as patch:
        patch.setattr(nats_bus, "_log", ClosedLog())
        await bus._client._error_cb(errors.SlowConsumerError("a", "", 1, None))
    assert bus.client_errors == 1
    await assert_hears(bus)


async def test_an_unknown_exception_in_the_read_loop_is_a_disconnection(connect, monkeypatch):
    bus = await connect()
    with monkeypatch.context() as patch:
        async def broken(*_):
            patch.undo()
            raise LookupError("a defect in the parser")

        patch.setattr(bus._client, "_process_pong", broken)
        await bus._client._send_ping()
        # nats-py's own pings would notice after 15 seconds
        await until(lambda: bus.reconnects == 1, seconds=8)
    await assert_hears(bus)


async def test_the_watchdog_heals_a_connected_but_deaf_client(connect):
    bus = await connect(probe_s=0.1)
    bus._client._reading_task.cancel()
    await until(lambda: bus.healed == 1 and bus.reconnects == 1)
    await assert_hears(bus)


async def test_the_watchdog_replaces_a_client_that_gave_up(connect):
    bus = await connect(probe_s=0.1)
    heard: list[bytes] = []
    await bus.subscribe("old.subscription", lambda delivery: heard.append(delivery.data))
    await bus._client.close()
    assert not bus.connected
    with pytest.raises(BusUnavailable):
        await bus.publish("old.subscription", b"")
    await until(lambda: bus.connected and bus.healed == 1)
    await assert_hears(bus)
    await bus.publish("old.subscription", b"again")
    await until(lambda: heard == [b"again"])


async def test_unsubscribing_while_the_client_is_replaced_leaves_other_subscriptions_alone(connect, monkeypatch):
    bus = await connect(probe_s=60.0)
    heard: list[bytes] = []
    leaving = await bus.subscribe("leaving", lambda delivery: heard.append(delivery.data))
    await bus.subscribe("staying", lambda delivery: heard.append(delivery.data))
    reopen = bus._open

    async def unsubscribed_meanwhile():
        await leaving.unsubscribe()
        await reopen()

    monkeypatch.setattr(bus, "_open", unsubscribed_meanwhile)
    await bus._client.close()
    await bus._replace()
    await bus.publish("leaving", b"nobody")
    await bus.publish("staying", b"still here")
    await until(lambda: heard == [b"still here"])


async def test_the_watchdog_restarts_a_reconnection_that_died(connect, monkeypatch):
    bus = await connect(probe_s=0.1)
    with monkeypatch.context() as patch:
        async def broken(*_):
            patch.undo()
            raise LookupError("a defect while reconnecting")

        patch.setattr(bus._client, "_process_connect_init", broken)
        await bus._client.force_reconnect()
        await until(lambda: bus.healed == 1 and bus.connected)
    await assert_hears(bus)


async def test_a_quiet_bus_is_left_alone_by_its_watchdog(connect):
    bus = await connect(probe_s=0.02)
    before = bus._client.stats["in_msgs"]
    await until(lambda: bus._client.stats["in_msgs"] >= before + 5)
    assert bus.healed == bus.reconnects == 0


async def test_the_watchdog_tells_how_late_the_loop_was_and_how_far_the_broker_is(connect):
    bus = await connect(probe_s=0.02)
    figures = BusMetrics(bus)
    bus.watched = figures.observe
    value = figures.registry.get_sample_value
    await until(lambda: value("mill_bus_round_trip_seconds_count") >= 3)
    time.sleep(0.3)
    await until(lambda: value("mill_loop_lag_seconds_sum") > 0.2)
    assert value("mill_bus_connected") == 1 and value("mill_bus_refused_total") == 0


async def test_an_error_of_the_server_only_disconnects(connect):
    bus = await connect()
    await bus._client._send_command(b"NONSENSE\r\n")
    await bus._client._flush_pending()
    await until(lambda: bus.reconnects == 1)
    await assert_hears(bus)


async def test_what_was_pending_when_the_connection_broke_is_not_sent_late(connect):
    bus, listener = await connect(), await connect()
    heard: list[bytes] = []
    await listener.subscribe("late", lambda delivery: heard.append(delivery.data))
    # as a publish does, but stopped before the flusher wrote it
    bus._client._pending.append(b"PUB late 4\r\nlate\r\n")
    bus._client._pending_data_size += 18
    await bus._client.force_reconnect()
    await until(lambda: bus.reconnects == 1)
    await bus.publish("late", b"in time")
    await until(lambda: bool(heard))
    assert heard == [b"in time"]


async def test_a_subscription_made_during_an_outage_is_made_once(connect):
    with nats_server() as server:
        bus = await connect(url=server.url)
        heard: list[bytes] = []
        server.kill()
        await until(lambda: not bus.connected)
        await bus.subscribe("outage", lambda delivery: heard.append(delivery.data))
        assert bus._client.pending_data_size == 0
        await asyncio.to_thread(server.start)
        await until(lambda: bus.connected)
        await assert_hears(bus)
        await bus.publish("outage", b"x")
        await until(lambda: heard == [b"x"])


async def test_a_broker_that_stops_reading_is_left_and_found_again():
    with nats_server() as server:
        bus = await NatsBus.connect(server.url, "test", probe_s=0.2)
        server.pause()
        try:
            # more than the sockets buffer, so that closing politely would wait for ever
            sent = 0
            try:
                while sent < 64:
                    await bus.publish("flood", bytes(1 << 20))
                    sent += 1
                    await asyncio.sleep(0)
            except BusUnavailable:
                pass
            await until(lambda: not bus.connected)
            assert 16 <= sent < 64
        finally:
            server.resume()
        await until(lambda: bus.connected)
        await assert_hears(bus)
        await bus.close()


async def test_a_broker_that_stopped_reading_does_not_hold_up_the_way_to_another():
    with nats_server() as one, nats_server() as two:
        bus = await NatsBus.connect(f"{one.url},{two.url}", "test", probe_s=0.2)
        stuck, other = (one, two) if bus._client.connected_url.port == one.port else (two, one)
        stuck.pause()
        try:
            for _ in range(12):
                await bus.publish("flood", bytes(1 << 20))
            await until(lambda: bus.reconnects == 1)
            assert bus._client.connected_url.port == other.port
            await assert_hears(bus)
        finally:
            stuck.resume()
        await bus.close()


async def test_closing_does_not_hang_on_a_broker_that_stopped_reading():
    with nats_server() as server:
        bus = await NatsBus.connect(server.url, "test")
        server.pause()
        for _ in range(12):
            await bus.publish("flood", bytes(1 << 20))
        async with asyncio.timeout(15):
            await bus.close()
        assert not bus.connected


async def test_connecting_waits_for_a_broker_that_starts_later(tmp_path):
    server = NatsServer(tmp_path)
    connecting = asyncio.create_task(NatsBus.connect(server.url, "early", timeout_s=20))
    await asyncio.sleep(0.1)
    await asyncio.to_thread(server.start)
    try:
        bus = await connecting
        await assert_hears(bus)
        await bus.close()
    finally:
        server.stop()


async def test_without_a_broker_the_error_names_the_url_but_no_password():
    port = free_port()
    with pytest.raises(BusUnavailable) as caught:
        await NatsBus.connect(f"nats://me:secret@127.0.0.1:{port}", timeout_s=0.3)
    assert f"nats://127.0.0.1:{port}" in str(caught.value) and "TOKENMILL_NATS" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_something_that_is_no_broker_is_told_apart():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(BusUnavailable, match="no NATS server took a connection"):
            await NatsBus.connect(f"nats://127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.3)


async def test_a_wrong_password_is_said():
    with nats_server("--user", "me", "--pass", "right") as server:
        with pytest.raises(BusUnavailable, match="Authorization Violation"):
            await NatsBus.connect(server.url.replace("//", "//me:wrong@"), timeout_s=1.5)
        bus = await NatsBus.connect(server.url.replace("//", "//me:right@"))
        await assert_hears(bus)
        await bus.close()


@contextlib.asynccontextmanager
async def plain_server(**info):
    """Says an INFO without TLS and keeps all that it is told."""
    told = bytearray()

    async def answer(reader, writer):
        writer.write(b"INFO %b\r\n" % json.dumps({"server_id": "s", "version": "2.10.0", "max_payload": 1 << 20,
                                                  "nonce": "n", "auth_required": True, **info}).encode())
        while received := await reader.read(4096):
            told.extend(received)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], told


@pytest.mark.parametrize(("url", "ca"), [("tls://me:secret@{}", False), ("nats://me:secret@{}", True),
                                         ("nats://me:secret@{}, tls://{}", False)])
@pytest.mark.parametrize("info", [{}, {"tls_required": False}, {"tls_available": True}])
async def test_where_tls_was_asked_for_a_plain_server_is_told_nothing(url, ca, info, tmp_path):
    shown = Credentials(seed=new_seed(), ca=str(certificate(tmp_path)[0]) if ca else "")
    async with plain_server(**info) as (port, told):
        with pytest.raises(BusUnavailable, match="takes no TLS") as caught:
            await NatsBus.connect(url.replace("{}", f"127.0.0.1:{port}"), "test", timeout_s=0.5, credentials=shown)
    assert not told, bytes(told)
    assert "secret" not in str(caught.value)


async def test_where_tls_was_not_asked_for_a_plain_server_is_spoken_to():
    async with plain_server() as (port, told):
        with pytest.raises(BusUnavailable):
            await NatsBus.connect(f"nats://127.0.0.1:{port}", timeout_s=0.3)
    assert told.startswith(b"CONNECT ")


async def test_a_connection_under_tls_does_not_come_back_without_it(tmp_path):
    made, key = certificate(tmp_path)
    with nats_server("--tls", "--tlscert", str(made), "--tlskey", str(key)) as server:
        bus = await NatsBus.connect(server.url, credentials=Credentials(ca=str(made)))
        await assert_hears(bus)
        under_tls = server._options
        server.kill()
        server.set_options()
        server.start()
        await until(lambda: "takes no TLS" in str(bus._last_error))
        assert not bus.connected and not bus.reconnects
        server.kill()
        server.set_options(*under_tls)
        server.start()
        await assert_hears(bus)
        await bus.close()


async def test_of_several_servers_one_that_lives_is_used(connect, server):
    bus = await connect(url=f"nats://127.0.0.1:{free_port()},{server.url}")
    await assert_hears(bus)


async def test_cancelling_a_connection_attempt_leaves_nothing_behind():
    connecting = asyncio.create_task(NatsBus.connect(f"nats://127.0.0.1:{free_port()}"))
    await asyncio.sleep(0.05)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    assert not [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]


async def test_unheard_callbacks_are_forgotten_and_bounded(connect, monkeypatch):
    bus = await connect(probe_s=0.05)
    await bus.subscribe("heard", lambda _: None)
    monkeypatch.setattr(nats_bus, "UNHEARD_LIMIT", 10)
    for _ in range(50):
        await bus.publish("heard", b"", unheard=lambda: None)
    assert len(bus._unheard) == 10
    monkeypatch.setattr(nats_bus, "UNHEARD_S", 0.0)
    bus._unheard.clear()
    await bus.publish("heard", b"", unheard=lambda: None)
    await until(lambda: not bus._unheard)


async def test_a_subscription_survives_three_crashes_of_the_broker_under_traffic(connect):
    with nats_server() as server:
        sender, receiver = await connect(url=server.url), await connect(url=server.url)
        heard: list[int] = []
        await receiver.subscribe("n", lambda delivery: heard.append(int(delivery.data)))
        stop = asyncio.Event()
        sent: list[int] = []

        async def until_more_is_heard() -> None:
            before = len(heard)
            await until(lambda: len(heard) > before + 20)

        async def talk() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                try:
                    await sender.publish("n", b"%d" % number)
                    sent.append(number)
                except BusUnavailable:
                    pass
                await asyncio.sleep(0.002)

        async with asyncio.TaskGroup() as group:
            group.create_task(talk())
            for _ in range(3):
                await until_more_is_heard()
                await asyncio.to_thread(server.kill)
                await until(lambda: not sender.connected and not receiver.connected)
                await asyncio.to_thread(server.start)
            await until_more_is_heard()
            stop.set()
        assert heard == sorted(set(heard))
        assert set(heard) <= set(sent)


def test_a_server_is_gone_when_its_test_is():
    with nats_server() as server:
        port = server.port
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            pass
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        pass


async def test_messages_keep_their_order_whichever_way_they_are_written(connect):
    bus, listener = await connect(), await connect()
    heard: list[bytes] = []
    await listener.subscribe("order", lambda delivery: heard.append(delivery.data))
    # those with headers wait for a task that writes, all others are written on the spot
    sent = [b"%d" % number for number in range(40)]
    for number, data in enumerate(sent):
        await bus.publish("order", data, {"n": str(number)} if number % 3 == 1 else None)
        if number % 8 == 0:
            await asyncio.sleep(0)
    await until(lambda: len(heard) == len(sent))
    assert heard == sent
