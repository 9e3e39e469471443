"""What Prometheus sees of a gateway.

Rules: the `gen_ai_server_*` histograms have the buckets of OpenTelemetry's conventions, the `mill_*` ones finer
buckets, because 10 ms per token is slow here; `mill_fleet_*`, what workers said of themselves, are read when scraped,
not kept in step, and named apart from the `mill_worker_*` that each worker serves: a sum over both would count twice.
One registry per gateway, so that several can live in one process. Labels are bounded: what clients and tenants' files
can make up is counted under `other` once there are `MAX_TENANTS` of it.
"""

import asyncio
import math
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import accumulate
from typing import TypeVar

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from gateway.receipts import Found
from gateway.speculation import accepted_at
from shared.errors import CODES
from shared.messages import Finished, WorkerStatus
from shared.probes import on_loop
from shared.receipts import MISSES
from shared.telemetry import metrics_served
from shared.trace_names import REQUEST_DURATION_BUCKETS, TIME_PER_OUTPUT_TOKEN_BUCKETS, TIME_TO_FIRST_TOKEN_BUCKETS

M = TypeVar("M", bound=MetricWrapperBase)
Exemplar = dict[str, str]  # `telemetry.exemplar_in`

MAX_TENANTS = 200  # three series each
OTHER = "other"

_FINE_FIRST_TOKEN_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.32, 0.48, 0.64, 1.0, 1.5,
                       2.0, 3.0, 5.0, 8.0, 12.0, 20.0, 40.0)
_FINE_PER_TOKEN_S = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0065, 0.008, 0.01, 0.0125, 0.015, 0.02, 0.03,
                     0.04, 0.06, 0.1, 0.2, 0.5, 1.0)

_FLEET_LABELS = ("worker", "model", "zone", "sku")
_FLEET_GAUGES = (  # field of a worker's status, name behind mill_fleet_, help
    ("running", "running", "Streams in the batch."),
    ("waiting", "waiting", "Streams that wait for their turn."),
    ("queued_tokens", "queued_tokens", "Prompt tokens still to compute."),
    ("blocks_total", "blocks", "KV blocks there are."),
    ("blocks_used", "blocks_held", "KV blocks held by streams."),
    ("decode_tok_s", "decode_tokens_per_second", "Decoding, lately."),
    ("prefill_tok_s", "prefill_tokens_per_second", "Prefill, as measured."),
    ("price_usd_per_hour", "price_usd_per_hour", "What the worker costs."),
)
_FLEET_COUNTERS = (
    ("tokens_total", "tokens", "Tokens sampled since the worker started."),
    ("draft_tokens_total", "draft_tokens", "Draft tokens verified since the worker started."),
    ("accepted_draft_tokens_total", "accepted_draft_tokens", "Draft tokens accepted since the worker started."),
    ("steps_total", "steps", "Steps since the worker started."),
)


class Metrics:
    """All figures of one gateway. `workers` lists the workers heard lately."""

    def __init__(self, workers: Callable[[], Iterable[WorkerStatus]]) -> None:
        self.registry = CollectorRegistry()
        self._scraped = CollectorRegistry()  # with what the process has beside: its memory, its bus, its loop
        self._scraped.register(self.registry)
        self._scraped.register(REGISTRY)
        own = self.registry
        self._requests = _by_labels(Counter("mill_gateway_requests", "HTTP requests by route and status.",
                                            ["route", "status"], registry=own))
        self.refused = Counter("mill_gateway_refused", "Requests answered with an error at once, by its code.",
                               ["code"], registry=own)
        for code in CODES:
            self.refused.labels(code)  # an alert needs the zero before the one
        self.active = Gauge("mill_gateway_active_streams", "Streams under way.", registry=own)
        self.prompt_tokens = Counter("mill_gateway_prompt_tokens", "Prompt tokens of finished requests.", registry=own)
        self.cached_tokens = Counter("mill_gateway_cached_tokens", "Prompt tokens that were cached.", registry=own)
        self.completion_tokens = Counter("mill_gateway_completion_tokens", "Tokens delivered to clients.", registry=own)
        self._tenant_tokens = _by_labels(Counter(
            "mill_gateway_tenant_tokens", "Tokens by tenant; kind: prompt (of finished requests, cached ones among "
            "them), cached, completion (all delivered).", ["tenant", "kind"], registry=own))
        self._tenants: set[str] = set()
        self.draft_tokens = Counter("mill_gateway_draft_tokens", "Draft tokens verified.", registry=own)
        self.accepted_draft_tokens = Counter("mill_gateway_accepted_draft_tokens", "Draft tokens accepted.",
                                             registry=own)
        self.late_draft_tokens = Counter("mill_gateway_late_draft_tokens", "Tokens proposed too late.", registry=own)
        self.draft_saved = Gauge("mill_gateway_draft_saved_seconds", "Stream time that drafts saved so far, their cost "
                                 "taken off; below 0 when they lost.", registry=own)
        self.drafter_seconds = Counter("mill_gateway_drafter_seconds", "Time that drafters worked on finished streams.",
                                       registry=own)
        self.drafter_usd = Counter("mill_gateway_drafter_usd", "What that time cost.", registry=own)
        # vLLM's names for the same, which benchmark tools read
        self._drafts = _by_labels(Counter("vllm:spec_decode_num_drafts", "Verifications, one for each stream and step.",
                                          ["model_name"], registry=own))
        self._draft_tokens = _by_labels(Counter("vllm:spec_decode_num_draft_tokens", "Draft tokens verified.",
                                                ["model_name"], registry=own))
        self._accepted = _by_labels(Counter("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.",
                                            ["model_name"], registry=own))
        self._accepted_at = Counter("vllm:spec_decode_num_accepted_tokens_per_pos", "The same by place in the draft.",
                                    ["model_name", "position"], registry=own)
        self.resubmissions = Counter("mill_gateway_resubmissions", "Attempts after the first, by cause.", ["cause"],
                                     registry=own)
        self.lost_messages = Counter("mill_gateway_lost_messages", "Gaps in the numbering of replies.", registry=own)
        self.cancels = Counter("mill_gateway_cancels", "Cancels sent to workers, and to routers that hold requests.",
                               registry=own)
        self.bad_messages = Counter("mill_gateway_bad_messages", "Messages that could not be decoded.", registry=own)
        self.tenants_refused = Gauge("mill_gateway_tenants_refused", "1 while the tenants as they stand cannot be "
                                     "used, and those read before hold.", registry=own)
        self.ledger_unwritten = Gauge("mill_gateway_ledger_unwritten", "Requests that have ended and are not in the "
                                      "ledger yet.", registry=own)
        self.ledger_failing = Gauge("mill_gateway_ledger_failing", "1 while the ledger does not answer.", registry=own)
        self.charged_usd = Counter("mill_gateway_charged_usd", "What requests were charged, in dollars.", ["model"],
                                   registry=own)
        self.cost_usd = Counter("mill_gateway_cost_usd", "What they cost us, as far as workers say, in dollars.",
                                ["model"], registry=own)
        self.predicted_cached_tokens = Counter(
            "mill_gateway_predicted_cached_tokens", "Prompt tokens that routers said were cached, where what was there "
            "is known too.", registry=own)
        self.found_cached_tokens = Counter("mill_gateway_found_cached_tokens", "Of the same requests, those that were.",
                                           registry=own)
        self.placements = Counter("mill_gateway_placements", "Streams whose prediction and cache hit are known, by "
                                  "class of miss.", ["miss"], registry=own)
        self.missed_tokens = Counter("mill_gateway_missed_tokens", "Prompt tokens that could have been cached, by class"
                                     " of miss.", ["miss"], registry=own)
        for miss in MISSES:
            self.placements.labels(miss)
            self.missed_tokens.labels(miss)
        served = ["gen_ai_operation_name", "gen_ai_request_model"]
        self._duration = _by_labels(Histogram("gen_ai_server_request_duration_seconds", "Whole requests.",
                                              [*served, "error_type"], buckets=REQUEST_DURATION_BUCKETS, registry=own))
        self._first_token = _by_labels(Histogram(
            "gen_ai_server_time_to_first_token_seconds", "Request to first token.", served,
            buckets=TIME_TO_FIRST_TOKEN_BUCKETS, registry=own))
        self._per_token = _by_labels(Histogram(
            "gen_ai_server_time_per_output_token_seconds", "Per token after the first.", served,
            buckets=TIME_PER_OUTPUT_TOKEN_BUCKETS, registry=own))
        self._fine_first_token = Histogram("mill_time_to_first_token_seconds", "Request to first token.",
                                           buckets=_FINE_FIRST_TOKEN_S, registry=own)
        self._fine_per_token = Histogram("mill_time_per_output_token_seconds", "Per token after the first.",
                                         buckets=_FINE_PER_TOKEN_S, registry=own)
        self.between_tokens = Tally("mill_inter_token_latency_seconds", "From one message with tokens of a stream to "
                                    "its next.", _FINE_PER_TOKEN_S)
        self.registry.register(self.between_tokens)
        self.registry.register(_Fleet(workers))

    def answered(self, route: str, status: int) -> None:
        """Note one HTTP request."""
        self._requests(route, str(status)).inc()

    def ended(self, operation: str, model: str, duration_s: float, error: str = "",
              exemplar: Exemplar | None = None) -> None:
        """Note one whole request; `error` is its code, empty for success."""
        self._duration(operation, model, error).observe(duration_s, exemplar)

    def stream_ended(self, operation: str, model: str, first_token_s: float, last_token_s: float, tokens: int,
                     exemplar: Exemplar | None = None) -> None:
        """Note one whole stream: seconds from the request to its first and last token, and how many it had."""
        self._first_token(operation, model).observe(first_token_s, exemplar)
        self._fine_first_token.observe(first_token_s, exemplar)
        if tokens > 1:
            per_token_s = (last_token_s - first_token_s) / (tokens - 1)
            self._per_token(operation, model).observe(per_token_s, exemplar)
            self._fine_per_token.observe(per_token_s, exemplar)

    def used(self, tenant: str, prompt: int, cached: int, completion: int) -> None:
        """Note the tokens of one request of `tenant`."""
        if tenant not in self._tenants:
            if len(self._tenants) >= MAX_TENANTS:
                tenant = OTHER
            else:
                self._tenants.add(tenant)
        for kind, tokens in (("prompt", prompt), ("cached", cached), ("completion", completion)):
            self._tenant_tokens(tenant, kind).inc(tokens)

    def drafted(self, model: str, end: Finished) -> None:
        """Note what drafts brought one stream."""
        drafts, verified, kept = self._drafts(model), self._draft_tokens(model), self._accepted(model)
        tokens = end.draft_tokens or end.accepted_draft_tokens or end.late_draft_tokens
        if not (end.drafter or tokens or end.draft_saved_s):
            return  # nothing; but the series are there, and begin with 0
        self.late_draft_tokens.inc(_counted(end.late_draft_tokens))
        if math.isfinite(end.draft_saved_s):
            self.draft_saved.inc(end.draft_saved_s)
        self.drafter_seconds.inc(_counted(end.drafter_s))
        self.drafter_usd.inc(_counted(end.drafter_usd))
        drafted, accepted_drafts = _counted(end.draft_tokens), _counted(end.accepted_draft_tokens)
        self.draft_tokens.inc(drafted)
        self.accepted_draft_tokens.inc(accepted_drafts)
        drafts.inc(_counted(end.draft_steps))
        verified.inc(drafted)
        kept.inc(accepted_drafts)
        for place, accepted in enumerate(accepted_at(end)):
            self._accepted_at.labels(model, str(place)).inc(_counted(accepted))

    def placed(self, known: Found) -> None:
        """Note what was predicted of one stream, and what was there."""
        self.predicted_cached_tokens.inc(_counted(known.predicted_tokens))
        self.found_cached_tokens.inc(_counted(known.cached_tokens))
        self.placements.labels(known.miss).inc()
        self.missed_tokens.labels(known.miss).inc(known.missed_tokens)

    def served(self, port: int, host: str, ready: Callable[[], bool]) -> AbstractContextManager[None]:
        """Let Prometheus read these figures on `port` while the block runs, and probes ask; 0: nothing is served."""
        return metrics_served(_OnLoop(self.registry), port, host, ready)

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """What Prometheus scrapes, and its content type. Exemplars are in it for who accepts OpenMetrics."""
        encode, content_type = choose_encoder(accept)
        return encode(self._scraped), content_type


def _by_labels(metric: M) -> Callable[..., M]:
    """Its children, by labels that are bounded: found in a twentieth of the time that `labels` takes (2 us)."""
    return cache(metric.labels)


def _counted(amount: float) -> float:
    """What a counter takes of another's figure: one that is negative or no number would stop it, or spoil it."""
    return amount if math.isfinite(amount) and amount > 0 else 0.0


class Tally(Collector):
    """A histogram for what happens with every token: written by one thread, without locks, in a sixth of the time.

    timeit on a busy machine: 0.44 us and 2.56 us of prometheus_client's. A gateway may have 50,000 messages a second.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def note(self, amount: float) -> None:
        """Take in one."""
        self._counts[bisect_left(self._bounds, amount)] += 1
        self._sum += amount

    def collect(self) -> Iterable[Metric]:
        # prometheus_client writes 1.0 for a bound that is whole
        bounds = [*map(str, map(float, self._bounds)), "+Inf"]
        buckets = list(zip(bounds, accumulate(map(float, self._counts)), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum)


class _OnLoop(Collector):
    """Figures of what changes on the running loop, read there by whichever thread asks."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()

    def collect(self) -> Iterable[Metric]:
        if threading.get_ident() == self._thread:
            return self._registry.collect()
        return on_loop(self._loop, lambda: list(self._registry.collect()))


class _Fleet(Collector):
    def __init__(self, workers: Callable[[], Iterable[WorkerStatus]]) -> None:
        self._workers = workers

    def collect(self) -> Iterable[Metric]:
        seen = list(self._workers())
        kinds = ((GaugeMetricFamily, _FLEET_GAUGES), (CounterMetricFamily, _FLEET_COUNTERS))
        for kind, figures in kinds:
            for field, name, help_text in figures:
                family = kind(f"mill_fleet_{name}", help_text, labels=_FLEET_LABELS)
                for worker in seen:
                    family.add_metric([worker.id, worker.model, worker.zone, worker.sku], getattr(worker, field))
                yield family
