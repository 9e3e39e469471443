"""The bus inside one process: the all-in-one mode, and the broker that tests break on purpose.

Rule: behaves like NATS as far as `shared.bus` promises anything. Every decision comes from one generator seeded once,
so that a seed replays a whole history of delay, loss, duplication, reordering and queue-group choices.

    broker = MemoryBroker(Faults(delay_s=(0.0, 0.02), loss=0.01), seed=7)
    bus = MemoryBus(broker)     # one per service; closing it is how a test crashes the service
    broker.stop()               # an outage: publishing raises, what was under way is lost, subscriptions come back
"""

import asyncio
import contextvars
import heapq
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import structlog

from shared.bus import BusUnavailable, Delivery, Handler
from shared.subject_index import REMEMBERED_SUBJECTS, SubjectIndex, check_pattern, matches

MAX_PAYLOAD_BYTES = 1 << 20  # what a nats-server takes unless told otherwise

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_log = structlog.get_logger("shared.memory_bus")


class Copy(NamedTuple):
    """One arrival of a message."""

    delay_s: float
    in_order: bool  # behind all earlier messages of the same sender on the same subject


@dataclass(frozen=True)
class Faults:
    """What can happen to a message on its way to one subscriber. Probabilities, and (least, most) seconds.

    `overrides` are tried first: the first pattern that matches the subject decides alone.
    """

    delay_s: tuple[float, float] = (0.0, 0.0)
    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0  # such a message waits `reorder_s` more while later ones pass it
    reorder_s: tuple[float, float] = (0.0, 0.05)
    overrides: tuple[tuple[str, "Faults"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("loss", "duplication", "reordering"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"Faults.{name} is a probability, got {getattr(self, name)}")
        for name in ("delay_s", "reorder_s"):
            least, most = getattr(self, name)
            if not 0.0 <= least <= most:
                raise ValueError(f"Faults.{name} is (least, most) seconds, got {(least, most)}")
        for pattern, _ in self.overrides:
            check_pattern(pattern)

    def on(self, subject: str) -> "Faults":
        """The faults of one subject."""
        for pattern, faults in self.overrides:
            if matches(pattern, subject):
                return faults
        return self

    def fate(self, rng: random.Random) -> tuple[Copy, ...]:
        """How one message arrives: not at all, once or twice. Always draws the same number of times but for copies."""
        if rng.random() < self.loss:
            return ()
        copies = 2 if rng.random() < self.duplication else 1
        return tuple(self._copy(rng) for _ in range(copies))

    def _copy(self, rng: random.Random) -> Copy:
        delay_s = rng.uniform(*self.delay_s)
        if rng.random() < self.reordering:
            return Copy(delay_s + rng.uniform(*self.reorder_s), False)
        return Copy(delay_s, True)


class MemoryBroker:
    """What the buses of one process share. Counts what it does: `published`, `delivered`, `lost`, `handler_errors`."""

    def __init__(self, faults: Faults | None = None, seed: int = 0,
                 max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> None:
        self.faults = faults  # may be exchanged while running
        self.max_payload_bytes = max_payload_bytes
        self.running = True
        self.published = 0
        self.delivered = 0
        self.lost = 0
        self.handler_errors = 0
        self._rng = random.Random(seed)
        self._index: SubjectIndex[MemorySubscription] = SubjectIndex()
        self._outage = 0
        self._under_way: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = itertools.count()

    def stop(self) -> None:
        """The broker dies: publishing raises BusUnavailable and what was under way is lost."""
        self.running = False
        self._outage += 1
        self.lost += len(self._under_way)
        self._under_way.clear()

    def start(self) -> None:
        """The broker is back, and every open bus with its subscriptions."""
        self.running = True

    def _send(self, sender: "MemoryBus", delivery: Delivery, unheard: Callable[[], None] | None) -> None:
        route = self._index.route(delivery.subject)
        self.published += 1
        loop = asyncio.get_running_loop()
        if self.faults is None:
            for subscription in route.all:
                loop.call_soon(self._deliver, self._outage, subscription, delivery, context=subscription.context)
            for group in route.groups:
                member = group[0] if len(group) == 1 else group[int(self._rng.random() * len(group))]
                loop.call_soon(self._deliver, self._outage, member, delivery, context=member.context)
            if unheard is not None and not route.all and not route.groups:
                loop.call_soon(self._report_unheard, self._outage, sender, unheard)
            return
        faults = self.faults.on(delivery.subject)
        receivers = list(route.all) + [self._rng.choice(group) for group in route.groups]
        for subscription in receivers:
            copies = faults.fate(self._rng)
            self.lost += not copies
            for copy in copies:
                due_s = loop.time() + copy.delay_s
                if copy.in_order:
                    due_s = subscription.keep_order(sender.number, delivery.subject, due_s, loop.time())
                self._later(loop, due_s, subscription.context.run,
                            (self._deliver, self._outage, subscription, delivery))
        if unheard is not None and not receivers:
            for copy in faults.fate(self._rng)[:1]:
                self._later(loop, loop.time() + copy.delay_s, self._report_unheard, (self._outage, sender, unheard))

    def _later(self, loop: asyncio.AbstractEventLoop, due_s: float, call: Callable[..., None],
               arguments: tuple[Any, ...]) -> None:
        # a heap of our own, because the loop's timers do not keep the order of equal times
        heapq.heappush(self._under_way, (due_s, next(self._serial), call, arguments))
        loop.call_at(due_s, self._run_due, due_s)

    def _run_due(self, until_s: float) -> None:
        while self._under_way and self._under_way[0][0] <= until_s:
            _, _, call, arguments = heapq.heappop(self._under_way)
            call(*arguments)

    def _deliver(self, outage: int, subscription: "MemorySubscription", delivery: Delivery) -> None:
        if outage != self._outage or not subscription.active:
            self.lost += 1
            return
        self.delivered += 1
        try:
            subscription.handler(delivery)
        except Exception:
            self.handler_errors += 1
            _log.exception("bus_handler_failed", subject=delivery.subject)

    def _report_unheard(self, outage: int, sender: "MemoryBus", unheard: Callable[[], None]) -> None:
        if outage != self._outage or sender.closed:
            return
        try:
            unheard()
        except Exception:
            self.handler_errors += 1
            _log.exception("bus_unheard_failed")


class MemorySubscription:
    """One handler under one pattern."""

    __slots__ = ("_bus", "_latest_due_s", "active", "context", "handler", "pattern")

    def __init__(self, bus: "MemoryBus", pattern: str, handler: Handler) -> None:
        self._bus = bus
        self.pattern = pattern
        self.handler = handler
        self.active = True
        # handlers run as their subscriber, not as the sender: log fields and traces of services keep apart
        self.context = contextvars.copy_context()
        self._latest_due_s: dict[tuple[int, str], float] = {}  # (sender, subject) -> its latest ordered arrival

    def keep_order(self, sender: int, subject: str, due_s: float, now_s: float) -> float:
        """When a message that could arrive at `due_s` does, so that it stays behind what its sender sent before."""
        due_s = max(due_s, self._latest_due_s.get((sender, subject), due_s))
        self._latest_due_s[sender, subject] = due_s
        if len(self._latest_due_s) > 4 * REMEMBERED_SUBJECTS:
            self._latest_due_s = {key: due for key, due in self._latest_due_s.items() if due > now_s}
        return due_s

    async def unsubscribe(self) -> None:
        self._bus._drop(self)


class MemoryBus:
    """One service's connection to a MemoryBroker."""

    def __init__(self, broker: MemoryBroker) -> None:
        self.broker = broker
        self.number = next(broker._serial)
        self.closed = False
        self._subscriptions: dict[MemorySubscription, None] = {}

    @property
    def connected(self) -> bool:
        return self.broker.running and not self.closed

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None,
                      unheard: Callable[[], None] | None = None) -> None:
        broker = self.broker
        if self.closed:
            raise BusUnavailable("this bus is closed")
        if not broker.running:
            raise BusUnavailable("the broker is down")
        if len(data) > broker.max_payload_bytes:
            raise ValueError(f"message of {len(data)} bytes to {subject} is over the broker's limit of "
                             f"{broker.max_payload_bytes}: send it in parts or raise max_payload")
        broker._send(self, Delivery(subject, data, dict(headers) if headers else _NO_HEADERS), unheard)

    async def subscribe(self, subject: str, handler: Handler, queue: str | None = None) -> MemorySubscription:
        if self.closed:
            raise BusUnavailable("this bus is closed")
        subscription = MemorySubscription(self, subject, handler)
        self.broker._index.add(subject, subscription, queue)
        self._subscriptions[subscription] = None
        return subscription

    async def close(self) -> None:
        self.crash()

    def crash(self) -> None:
        """Close at once, from outside the event loop's tasks too: no delivery reaches this bus any more."""
        self.closed = True
        for subscription in list(self._subscriptions):
            self._drop(subscription)

    def _drop(self, subscription: MemorySubscription) -> None:
        if subscription.active:
            subscription.active = False
            del self._subscriptions[subscription]
            self.broker._index.remove(subscription.pattern, subscription)
