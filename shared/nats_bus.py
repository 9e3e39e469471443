"""The bus over NATS, and the only file that imports nats.

Rule: never deaf, never late. A client that is connected hears; a publish leaves now or raises; nothing waits for a
broker to come back. `_Client` mends what nats-py 2.16 does, with a test for each in tests/shared/test_nats_bus.py:

    nats-py                                                       here
    a cancelled flush makes the next PONG end the read loop       a PONG nobody waits for is dropped
    any exception in the read loop ends it; still "connected"     the end of a read loop is a disconnection
    an exception in error_cb ends the read loop                   error_cb cannot raise
    any -ERR of the server closes the client for good             only a disconnection
    what was pending when the connection broke is sent late       it is dropped
    wait_closed() hangs on a peer that stopped reading            the transport is aborted
    one queue and one task per message and subscription           the handler is called from the read loop
    a publish wakes a task that writes                            it is written on the spot
    what arrives wakes a task that reads and parses it            whole messages are handed over where they arrive
    TLS that was asked for is left out if the server says so      CONNECT is sent to nobody without it

Behind these a watchdog sends a message to itself every `probe_s`, which also tells how long that takes, and reconnects
when it does not come back and nothing else was heard.
"""

import asyncio
import contextlib
import contextvars
import itertools
import random
import re
import secrets
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import structlog
from nats import errors
from nats.aio.client import Client
from nats.protocol.parser import AWAITING_CONTROL_LINE

from shared.bus import BusRefused, BusUnavailable, Delivery, Handler
from shared.credentials import OPEN, Credentials
from shared.nats_frames import whole_messages
from shared.subject_index import check_pattern, check_subject

PENDING_LIMIT_BYTES = 16 << 20  # what may wait for a slow socket before a publish is refused
UNHEARD_LIMIT = 8192
UNHEARD_S = 5.0  # the broker says "no responders" within a round trip; later it never will
SETTLE_S = 2.0

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_NO_RESPONDERS = b"NATS/1.0 503"
# nats-py says it in lower case
_REFUSED = re.compile(r"permissions violation for (publish|subscription) to \"([^\"]*)\"")
_log = structlog.get_logger("shared.nats_bus")


class _Client(Client):  # type: ignore[misc]
    """nats-py's client with its known defects mended. `receivers` maps a subscription number to what hears it.

    `tls`: to servers without it nothing is said, whatever they say of themselves.
    """

    def __init__(self, tls: bool = False) -> None:
        super().__init__()
        self._tls = tls
        self.receivers: dict[int, Callable[[str, bytes, bytes | None], None]] = {}

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        receiver = self.receivers.get(sid)
        if receiver is None:
            await super()._process_msg(sid, subject, reply, data, headers)
            return
        self.stats["in_msgs"] += 1
        self.stats["in_bytes"] += len(data)
        receiver(subject.decode(), data, headers)

    def send(self, subject: str, reply: str, data: bytes) -> bool:
        """Write a message at once. False, and nothing is done, where others wait before it or there is no socket."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is None or self._pending_data_size:
            return False
        to = f"{subject} {reply}" if reply else subject
        writer.transport.write(b"PUB %b %d\r\n%b\r\n" % (to.encode(), len(data), data))
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(data)
        return True

    @property
    def unsent(self) -> int:
        """Bytes that the socket has not taken yet."""
        writer = getattr(self._transport, "_io_writer", None)
        buffered: int = 0 if writer is None else writer.transport.get_write_buffer_size()
        return self._pending_data_size + buffered

    def _connect_command(self) -> bytes:
        if self._tls and not self.encrypted:
            self.abort()
            raise errors.Error("the server takes no TLS, which tls:// or a CA asks for, so nothing was said to it: "
                               "give it a certificate (`tokenmill nats-config --tls-cert`), or ask for none")
        command: bytes = super()._connect_command()
        return command

    @property
    def encrypted(self) -> bool:
        """Whether what is written goes out under TLS."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is None:  # a websocket
            return self._current_server is not None and self._current_server.uri.scheme == "wss"
        return writer.get_extra_info("ssl_object") is not None

    async def _process_pong(self) -> None:
        self._pings_outstanding = 0
        if self._pongs:
            future = self._pongs.pop(0)
            if not future.done():
                future.set_result(True)
            self._pongs_received += 1

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:
            await super()._process_err(err_msg)
            return
        error = errors.Error(f"the server said: {err_msg}")
        self._err = error
        await self._error_cb(error)
        await self._process_op_err(error)

    def _shorten_way(self, reader: Any) -> None:
        """Hand whole messages over where they arrive; all else goes the library's way, and what is behind it too."""
        feed, parser = reader.feed_data, self._ps

        def arrived(data: bytes) -> None:
            taken = 0
            if not reader._buffer and not parser.buf and parser.state == AWAITING_CONTROL_LINE:
                for message in whole_messages(data):
                    receiver = self.receivers.get(message.subscription)
                    if receiver is None:
                        break
                    taken = message.end
                    self.stats["in_msgs"] += 1
                    self.stats["in_bytes"] += len(message.payload)
                    receiver(message.subject, message.payload, message.headers)
            if taken < len(data):
                feed(data[taken:])

        reader.feed_data = arrived

    async def _read_loop(self) -> None:
        reader = getattr(self._transport, "_io_reader", None)  # a websocket has none
        if reader is not None:
            self._shorten_way(reader)
        await super()._read_loop()
        task = asyncio.current_task()
        if self.is_connected and task is self._reading_task and task is not None and not task.cancelling():
            await self._process_op_err(errors.Error("the read loop ended"))

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        # subscriptions made now are replayed on reconnection; all else would arrive late
        if self.is_connected:
            await super()._send_command(cmd, priority)

    async def _attempt_reconnect(self) -> None:
        self.abort()
        self._pending.clear()
        self._pending_data_size = 0
        await super()._attempt_reconnect()

    def abort(self) -> None:
        """Part from the server without waiting for it to read what is buffered."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    @property
    def started(self) -> bool:
        """Whether `connect` got as far as needing a `close`."""
        return self._flush_queue is not None

    @property
    def dead(self) -> bool:
        """Whether neither a connection nor an attempt at one is left."""
        if self.is_connected:
            return False
        return self._reconnection_task is None or bool(self._reconnection_task.done())


class NatsSubscription:
    """One handler under one pattern, on whatever connection the bus has."""

    def __init__(self, bus: "NatsBus", subject: str, handler: Handler, queue: str | None) -> None:
        self._bus = bus
        self.subject = subject
        self.queue = queue
        self.handler = handler
        self.active = True
        # handlers run as their subscriber, not as whoever connected: log fields and traces of services keep apart
        self.context = contextvars.copy_context()
        self.standing: Any = None  # the subscription of nats-py

    async def unsubscribe(self) -> None:
        if self.active:
            self.active = False
            await self._bus._drop(self)

    def receive(self, subject: str, data: bytes, headers: bytes | None) -> None:
        if self.active:
            self.context.run(self._bus._deliver, self.handler, subject, data, headers)


class NatsBus:
    """One service's connection. Made by `connect`; counts `handler_errors`, `client_errors`, `healed`, `reconnects`,
    and `refused`: what the broker did not let it say or hear."""

    def __init__(self, url: str, name: str, probe_s: float, credentials: Credentials = OPEN) -> None:
        self.url = url
        self.name = name
        self.refused = 0
        self.handler_errors = 0
        self.client_errors = 0
        self.healed = 0
        self.reconnects = 0
        self._probe_s = probe_s
        self._credentials = credentials
        # hears how late the loop woke the watchdog, and seconds to the broker and back; None when it did not answer
        self.watched: Callable[[float, float | None], None] = lambda loop_lag_s, round_trip_s: None
        self._shut: set[str] = set()  # patterns under which the broker lets this service hear nothing, in lower case
        self._closed = False
        self._last_error: BaseException | None = None
        self._subscriptions: dict[NatsSubscription, None] = {}
        # unguessable: whoever may listen there learns what this bus publishes with `unheard`
        self._inbox = f"{credentials.inbox}.{secrets.token_hex(11)}"
        self._numbers = itertools.count()
        self._unheard: dict[str, tuple[float, Callable[[], None]]] = {}  # oldest first
        self._settling: dict[str, asyncio.Future[None]] = {}
        self._client = _Client(_wants_tls(self.url, self._credentials))
        self._watchdog: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, url: str, name: str = "", timeout_s: float = 10.0, probe_s: float = 2.0,
                      credentials: Credentials = OPEN) -> "NatsBus":
        """A bus on the broker at `url` (several: split by commas), tried again until `timeout_s` has passed.

        Raises BusUnavailable with the last error when no broker answered or none let it in, ValueError when `url`
        cannot be one.
        `probe_s`: a connection silent for this long is tested, and renewed when the test is not answered in time.
        """
        bus = cls(url, name, probe_s, credentials)
        try:
            async with asyncio.timeout(timeout_s):
                await bus._open()
        except TimeoutError:
            bus._closed = True
            await bus._part()
            why = f": {bus._last_error}" if bus._last_error else ""
            if "authorization violation" in why.lower():
                raise BusUnavailable(f"the NATS server at {_without_secrets(url)} does not let this service in{why}. "
                                     "Point --nats-creds or TOKENMILL_NATS_CREDS at a credential that it knows"
                                     ) from bus._last_error
            raise BusUnavailable(f"no NATS server took a connection at {_without_secrets(url)} within {timeout_s:g} s"
                                 f"{why}. Start one, or point --nats or TOKENMILL_NATS at it") from bus._last_error
        except BaseException:
            bus._closed = True
            await bus._part()
            raise
        bus._watchdog = asyncio.create_task(bus._watch(), name=f"nats-watchdog-{name}")
        return bus

    @property
    def connected(self) -> bool:
        return not self._closed and bool(self._client.is_connected)

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None,
                      unheard: Callable[[], None] | None = None) -> None:
        client = self._client
        if not self.connected:
            raise BusUnavailable("this bus is closed" if self._closed
                                 else f"not connected to NATS at {_without_secrets(self.url)}")
        if len(data) > client.max_payload:
            raise ValueError(f"message of {len(data)} bytes to {subject} is over the broker's limit of "
                             f"{client.max_payload}: send it in parts or raise max_payload")
        if (unsent := client.unsent) > PENDING_LIMIT_BYTES:
            raise BusUnavailable(f"the broker at {_without_secrets(self.url)} takes no more: {unsent} bytes are "
                                 "waiting")
        check_subject(subject)
        reply = "" if unheard is None else self._expect(unheard)
        if not headers and client.send(subject, reply, data):
            return
        try:
            await client.publish(subject, data, reply, headers or None)
        except (errors.OutboundBufferLimitError, errors.ConnectionClosedError) as error:
            raise BusUnavailable(f"not connected to NATS at {_without_secrets(self.url)}") from error
        except (errors.BadSubjectError, errors.BadHeaderError) as error:
            raise ValueError(f"cannot publish to {subject!r}: {error}") from error

    async def subscribe(self, subject: str, handler: Handler, queue: str | None = None) -> NatsSubscription:
        check_pattern(subject)
        if self._closed:
            raise BusUnavailable("this bus is closed")
        subscription = NatsSubscription(self, subject, handler, queue)
        self._subscriptions[subscription] = None
        await self._stand(subscription)
        await self._settle()
        # without its inbox the wait above ends by time alone, perhaps before the refusal of `subject` has come
        if not self._shut.isdisjoint((subject.lower(), f"{self._inbox}.*".lower())):
            await subscription.unsubscribe()
            raise BusRefused(f"NATS does not let {self.name or 'this service'} subscribe to {subject}: its credential "
                             "is of another role or zone. `tokenmill nats-config` makes the right one")
        return subscription

    async def close(self) -> None:
        if self._closed:
            return
        if self.connected:
            # once this returns nobody is sent anything here any more
            for subscription in list(self._subscriptions):
                await subscription.unsubscribe()
            await self._settle()
        self._closed = True
        if self._watchdog is not None:
            self._watchdog.cancel()
        await self._part()

    async def _part(self) -> None:
        """End the client's tasks and its connection, also when the broker does not read any more."""
        try:
            async with asyncio.timeout(SETTLE_S):
                if self._client.started:
                    await self._client.close()
        except TimeoutError:
            _log.warning("nats_close_timed_out", url=_without_secrets(self.url))
        finally:
            self._client.abort()

    async def _open(self) -> None:
        """Connect `self._client`, a fresh one, and stand every subscription up on it."""
        try:
            shown = self._credentials
            await self._client.connect(
                nkeys_seed_str=shown.seed or None, user_credentials=shown.creds or None, tls=shown.tls(),
                servers=[server.strip() for server in self.url.split(",")], name=self.name or None,
                error_cb=self._on_error, disconnected_cb=self._on_disconnect, reconnected_cb=self._on_reconnect,
                lame_duck_mode_cb=self._on_lame_duck, connect_timeout=2, max_reconnect_attempts=-1,
                reconnect_time_wait=0.25, reconnect_to_server_handler=_next_server, ping_interval=5,
                max_outstanding_pings=2, pending_size=-1, skip_subject_validation=True)
        except errors.Error as error:
            raise ValueError(f"cannot use {_without_secrets(self.url)} as a NATS URL: {error}") from error
        inbox = await self._client.subscribe(f"{self._inbox}.*", cb=_unexpected)
        self._client.receivers[inbox._id] = self._on_inbox
        for subscription in list(self._subscriptions):
            if subscription.active:
                await self._stand(subscription)
        await self._settle()

    async def _stand(self, subscription: NatsSubscription) -> None:
        async def late(message: Any) -> None:
            # only for what arrives before the line below ran
            subscription.receive(message.subject, message.data, None)

        subscription.standing = await self._client.subscribe(subscription.subject, subscription.queue or "", cb=late)
        self._client.receivers[subscription.standing._id] = subscription.receive

    async def _drop(self, subscription: NatsSubscription) -> None:
        self._subscriptions.pop(subscription, None)
        if subscription.standing is not None and not self._client.is_closed:
            self._client.receivers.pop(subscription.standing._id, None)
            await subscription.standing.unsubscribe()

    def _deliver(self, handler: Handler, subject: str, data: bytes, headers: bytes | None) -> None:
        try:
            handler(Delivery(subject, data, _parse_headers(headers) if headers else _NO_HEADERS))
        except Exception:
            self.handler_errors += 1
            _log.exception("bus_handler_failed", subject=subject)

    # --- the inbox: "no responders", and messages to itself ----------------------------------------------------------

    def _expect(self, unheard: Callable[[], None]) -> str:
        now_s = asyncio.get_running_loop().time()
        self._forget(now_s)
        if len(self._unheard) >= UNHEARD_LIMIT:
            del self._unheard[next(iter(self._unheard))]
        number = str(next(self._numbers))
        self._unheard[number] = (now_s + UNHEARD_S, unheard)
        return f"{self._inbox}.{number}"

    def _forget(self, now_s: float) -> None:
        """Drop callbacks that will not be called any more."""
        while self._unheard:
            number = next(iter(self._unheard))
            if self._unheard[number][0] > now_s:
                break
            del self._unheard[number]

    def _on_inbox(self, subject: str, data: bytes, headers: bytes | None) -> None:
        number = subject.rpartition(".")[2]
        if headers is None or not headers.startswith(_NO_RESPONDERS):
            settled = self._settling.get(number)
            if settled is not None and not settled.done():
                settled.set_result(None)
            return
        _, unheard = self._unheard.pop(number, (0.0, None))
        if unheard is None:
            return
        try:
            unheard()
        except Exception:
            self.handler_errors += 1
            _log.exception("bus_unheard_failed")

    async def _settle(self, timeout_s: float = SETTLE_S) -> bool:
        """Wait until the broker has processed all that was sent. False when it did not answer in time.

        Goes round through the inbox and not through `flush()`, so that it can be cancelled.
        """
        number = str(next(self._numbers))
        settled = self._settling[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.publish(f"{self._inbox}.{number}", b"")
                await settled
            return True
        except (TimeoutError, errors.Error):
            return False
        finally:
            del self._settling[number]

    # --- keeping the connection alive ---------------------------------------------------------------------------------

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + self._probe_s
            await asyncio.sleep(self._probe_s)
            lag_s = loop.time() - due_s
            self._forget(loop.time())
            try:
                if self._client.is_closed or self._client.dead:
                    await self._replace()
                elif self._client.is_connected:
                    self.watched(lag_s, await self._probe(self._client.stats["in_msgs"]))
            except Exception:
                self.client_errors += 1
                _log.exception("nats_watchdog_failed")

    async def _probe(self, heard: int) -> float | None:
        """Seconds until a message to itself came back. None when it did not; reconnects if nothing else came either."""
        loop = asyncio.get_running_loop()
        sent_s = loop.time()
        if await self._settle(self._probe_s):
            return loop.time() - sent_s
        # an event loop that was blocked all the while has yet to read what arrived
        await asyncio.sleep(self._probe_s / 10)
        if self._client.is_connected and heard == self._client.stats["in_msgs"]:
            self.healed += 1
            _log.warning("nats_deaf", url=_without_secrets(self.url), do="reconnect")
            await self._client.force_reconnect()
        return None

    async def _replace(self) -> None:
        """Start over with a new client: the old one gave up."""
        self.healed += 1
        _log.warning("nats_client_gave_up", url=_without_secrets(self.url), do="new client")
        await self._part()
        self._client = _Client(_wants_tls(self.url, self._credentials))
        for subscription in self._subscriptions:
            subscription.standing = None  # its number means another one on the new client
        await self._open()

    async def _on_error(self, error: Exception) -> None:
        # runs inside nats-py's read loop, where an exception would deafen the client
        with contextlib.suppress(Exception):
            self.client_errors += 1
            if refused := _REFUSED.search(str(error)):
                self.refused += 1
                what, subject = refused.groups()
                if what == "subscription":
                    self._shut.add(subject)
                _log.error("nats_refused", what=what, subject=subject,
                           do="give this service a credential of its role and zone")
                return
            # what a server said explains more than the reset that follows it
            if not (isinstance(error, OSError) and isinstance(self._last_error, errors.Error)):
                self._last_error = error
            level = "warning" if self._client.is_connected else "debug"
            getattr(_log, level)("nats_client_error", error=str(error) or type(error).__name__)

    async def _on_disconnect(self) -> None:
        with contextlib.suppress(Exception):
            if not self._closed:
                _log.warning("nats_disconnected", url=_without_secrets(self.url))

    async def _on_reconnect(self) -> None:
        with contextlib.suppress(Exception):
            self._shut.clear()
            self.reconnects += 1
            _log.info("nats_reconnected", url=_without_secrets(self.url))

    async def _on_lame_duck(self) -> None:
        # with one server there is nowhere else to go before it closes
        if len(self._client.servers) > 1:
            await self._client.force_reconnect()


def _next_server(servers: list[Any], _: dict[str, Any]) -> tuple[Any, float]:
    """The least failed server, after a wait that keeps a thousand clients from arriving at once."""
    return min(servers, key=lambda server: server.reconnects), random.uniform(0.05, 0.25)


def _parse_headers(raw: bytes) -> dict[str, str]:
    """NATS headers: a version line, then `name: value` lines."""
    headers = {}
    for line in raw.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.strip().decode("utf-8", "replace")] = value.strip().decode("utf-8", "replace")
    return headers


def _wants_tls(url: str, credentials: Credentials) -> bool:
    """Whether no server may be spoken to in the clear: one URL that says so says it of all."""
    schemes = {server.strip().partition("://")[0] for server in url.split(",")}
    return bool(credentials.ca) or not schemes.isdisjoint({"tls", "wss"})


def _without_secrets(url: str) -> str:
    """`url` with what stands before an @ left out."""
    return ",".join(server.partition("://")[0] + "://" + server.rpartition("@")[2] if "@" in server else server
                    for server in url.split(","))


async def _unexpected(_: Any) -> None:
    """The inbox is read by `_on_inbox`; nats-py still wants a coroutine."""
