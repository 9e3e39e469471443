"""What Prometheus sees of the one connection and the one event loop that a service has.

A process registers it beside its own figures, so that every service shows it under the same names.
"""

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

# 1 ms is a tick of the loop; from 50 ms on streams stutter (alert LoopLag)
_LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)

COUNTERS = {
    "reconnects": "Times that the connection to NATS was made again.",
    "refused": "Subjects on which NATS did not let this service say or hear something.",
    "healed": "Times that a connection was renewed because it was deaf.",
    "client_errors": "Errors of the connection.",
    "handler_errors": "Messages whose handler failed.",
}


class Counted(Protocol):
    """A bus as far as its figures go."""

    reconnects: int
    refused: int
    healed: int
    client_errors: int
    handler_errors: int

    @property
    def connected(self) -> bool:
        """Whether a publish would leave this process now."""


class BusMetrics(Collector):
    """The figures of one bus. Hand `observe` to what looks after it."""

    def __init__(self, bus: Counted) -> None:
        self.registry = CollectorRegistry()
        self._bus = bus
        self._loop_s = Histogram("mill_loop_lag_seconds", "How much later than asked for the event loop woke, every "
                                 "few seconds.", buckets=_LAG_S, registry=self.registry)
        self._trip_s = Histogram("mill_bus_round_trip_seconds", "To NATS and back with a message to itself, every few "
                                 "seconds.", buckets=_LAG_S, registry=self.registry)
        self.registry.register(self)

    def observe(self, loop_lag_s: float, round_trip_s: float | None) -> None:
        """Note one look: how late the loop was, and how long NATS took; None when it did not answer in time."""
        self._loop_s.observe(max(loop_lag_s, 0.0))
        if round_trip_s is not None:
            self._trip_s.observe(round_trip_s)

    def collect(self) -> Iterator[Metric]:
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"mill_bus_{name}", text, value=getattr(self._bus, name))
        yield GaugeMetricFamily("mill_bus_connected", "1 while a message would leave.", value=self._bus.connected)
