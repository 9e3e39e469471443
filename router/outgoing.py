"""What leaves a router: one task sends, in order, so that no handler waits for the bus.

Rule: what cannot leave is dropped and counted. The gateway sends a request again that nobody accepted, and everything
else is said again with the next heartbeat.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import structlog

from router.metrics import Metrics
from shared import subjects
from shared.bus import Bus, BusUnavailable
from shared.messages import Reply, StepReplies, Wire, encode

# messages that wait for the bus; past it they are dropped, as a broker would
MAX_OUTGOING = 10_000
MAX_GATEWAYS = 4096

_log = structlog.get_logger("router")


class Outgoing(NamedTuple):
    """One message. `unheard`: nobody listens there. `too_large`: the bus does not carry it."""

    subject: str
    data: bytes
    headers: Mapping[str, str] | None = None
    unheard: Callable[[], None] | None = None
    too_large: Callable[[], None] | None = None


class Outbox:
    """The messages of one router that wait to leave, and the numbers of its replies."""

    def __init__(self, bus: Bus, router: str, epoch: int, metrics: Metrics) -> None:
        self._bus = bus
        self._router = router
        self._epoch = epoch
        self._metrics = metrics
        self._waiting: asyncio.Queue[Outgoing] = asyncio.Queue(MAX_OUTGOING)
        self._reply_seq: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return self._waiting.qsize()

    def hand_over(self, out: Outgoing) -> None:
        """Let it leave behind all others."""
        try:
            self._waiting.put_nowait(out)
        except asyncio.QueueFull:
            self._metrics.lost.labels("queue_full").inc()
            _log.warning("outgoing_full", subject=out.subject)

    def publish(self, subject: str, message: Wire) -> None:
        """Let a message leave that nobody is told of if it cannot."""
        self.hand_over(Outgoing(subject, encode(message)))

    def reply(self, gateway: str, replies: tuple[Reply, ...]) -> None:
        """Tell a gateway, under the next number of what it is told."""
        seq = self._reply_seq.pop(gateway, 0) + 1
        self._reply_seq[gateway] = seq
        if len(self._reply_seq) > MAX_GATEWAYS:
            self._reply_seq.popitem(last=False)
        self.publish(subjects.replies(gateway), StepReplies(self._router, self._epoch, seq, replies))

    async def send(self) -> None:
        """Publish what was handed over, in order, until cancelled."""
        while True:
            out = await self._waiting.get()
            try:
                await self._bus.publish(out.subject, out.data, out.headers, out.unheard)
            except BusUnavailable:
                self._metrics.lost.labels("bus").inc()
                _log.warning("publish_failed", subject=out.subject)
            except ValueError as error:
                self._metrics.lost.labels("too_large").inc()
                _log.warning("publish_refused", subject=out.subject, reason=str(error))
                if out.too_large is not None:
                    out.too_large()
            finally:
                self._waiting.task_done()

    async def all_sent(self) -> None:
        """Until nothing waits."""
        await self._waiting.join()
