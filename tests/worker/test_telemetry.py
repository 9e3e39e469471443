"""What is left of a stream in traces and figures."""

from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import generate_latest

from shared.messages import Finished, Proposal
from shared.telemetry import configure_tracing
from shared.tokens import pack
from tests.worker.builders import Bench, mock_decoder, plain, request
from tests.worker.mesh import WALL_S
from worker.events import Ended
from worker.metrics import COUNTERS, GAUGES, Metrics
from worker.trace import record_stream

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"


def ended_stream() -> Ended:
    bench = Bench(mock_decoder())
    bench.now = 100.0
    bench.add(request(max_tokens=5))
    sequence = next(iter(bench.scheduler.live))
    sequence.traceparent = TRACEPARENT
    bench.finish()
    (end,) = bench.ends["r", 1]
    assert isinstance(end, Finished)
    return Ended(sequence, end)


def test_a_stream_leaves_one_span_with_its_parts_under_the_trace_of_its_request() -> None:
    exporter = InMemorySpanExporter()
    tracing = configure_tracing("worker", "w1", exporter=exporter)
    try:
        event = ended_stream()
        record_stream(event.sequence, event.reply, "w1", "d1", "eu", 100.05, WALL_S)
    finally:
        tracing.shutdown()
        configure_tracing("worker", "w1")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"generate", "queue", "prefill", "decode"}
    whole = spans["generate"]
    assert whole.parent is not None and f"{whole.context.trace_id:032x}" == TRACE
    assert all(spans[name].parent == whole.context for name in ("queue", "prefill", "decode"))
    assert whole.start_time is not None and abs(whole.start_time / 1e9 - (WALL_S - 0.05)) < 1e-3
    assert spans["queue"].end_time == spans["prefill"].start_time
    assert spans["prefill"].end_time == spans["decode"].start_time
    assert whole.attributes is not None and whole.attributes["gen_ai.usage.output_tokens"] == 5


def test_a_stream_that_verified_drafts_shows_for_how_long_and_with_what_luck() -> None:
    exporter = InMemorySpanExporter()
    tracing = configure_tracing("worker", "w1", exporter=exporter)
    bench = Bench(mock_decoder())
    asked = request(max_tokens=8)
    truth = plain(asked)
    bench.add(asked)
    sequence = next(iter(bench.scheduler.live))
    bench.step()
    start = sequence.prompt_length
    assert bench.scheduler.speculation.drafts.offer(Proposal("r", 1, start + 1, pack([*truth[1:3], truth[3] ^ 1])))
    bench.finish()
    (end,) = bench.ends["r", 1]
    assert isinstance(end, Finished)
    try:
        record_stream(sequence, end, "w1", "d1", "eu", bench.now, WALL_S)
    finally:
        tracing.shutdown()
        configure_tracing("worker", "w1")
    spans = {span.name: span for span in exporter.get_finished_spans()}
    verify = spans["verify"]
    assert verify.parent == spans["decode"].context
    assert verify.attributes is not None
    assert verify.attributes["mill.draft.tokens"] == 3
    assert verify.attributes["mill.draft.accepted_tokens"] == 2
    assert verify.attributes["mill.steps"] == 1


def test_every_figure_is_served_and_streams_are_observed() -> None:
    metrics = Metrics(lambda: dict.fromkeys([*COUNTERS, *GAUGES], 3))
    metrics.observe(ended_stream().sequence, 100.05)
    text = generate_latest(metrics.registry).decode()
    for name in COUNTERS:
        assert f"mill_worker_{name}_total 3.0" in text
    for name in GAUGES:
        assert f"mill_worker_{name} 3.0" in text
    assert "mill_worker_queue_seconds_count 1.0" in text
    assert "mill_worker_time_per_output_token_seconds_count 1.0" in text
