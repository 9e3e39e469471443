"""Logs without prompts, traces that arrive, metrics that can be read."""

import asyncio
import contextlib
import json
import logging
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import prometheus_client
import pytest
import structlog
from opentelemetry.context import Context
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from shared.memory_bus import MemoryBroker, MemoryBus
from shared.probes import on_loop
from shared.telemetry import (
    configure_logging,
    configure_tracing,
    exemplar_in,
    extract,
    ids_in,
    inject,
    metrics_served,
    open_span,
    records,
    span_at,
    start_metrics_server,
    traceparent_of,
    traces_url,
)
from shared.trace_names import REQUEST_MODEL, WORKER

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(autouse=True)
def restore():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    configure_tracing("test", "test")


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


# --- logs


def test_a_log_line_is_json_with_who_said_it_and_what_was_bound(capsys):
    configure_logging("router", "router-ab23cd", "json", "info")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger().info("request_placed", worker="w1", cached_blocks=3)
    structlog.get_logger().debug("not_shown")
    (line,) = lines(capsys)
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "request_placed", "level": "info", "service": "router", "id": "router-ab23cd",
                    "request_id": "r1", "worker": "w1", "cached_blocks": 3}


def test_text_and_tokens_are_withheld_above_debug_only(capsys):
    configure_logging("gateway", "g", "json", "debug")
    structlog.get_logger().info("request", prompt="a secret", tokens=[1, 2], count=2)
    structlog.get_logger().debug("request", prompt="a secret")
    shown, debug = lines(capsys)
    assert (shown["prompt"], shown["tokens"], shown["count"]) == ("(withheld)", "(withheld)", 2)
    assert debug["prompt"] == "a secret"


@pytest.mark.parametrize("log", ["json", "console"])
def test_a_traceback_shows_code_but_no_local_variables(capsys, log):
    configure_logging("gateway", "g", log)
    try:
        secret = "the prompt of " + "a customer"
        raise ValueError(len(secret))
    except ValueError:
        structlog.get_logger().exception("failed")
    written = capsys.readouterr().err
    assert "ValueError" in written and "raise ValueError(len(secret))" in written and "the prompt of a" not in written


def test_what_libraries_log_has_the_same_form(capsys):
    configure_logging("worker", "w", "json")
    logging.getLogger("uvicorn").warning("the %s is full", "pool")
    logging.getLogger("uvicorn").info("chatter")
    (line,) = lines(capsys)
    assert (line["event"], line["level"], line["service"]) == ("the pool is full", "warning", "worker")


@pytest.mark.parametrize(("log", "level"), [("xml", "info"), ("json", "loud")])
def test_a_wrong_setting_is_named(log, level):
    with pytest.raises(ValueError, match=r"xml|loud"):
        configure_logging("worker", "w", log, level)


async def test_services_in_one_process_keep_their_names_apart(capsys):
    broker = MemoryBroker()
    done = asyncio.Event()

    async def listen():
        configure_logging("worker", "w1", "json")
        await MemoryBus(broker).subscribe("a", lambda _: (structlog.get_logger().info("heard"), done.set()))

    async def talk():
        configure_logging("router", "r1", "json")
        structlog.contextvars.bind_contextvars(request_id="of the sender")
        structlog.get_logger().info("said")
        await MemoryBus(broker).publish("a", b"")

    await asyncio.create_task(listen())
    await asyncio.create_task(talk())
    await done.wait()
    said, heard = lines(capsys)
    assert (said["service"], said["id"]) == ("router", "r1")
    assert (heard["service"], heard["id"]) == ("worker", "w1") and "request_id" not in heard


# --- traces


def test_without_a_collector_nothing_is_made_and_a_callers_trace_is_passed_on():
    configure_tracing("router", "r1")
    assert inject(span_at("place", 1.0, 2.0)) == {}
    came = extract({"traceparent": TRACEPARENT})
    assert inject(span_at("place", 1.0, 2.0, came)) == {"traceparent": TRACEPARENT}
    assert traceparent_of(came) == TRACEPARENT and traceparent_of(Context()) == "" and traceparent_of(None) == ""


def test_a_line_of_the_log_names_its_trace_and_a_figure_only_one_that_is_kept():
    ids = {"trace_id": "0af7651916cd43dd8448eb211c80319c", "span_id": "b7ad6b7169203331"}
    assert ids_in(TRACEPARENT) == exemplar_in(TRACEPARENT) == ids
    unsampled = TRACEPARENT[:-1] + "0"
    assert ids_in(unsampled) == ids and exemplar_in(unsampled) is None
    for none in ("", "nonsense", TRACEPARENT + "\n", TRACEPARENT.upper(), TRACEPARENT[3:]):
        assert ids_in(none) == {} and exemplar_in(none) is None


def test_what_is_not_sampled_is_not_recorded_here_nor_below(monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    exporter = InMemorySpanExporter()
    configure_tracing("gateway", "g1", exporter=exporter)
    span = open_span("chat", 1.0)
    assert not span.recorded and ids_in(traceparent_of(span.context))
    for context in (span.context, span_at("route", 1.0, 2.0, span.context)):
        assert exemplar_in(traceparent_of(context)) is None
    span.end(3.0)
    assert not records(span.context) and records(Context()) and records(extract({"traceparent": TRACEPARENT}))
    span_at("route", 1.0, 2.0, extract({"traceparent": TRACEPARENT}))  # its parent is, so it is
    assert [span.name for span in exporter.get_finished_spans()] == ["route"]


def test_without_a_collector_the_sdk_is_not_even_imported():
    code = ("import sys; from shared.telemetry import configure_tracing, span_at; configure_tracing('a', 'b');"
            "span_at('x', 1, 2); sys.exit('opentelemetry.sdk.trace' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


@pytest.mark.parametrize("traceparent", ["", "nonsense", "00-0-0-01", TRACEPARENT[:-1]])
def test_a_malformed_context_is_an_empty_one(traceparent):
    assert inject(extract({"traceparent": traceparent})) == inject(extract({})) == {}


def test_a_span_recorded_afterwards_has_its_times_parent_and_attributes():
    exporter = InMemorySpanExporter()
    configure_tracing("worker", "w1", exporter=exporter)
    came = extract({"traceparent": TRACEPARENT})
    context = span_at("decode", 1_700_000_000.25, 1_700_000_001.5, came, {REQUEST_MODEL: "m", WORKER: "w1"},
                      SpanKind.CONSUMER)
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.kind) == ("decode", SpanKind.CONSUMER)
    assert (span.start_time, span.end_time) == (1_700_000_000_250_000_000, 1_700_000_001_500_000_000)
    assert f"{span.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert dict(span.attributes) == {REQUEST_MODEL: "m", WORKER: "w1"}
    assert dict(span.resource.attributes)["service.name"] == "tokenmill-worker"
    assert dict(span.resource.attributes)["service.instance.id"] == "w1"
    assert traceparent_of(context) == f"00-{span.context.trace_id:032x}-{span.context.span_id:016x}-01"


def test_an_open_span_is_the_parent_of_what_happens_inside_and_tells_of_errors_and_retries():
    exporter = InMemorySpanExporter()
    configure_tracing("gateway", "g1", exporter=exporter)
    first = open_span("chat", 10.0, kind=SpanKind.SERVER)
    inner = extract(inject(first.context))
    span_at("place", 10.5, 11.0, inner)
    first.event("first_token", 11.5, {"count": 1})
    first.end(12.0, {"done": False}, error="worker_failed")
    first.end(99.0)
    span_at("chat", 12.0, 13.0, links=[first.context])
    place, chat, again = exporter.get_finished_spans()
    assert place.parent.span_id == chat.context.span_id and chat.parent is None
    assert chat.end_time == 12_000_000_000 and chat.status.status_code is StatusCode.ERROR
    assert dict(chat.attributes) == {"done": False, "error.type": "worker_failed"}
    assert [(event.name, event.timestamp) for event in chat.events] == [("first_token", 11_500_000_000)]
    assert again.links[0].context.span_id == chat.context.span_id and again.context.trace_id != chat.context.trace_id


async def test_services_in_one_process_keep_their_spans_apart():
    exporters = {"router": InMemorySpanExporter(), "worker": InMemorySpanExporter()}

    async def serve(service):
        configure_tracing(service, service, exporter=exporters[service])
        await asyncio.sleep(0)
        span_at(f"of the {service}", 1.0, 2.0)

    await asyncio.gather(serve("router"), serve("worker"))
    for service, exporter in exporters.items():
        assert [span.name for span in exporter.get_finished_spans()] == [f"of the {service}"]


@contextlib.contextmanager
def collector(answers=True):
    """A real OTLP/HTTP receiver; without `answers` it takes the request and says nothing."""
    received, release = [], threading.Event()

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if not answers:
                release.wait(30)
            request = ExportTraceServiceRequest()
            request.ParseFromString(body)
            received.append((self.path, request))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        release.set()
        server.shutdown()
        server.server_close()


def test_shutdown_sends_what_is_left_to_a_real_collector():
    with collector() as (url, received):
        tracing = configure_tracing("router", "r1", url)
        for number in range(3):
            span_at("place", 1.0, 2.0, attributes={"number": number})
        assert tracing.shutdown(20.0)
        span_at("after", 1.0, 2.0)
        assert tracing.shutdown()
    assert {path for path, _ in received} == {"/v1/traces"}
    resources = [resource for _, request in received for resource in request.resource_spans]
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert [(span.name, span.attributes[0].value.int_value) for span in spans] == [("place", n) for n in range(3)]
    named = {pair.key: pair.value.string_value for pair in resources[0].resource.attributes}
    assert (named["service.name"], named["service.instance.id"]) == ("tokenmill-router", "r1")


def test_shutdown_does_not_hang_on_a_collector_that_does_not_answer():
    with collector(answers=False) as (url, _):
        tracing = configure_tracing("router", "r1", url)
        span_at("place", 1.0, 2.0)
        assert tracing.shutdown(0.2) is False


def test_an_endpoint_may_name_its_path_and_must_be_a_url():
    assert traces_url("http://c:4318") == traces_url("http://c:4318/") == "http://c:4318/v1/traces"
    assert traces_url("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"
    with pytest.raises(ValueError, match="is no OTLP/HTTP endpoint"):
        configure_tracing("router", "r1", "collector:4317")


# --- metrics


def test_metrics_are_served_until_closed():
    counter = prometheus_client.Counter("mill_test_things", "Things of a test.")
    counter.inc(3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = start_metrics_server(port)
    try:
        assert "mill_test_things_total 3.0" in httpx.get(f"http://127.0.0.1:{server.port}/metrics").text
        with pytest.raises(OSError, match=f"cannot serve metrics on 127.0.0.1:{port}"):
            start_metrics_server(port)
    finally:
        server.close()
        prometheus_client.REGISTRY.unregister(counter)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/metrics")


async def test_beside_the_figures_a_probe_tells_alive_from_ready():
    registry, states = prometheus_client.CollectorRegistry(), {"ready": False}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def asked(path: str) -> int:
        return (await asyncio.to_thread(httpx.get, f"http://127.0.0.1:{port}{path}")).status_code

    with metrics_served(registry, port, ready=lambda: states["ready"]):
        assert [await asked(path) for path in ("/health", "/ready", "/metrics")] == [200, 503, 200]
        states["ready"] = True
        assert await asked("/ready") == 200


async def test_several_services_of_a_kind_have_their_figures_each_on_its_own_port():
    pages = []
    with contextlib.ExitStack() as served:
        for number in (1, 2):
            registry = prometheus_client.CollectorRegistry()
            prometheus_client.Gauge("mill_test_number", "Of a service.", registry=registry).set(number)
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                pages.append(f"http://127.0.0.1:{probe.getsockname()[1]}/metrics")
            served.enter_context(metrics_served(registry, int(pages[-1].split(":")[2].split("/")[0])))
        for number, page in enumerate(pages, 1):
            text = (await asyncio.to_thread(httpx.get, page)).text
            assert f"mill_test_number {number}.0" in text and text.count("mill_test_number ") == 3
            assert "python_info" in text


def test_a_loop_that_stands_still_or_is_closed_answers_nobody():
    loop = asyncio.new_event_loop()
    with pytest.raises(TimeoutError):
        on_loop(loop, lambda: True, 0.05)  # nobody runs it
    loop.close()
    with pytest.raises(TimeoutError):
        on_loop(loop, lambda: True, 0.05)


async def test_what_is_asked_of_a_loop_is_asked_on_it_and_its_error_comes_back():
    loop = asyncio.get_running_loop()
    assert await asyncio.to_thread(on_loop, loop, asyncio.get_running_loop) is loop
    with pytest.raises(ZeroDivisionError):
        await asyncio.to_thread(on_loop, loop, lambda: 1 // 0)


def test_port_zero_serves_nothing():
    assert start_metrics_server(0) is None
