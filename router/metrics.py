"""What Prometheus sees of a router.

One registry per router, so that several can live in one process.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from router.admission import REASONS
from shared.messages import WorkerStatus
from shared.telemetry import metrics_served
from shared.tiers import TIERS

_ESTIMATE_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_WAITED_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_DECISION_S = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)

# measured by each worker, told in its statuses, set by nobody; 0 while unknown
LEARNED = {
    "prefill_tokens_per_second": "how fast the worker computes prompts.",
    "step_base_seconds": "what a step of the worker costs with nobody in it.",
    "step_row_seconds": "what each stream adds to a step of the worker.",
    "stream_tokens": "what streams of the worker have said of late.",
}


class Metrics:
    """All figures of one router."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.placed = Counter("mill_router_placed", "Requests given to a worker.", ["worker"], registry=own)
        self.refused = Counter("mill_router_refused", "Requests refused, by error code.", ["code"], registry=own)
        self.turned_away = Counter("mill_router_turned_away", "Requests for which a full mesh had no place, by reason: "
                                   "full, over_share (their tenant's), gave_way (to another tenant), too_long, "
                                   "deadline (out of reach when they came), expired (while they waited).", ["reason"],
                                   registry=own)
        self.held = Gauge("mill_router_held_requests", "Requests that wait for room at a worker.", ["tier"],
                          registry=own)
        self.waited_s = Histogram("mill_router_held_seconds", "How long placed requests had waited for room.",
                                  ["tier"], buckets=_WAITED_S, registry=own)
        for reason in REASONS:
            self.turned_away.labels(reason)
        for tier in TIERS:
            self.held.labels(tier)
            self.waited_s.labels(tier)
        self.unheard = Counter("mill_router_unheard", "Placements at which nobody listened.", registry=own)
        self.lost = Counter("mill_router_lost", "Messages that could not leave.", ["cause"], registry=own)
        self.bad_messages = Counter("mill_router_bad_messages", "Messages that could not be decoded.", registry=own)
        self.repeated = Counter("mill_router_repeated", "Requests that arrived again.", registry=own)
        self.prompt_tokens = Counter("mill_router_prompt_tokens", "Prompt tokens of placed requests.", registry=own)
        self.cached_tokens = Counter("mill_router_cached_tokens", "Of those, believed to be cached.", registry=own)
        self.gaps = Gauge("mill_router_kv_gaps_total", "Times that cache events of a worker were missing.",
                          registry=own)
        self.alarms = Counter("mill_router_worker_mismatches", "Workers that differ from what they should be: kv_blind "
                              "(other block hashes), drift (a cache other than its events told), recipe, vocabulary "
                              "(other than their peers').", ["kind"], registry=own)
        for kind in ("kv_blind", "drift", "recipe", "vocabulary"):
            self.alarms.labels(kind)  # an alert needs the zero before the one
        self.blind_workers = Gauge("mill_router_kv_blind_workers", "Workers placed by load alone.", registry=own)
        self.snapshots_asked = Counter("mill_router_snapshots_asked", "Snapshot requests sent.", registry=own)
        self.indexed_blocks = Gauge("mill_router_indexed_blocks", "Different blocks in the index.", registry=own)
        self.indexed_bytes = Gauge("mill_router_indexed_bytes", "Memory of the index.", registry=own)
        self.overflow = Gauge("mill_router_index_overflow_total", "Blocks that did not fit into the index.",
                              registry=own)
        self.workers = Gauge("mill_router_workers", "Workers heard lately.", registry=own)
        self.learned = {name: Gauge(f"mill_router_worker_{name}", f"What placement reckons with: {what}", ["worker"],
                                    registry=own) for name, what in LEARNED.items()}
        self.estimate_s = Histogram("mill_router_estimate_seconds", "Expected time to the first token.",
                                    buckets=_ESTIMATE_S, registry=own)
        self.decision_s = Histogram("mill_router_decision_seconds", "Time to place one request.",
                                    buckets=_DECISION_S, registry=own)

    def learn(self, status: WorkerStatus) -> None:
        """What a worker told of its rates."""
        told = status.prefill_tok_s, status.step_base_s, status.step_row_s, status.stream_tokens
        for gauge, figure in zip(self.learned.values(), told, strict=True):
            gauge.labels(status.id).set(figure)

    def forget(self, worker: str) -> None:
        """It is gone, and with it all that was counted of it alone."""
        for own in (self.placed, *self.learned.values()):
            own.remove(worker)

    def served(self, port: int, host: str = "127.0.0.1",
               ready: Callable[[], bool] = lambda: True) -> AbstractContextManager[None]:
        """Let Prometheus read these figures on `port` while the block runs, and probes ask; 0: nothing is served."""
        return metrics_served(self.registry, port, host, ready)
