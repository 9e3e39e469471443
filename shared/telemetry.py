"""What a service says about itself: logs, traces and the port where its metrics are read.

Rule: prompt text and tokens never leave at a level above debug, and a collector that is slow or gone costs spans, never
a request. Several services in one process keep apart: what `configure_logging` and `configure_tracing` bind belongs to
the task that called them and to what it starts.

    log          tracing = configure_tracing("router", "router-ab23cd", settings.otlp)
    pass on      await bus.publish(subject, data, headers=inject(context))
    take up      context = extract(delivery.headers)
    afterwards   span_at("place", started_s, ended_s, context, {WORKER: "worker-ef45gh"})
    shut down    await asyncio.to_thread(tracing.shutdown)

Times are unix seconds, as `Clock.wall` gives them. Attribute names stand in `shared.trace_names`.
"""

import asyncio
import contextlib
import contextvars
import logging
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import prometheus_client
import structlog
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, Tracer, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from shared.probes import Wsgi, probed
from shared.trace_names import ERROR_TYPE

Attribute = str | bool | int | float | Sequence[str]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
EXPORT_TIMEOUT_S = 5.0
WITHHELD = frozenset({"prompt", "text", "content", "messages", "input", "output", "tokens", "token_ids", "completion",
                      "generated", "body"})

_propagator = TraceContextTextMapPropagator()
_TRACEPARENT = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


# --- logs ------------------------------------------------------------------------------------------------------------


def configure_logging(service: str, id: str, log: str = "console", level: str = "info") -> None:
    """Write structlog events, and what libraries log, to standard error: one line each, for people or as JSON.

    Every line carries `service` and `id`, and what is bound with `structlog.contextvars` (such as `request_id`).
    Raises ValueError when `log` or `level` is unknown.
    """
    if log not in ("console", "json"):
        raise ValueError(f"unknown log format {log!r}: use console or json")
    if level not in LEVELS:
        raise ValueError(f"unknown log level {level!r}: use one of {', '.join(LEVELS)}")
    common: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, _withhold_text,
        structlog.processors.TimeStamper(fmt="iso", utc=True)]
    renderer: list[structlog.typing.Processor]
    if log == "json":
        # not dict_tracebacks: it writes local variables, prompts among them
        renderer = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        renderer = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(),
                                                  exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=[*common, *renderer], wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr), cache_logger_on_first_use=False)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=common,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer]))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # libraries tell at info what only their authors want to know
    root.setLevel(max(LEVELS[level], logging.WARNING) if level != "debug" else logging.INFO)
    structlog.contextvars.bind_contextvars(service=service, id=id)


def _withhold_text(_: Any, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if method != "debug":
        for name in WITHHELD.intersection(event):
            event[name] = "(withheld)"
    return event


# --- traces ----------------------------------------------------------------------------------------------------------


class Tracing:
    """Where one service's spans go. Without a collector: nowhere, at the price of a look-up."""

    def __init__(self, tracer: Tracer | None = None, stop: Callable[[], None] | None = None) -> None:
        self.tracer = tracer
        self._stop = stop

    def shutdown(self, timeout_s: float = 3.0) -> bool:
        """Send what is left, for `timeout_s` at most. False when the collector took longer. Blocks: use a thread."""
        self.tracer, stop, self._stop = None, self._stop, None
        if stop is None:
            return True
        # the exporter's own shutdown waits up to 30 s
        flushing = threading.Thread(target=stop, name="trace-shutdown", daemon=True)
        flushing.start()
        flushing.join(timeout_s)
        return not flushing.is_alive()


_OFF = Tracing()
_current: contextvars.ContextVar[Tracing] = contextvars.ContextVar("tracing", default=_OFF)


def configure_tracing(service: str, id: str, otlp_endpoint: str = "", exporter: Any = None) -> Tracing:
    """Send this task's spans to an OTLP/HTTP collector such as `http://127.0.0.1:4318`; empty: none are made.

    `exporter`: a SpanExporter that gets each span as it ends, instead of a collector. OTEL_TRACES_SAMPLER and the other
    variables of the SDK are respected. Raises ValueError when the endpoint is no URL.
    """
    if not otlp_endpoint and exporter is None:
        _current.set(_OFF)
        return _OFF
    # the SDK takes 0.3 s to import: only those pay who export
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

    provider = TracerProvider(shutdown_on_exit=False, resource=Resource.create(
        {"service.name": f"tokenmill-{service}", "service.namespace": "tokenmill", "service.instance.id": id}))
    if exporter is not None:
        provider.add_span_processor(SimpleSpanProcessor(exporter))
    else:
        provider.add_span_processor(BatchSpanProcessor(
            OTLPSpanExporter(traces_url(otlp_endpoint), timeout=EXPORT_TIMEOUT_S), schedule_delay_millis=1000))
    tracing = Tracing(provider.get_tracer("tokenmill"), provider.shutdown)
    _current.set(tracing)
    return tracing


def traces_url(endpoint: str) -> str:
    """Where traces go: `endpoint` itself if it names the path, otherwise its `/v1/traces`."""
    if not endpoint.startswith(("http://", "https://")):
        raise ValueError(f"{endpoint!r} is no OTLP/HTTP endpoint: use a URL such as http://127.0.0.1:4318")
    endpoint = endpoint.rstrip("/")
    return endpoint if endpoint.endswith("/v1/traces") else f"{endpoint}/v1/traces"


def traces() -> bool:
    """Whether spans of this task go anywhere: where not, nobody needs to gather what they would tell."""
    return _current.get().tracer is not None


def records(context: Context) -> bool:
    """Whether spans of this task under `context` go anywhere: where its request was not sampled, none below it is."""
    if _current.get().tracer is None:
        return False
    parent = get_current_span(context).get_span_context()
    return not parent.is_valid or parent.trace_flags.sampled


def inject(context: Context | None = None) -> dict[str, str]:
    """Headers that carry `context` (default: the current one) on: `traceparent`, or nothing when nothing is traced."""
    headers: dict[str, str] = {}
    if context is None or context:  # an empty one has nothing to carry
        _propagator.inject(headers, context)
    return headers


def extract(headers: Mapping[str, str]) -> Context:
    """The context that came with a message. Empty when there is none or it is malformed."""
    return _propagator.extract(headers, Context()) if headers else Context()


def traceparent_of(context: Context | None) -> str:
    """The W3C `traceparent` of a context, for structs that carry it as a field; empty when nothing is traced."""
    return inject(context).get("traceparent", "") if context is not None else ""


def ids_in(traceparent: str) -> dict[str, str]:
    """`trace_id` and `span_id` as fields of a line of the log; none where nothing is traced."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return {"trace_id": found[1], "span_id": found[2]} if found else {}


def exemplar_in(traceparent: str) -> dict[str, str] | None:
    """What links an observation of a histogram to its trace; None where no trace is kept."""
    found = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
    return {"trace_id": found[1], "span_id": found[2]} if found and int(found[3], 16) & 1 else None


class OpenSpan:
    """A span that has begun. `context` is the parent for what happens inside it."""

    __slots__ = ("_span", "context")

    def __init__(self, span: Span | None, context: Context) -> None:
        self._span = span
        self.context = context

    @property
    def recorded(self) -> bool:
        """Whether it goes anywhere, and has not ended."""
        return self._span is not None

    def event(self, name: str, unix_s: float, attributes: Mapping[str, Attribute] | None = None) -> None:
        """Mark a moment within the span, such as the first token."""
        if self._span is not None:
            self._span.add_event(name, attributes, _ns(unix_s))

    def end(self, unix_s: float, attributes: Mapping[str, Attribute] | None = None, error: str = "") -> None:
        """Close the span. `error`: the code it failed with. Only the first call counts."""
        span, self._span = self._span, None
        if span is None:
            return
        if attributes:
            span.set_attributes(attributes)
        if error:
            span.set_attribute(ERROR_TYPE, error)
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(_ns(unix_s))


def open_span(name: str, start_unix_s: float, context: Context | None = None,
              attributes: Mapping[str, Attribute] | None = None, kind: SpanKind = SpanKind.INTERNAL,
              links: Sequence[Context] = ()) -> OpenSpan:
    """Begin a span whose context others need before it ends. `links`: contexts it belongs with (an earlier attempt)."""
    parent = Context() if context is None else context
    tracer = _current.get().tracer
    if tracer is None:
        return OpenSpan(None, parent)
    linked = [Link(get_current_span(other).get_span_context()) for other in links]
    span = tracer.start_span(name, parent, kind, attributes, linked, _ns(start_unix_s))
    # one that was not sampled only tells those below that they are not
    return OpenSpan(span if span.is_recording() else None, set_span_in_context(span, parent))


def span_at(name: str, start_unix_s: float, end_unix_s: float, context: Context | None = None,
            attributes: Mapping[str, Attribute] | None = None, kind: SpanKind = SpanKind.INTERNAL,
            links: Sequence[Context] = (), error: str = "") -> Context:
    """Record a span after the fact, under `context` if given. Returns the context of the span."""
    span = open_span(name, start_unix_s, context, attributes, kind, links)
    span.end(end_unix_s, error=error)
    return span.context


def _ns(unix_s: float) -> int:
    # a float holds unix seconds to the microsecond, no finer
    return round(unix_s * 1e6) * 1000


# --- metrics ---------------------------------------------------------------------------------------------------------


class MetricsServer:
    """Serves the process's Prometheus metrics at `/metrics` until closed."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread
        self.port = server.server_port

    def close(self) -> None:
        """Free the port. Idempotent."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)


def start_metrics_server(port: int, host: str = "127.0.0.1", app: Wsgi | None = None) -> MetricsServer | None:
    """Let Prometheus read the default registry on `port`, or serve `app` there; 0: nothing is, and None returned.

    Raises OSError naming the port when it is taken.
    """
    if port == 0:
        return None
    kind = _ServerV6 if ":" in host else _Server
    try:
        server = make_server(host, port, app or prometheus_client.make_wsgi_app(), kind, _Quiet)
    except OSError as error:
        raise OSError(error.errno, f"cannot serve metrics on {host}:{port} ({error.strerror}): "
                                   "choose another --metrics-port, or 0 for none") from error
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    return MetricsServer(server, thread)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Being asked is no event."""


@contextlib.contextmanager
def metrics_served(own: Collector, port: int, host: str = "127.0.0.1",
                   ready: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Let Prometheus read `own` on `port` while the block runs, among the figures of the process; 0: nothing.

    `/health` and `/ready` beside it say whether the running loop turns, and what `ready` says on it.
    """
    if port == 0:
        yield
        return
    # a registry for the port, so that several services of a kind can live in one process
    figures = CollectorRegistry(auto_describe=True)
    figures.register(own)
    figures.register(prometheus_client.REGISTRY)
    app = probed(prometheus_client.make_wsgi_app(figures), asyncio.get_running_loop(), ready)
    server = start_metrics_server(port, host, app)
    assert server is not None
    try:
        yield
    finally:
        server.close()
