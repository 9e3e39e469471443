"""The bus: what a service may ask of the transport, and nothing more.

Rule: at most once, in order per sender and subject, no replies. A handler is called on the event loop and only hands
over: it never blocks and never awaits. Loss, duplication and delay are the receiver's problem; sequence numbers tell.
Implementations: `shared.nats_bus.NatsBus`, `shared.memory_bus.MemoryBus`; both pass the same tests.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol


class Delivery(NamedTuple):
    """One message as it arrived."""

    subject: str
    data: bytes
    headers: Mapping[str, str]


Handler = Callable[[Delivery], None]


class BusUnavailable(Exception):
    """The transport cannot take a message now (broker gone). Nothing was queued; a retry can help."""


class BusRefused(Exception):
    """The transport does not let this service listen there. Asking again helps only with another credential."""


class Subscription(Protocol):
    """One standing interest in a subject."""

    async def unsubscribe(self) -> None:
        """Stop deliveries. Idempotent."""


class Bus(Protocol):
    """Publish and subscribe on NATS-style subjects (tokens split by dots, `*` one token, `>` the rest)."""

    @property
    def connected(self) -> bool:
        """Whether a publish would leave this process now."""

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str] | None = None,
                      unheard: Callable[[], None] | None = None) -> None:
        """Send once. Raises `BusUnavailable` at once when the broker is gone, ValueError when `data` is too large.

        `unheard` is called later, at most once, if nobody was subscribed to `subject` (NATS "no responders").
        """

    async def subscribe(self, subject: str, handler: Handler, queue: str | None = None) -> Subscription:
        """Call `handler` for each message; with `queue`, each message reaches one member of the group.

        Raises `BusRefused` where the transport knows who may listen, and this service may not.
        """

    async def close(self) -> None:
        """Flush what is out and part from the broker. Idempotent."""
