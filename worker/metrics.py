"""What Prometheus sees of a worker: read when asked, counted by those who do the work.

One registry per worker, so that several can live in one process.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shared.telemetry import exemplar_in, metrics_served
from shared.trace_names import FINE_TIME_PER_OUTPUT_TOKEN_BUCKETS, MASK_BUCKETS, TIME_TO_FIRST_TOKEN_BUCKETS
from worker.sequence import Sequence

Figures = Mapping[str, float]

COUNTERS = {
    "tokens": "Tokens delivered.",
    "steps": "Steps of the decoder.",
    "failed_steps": "Steps that raised.",
    "draft_tokens": "Drafts verified.",
    "accepted_draft_tokens": "Drafts that agreed.",
    "drafts_wanted": "Times that a stream could take drafts in a step.",
    "drafts_ready": "Of those, a proposal that fitted was there.",
    "drafts_foreseen": "Of those, one whose condition had come true.",
    "outcomes_prepared": "Times that a stream went on and outcomes of that had been prepared for.",
    "outcomes_hit": "Of those, the one that came was among them.",
    "verified_drafts": "Verifications, one for each stream and step.",
    "late_draft_tokens": "Tokens proposed for places that were taken when they came.",
    "forced_tokens": "Tokens that came with others because a grammar left no choice.",
    "grammars_compiled": "Grammars compiled, or found to be of no use.",
    "grammar_seconds": "Time that requests waited for their grammars to be compiled or copied.",
    "grammars_refused": "Requests whose grammar could not be used.",
    "grammars_slow": "Grammars that took too long to compile; their threads may still be at it.",
    "grammars_broken": "Streams ended because their grammar outgrew its limits, or left them nothing to say.",
    "draft_holds": "Steps that were held back for drafts.",
    "draft_hold_seconds": "For how long, all together.",
    "drafter_seconds": "Time that drafters worked for this worker.",
    "drafter_left": "Times that a drafter was left alone because it did not pay.",
    "alien_proposals": "Proposals of drafters that are not followed, or for streams that are not open.",
    "strange_proposals": "Proposals for a text that is not the one here.",
    "repeated_proposals": "Proposals that came twice.",
    "preemptions": "Sequences that gave their blocks back to older ones.",
    "kv_repairs": "Blocks whose owner was wrong and was mended.",
    "tier_saves": "KV blocks copied to the host-memory tier.",
    "tier_restores": "KV blocks found in the tier and copied back instead of computed.",
    "tier_drops": "KV blocks that left the tier unused.",
    "lost_messages": "Messages that could not leave.",
}
GAUGES = {
    "running": "Streams in the batch.",
    "waiting": "Streams in the queue.",
    "grammars_waiting": "Requests whose grammars are still to be compiled.",
    "queued_tokens": "Prompt tokens still to compute.",
    "blocks": "KV blocks there are.",
    "blocks_held": "KV blocks held by streams.",
    "blocks_named": "KV blocks that can be reused.",
    "tier_blocks": "KV blocks in the host-memory tier.",
    "tier_bytes": "Memory of the KV blocks in the tier.",
    "prefill_tokens_per_second": "Learned rate at which prompts are computed.",
    "step_base_seconds": "Learned cost of a step.",
    "step_row_seconds": "Learned cost of a row.",
    "draft_wait": "1 while steps are held back for drafts.",
    "draft_latency_seconds": "From telling the drafter to its fresh drafts, lately; a wait lasts twice that at most.",
    "draft_saved_seconds": "Stream time that drafts saved, their cost taken off; below 0 when they lost.",
    "drafter_left_alone": "1 while the drafter does not pay and is told nothing.",
    "drafter_gain": "Speed with the drafter over that without, as measured last; 0 while unknown.",
    "draft_lead_tokens": "Tokens by which streams had gone on when proposals came, lately.",
}


class Metrics(Collector):
    """The figures that `read` returns by name, and the distributions of ended streams."""

    def __init__(self, read: Callable[[], Figures]) -> None:
        self.registry = CollectorRegistry()
        self._read = read
        self._queue_s = Histogram("mill_worker_queue_seconds", "From arrival to admission.",
                                  buckets=TIME_TO_FIRST_TOKEN_BUCKETS, registry=self.registry)
        self._prefill_s = Histogram("mill_worker_prefill_seconds", "From admission to the first token.",
                                    buckets=TIME_TO_FIRST_TOKEN_BUCKETS, registry=self.registry)
        self._token_s = Histogram("mill_worker_time_per_output_token_seconds", "Mean of a stream behind its first.",
                                  buckets=FINE_TIME_PER_OUTPUT_TOKEN_BUCKETS, registry=self.registry)
        self.mask_s = Histogram("mill_worker_mask_seconds",
                                "Finding out what a grammar permits, of a stream in a step.",
                                buckets=MASK_BUCKETS, registry=self.registry)
        self.step_masks_s = Histogram("mill_worker_step_mask_seconds",
                                      "The same of all streams of a step, which waits for it.",
                                      buckets=MASK_BUCKETS, registry=self.registry)
        self.registry.register(self)

    def served(self, port: int, host: str, ready: Callable[[], bool] = lambda: True) -> AbstractContextManager[None]:
        """Let Prometheus read these figures on `port` while the block runs, and probes ask; 0: nothing is served."""
        return metrics_served(self.registry, port, host, ready)

    def observe(self, sequence: Sequence, now: float) -> None:
        """Take in a stream that has ended."""
        if sequence.admitted_at is None or sequence.first_token_at is None:
            return
        exemplar = exemplar_in(sequence.traceparent)
        self._queue_s.observe(sequence.admitted_at - sequence.arrived_at, exemplar)
        self._prefill_s.observe(sequence.first_token_at - sequence.admitted_at, exemplar)
        behind_first = len(sequence.tokens) - sequence.resumed_length - 1
        if behind_first > 0:
            self._token_s.observe((now - sequence.first_token_at) / behind_first, exemplar)

    def collect(self) -> Iterator[Metric]:
        figures = self._read()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"mill_worker_{name}", text, value=figures[name])
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"mill_worker_{name}", text, value=figures[name])

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: registering must not read figures that are not there yet."""
        return []
