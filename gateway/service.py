"""The gateway: HTTP in, tokens out, SSE back.

Rules: it owns a request until its last token (law 5); what arrives on the bus is decoded, decided on and handed over in
one go; one task publishes, in order. `Gateway` is everything but the socket, so that tests run it on the memory bus
behind `gateway.app.build_app` alone.

    HTTP -> app, endpoints, answer -> streams -> outbox -> generate.<model>, worker.<id>.cancel
    replies.<id>, status.>  -> streams, fleet
"""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
import uvicorn

from gateway.access import Access, source_of
from gateway.admission import Admission
from gateway.answer import Answer
from gateway.app import build_app
from gateway.billing import Billing
from gateway.catalogue import Catalogue, pairs_of
from gateway.dialects.dialect import told
from gateway.direct import DirectProtocol
from gateway.failover import Limits
from gateway.metrics import Metrics
from gateway.prompt import ServedModel
from gateway.receipts import Receipts
from gateway.record import Record
from gateway.residency import check_reachable
from gateway.streams import Outgoing, Streams
from gateway.tenants import Tenant
from gateway.tls import Certificate
from shared import subjects, telemetry
from shared.bus import Bus, BusUnavailable, Delivery
from shared.busy import Busy
from shared.clock import Clock
from shared.errors import BadRequest, MeshUnavailable, Overloaded, PermissionDenied
from shared.fleet import Fleet
from shared.ids import new_epoch, new_id
from shared.messages import GatewayStatus, Residency, RouterStatus, Status, StepReplies, WorkerStatus, decode, encode
from shared.residency import parse
from shared.settings import GatewaySettings

T = TypeVar("T")

TICK_S = 0.1  # how finely deadlines and silence are noticed
FORGET_S = 60.0
FOLLOW_S = 0.5  # between looks at tenants: a change holds here at the second one that sees it, after 1 s at most
LONG_BYTES = 4096  # bodies above this are tokenised in a thread: 1 to 2 ms of the loop's time at 2 to 4 MB/s
PROMPTS_PER_TURN = 4  # of the event loop: 1 to 2 ms
CLOSE_S = 5.0  # for HTTP connections to end once nothing runs

log = structlog.get_logger("gateway")


class Gateway:
    """One gateway's parts and its place in the mesh. Without a model it serves none, and says so."""

    def __init__(self, bus: Bus, settings: GatewaySettings, clock: Clock,
                 models: ServedModel | Sequence[ServedModel] | None) -> None:
        """Raises ValueError for an id, an alias, a dialect, a policy or a certificate that is none, and for tenants
        that cannot be read. OSError when the record cannot be written."""
        self.id = subjects.check_id(settings.id or new_id("gateway"))
        self.epoch = new_epoch(clock)
        self.bus = bus
        self.settings = settings
        self.clock = clock
        served = () if models is None else (models,) if isinstance(models, ServedModel) else models
        self.catalogue = Catalogue(served, pairs_of(settings.aliases, "--aliases"))
        self._tell_dialects()
        self.residency = parse(settings.residency)
        self.fleet = Fleet()
        self.metrics = Metrics(self.workers)
        self.admission = Admission(settings.max_active)
        limits = Limits(accept_s=settings.accept_s, stall_s=settings.stall_s, max_attempts=settings.max_attempts)
        self.record = Record(Path(settings.record), settings.record_mib << 20) if settings.record else None
        self.streams = Streams(self.id, limits, settings.silence_s, clock, self.fleet, self.metrics, self.record)
        self.certificate = Certificate.of(settings.tls_cert, settings.tls_key)
        self.billing = Billing(self.id, settings, clock, self.metrics,
                               [model.name for model in self.catalogue.models])
        self.access = Access(source_of(settings, self.billing.database), clock, self.billing.database is not None)
        if self.access.keyed:
            for model in self.catalogue.models:
                model.tokenizer.learn_nothing()
        self.metrics.tenants_refused.set_function(lambda: self.access.refused)
        self.answers: set[Answer] = set()
        self.receipts = Receipts()
        self.draining = False
        self.url = ""
        self.log = structlog.get_logger("gateway.answer").bind()  # once: it takes longer than a line nobody hears
        self._began_s = clock.now()
        self._busy = Busy(clock.cpu(), self._began_s)
        self._turns = asyncio.Semaphore(PROMPTS_PER_TURN)
        self._idle = asyncio.Event()
        self._idle.set()
        self._changed = asyncio.Event()

    def _tell_dialects(self) -> None:
        """Let each model know what settings say of its calls and thoughts. Raises ValueError."""
        calls = pairs_of(self.settings.tool_formats, "--tool-formats")
        thoughts = pairs_of(self.settings.reasoning_formats, "--reasoning-formats")
        for name in (*calls, *thoughts):
            if name not in {model.name for model in self.catalogue.models}:
                raise ValueError(f"--tool-formats and --reasoning-formats name {name!r}, which this gateway does not "
                                 "serve")
        for model in self.catalogue.models:
            dialect = model.dialect = told(model.dialect, calls.get(model.name), thoughts.get(model.name))
            log.info("model_speaks", model=model.name, calls=dialect.calls, thoughts=dialect.thoughts, why=dialect.why)

    # --- what handlers ask -------------------------------------------------------------------------------------------

    def check_open(self) -> None:
        """Raises Overloaded while this gateway is leaving."""
        if self.draining:
            raise Overloaded("this gateway is leaving: send the request again", retry_after_s=1.0)

    def models_of(self, tenant: Tenant) -> Catalogue:
        """What this tenant may ask for."""
        return self.catalogue.only(tenant.models)

    def model_named(self, name: str | None, tenant: Tenant) -> ServedModel:
        """The model of this name for `tenant`; absent means the only one.

        Raises ModelNotFound, PermissionDenied, BadRequest.
        """
        if tenant.models is None:
            return self.catalogue.named(name, self.fleet.models())
        offered = self.models_of(tenant)
        if name is not None and name in self.catalogue and name not in offered:
            raise PermissionDenied(f"this key's tenant may not use the model {name!r}: GET /v1/models lists those it "
                                   "may", param="model")
        if self.catalogue.models and not offered.models:
            raise PermissionDenied("this key's tenant may use none of the models of this gateway", param="model")
        return offered.named(name)

    def check_reachable(self, model: ServedModel, residency: Residency) -> None:
        """Raises NoEligibleWorker when no worker of `model` is where the policy allows, as far as it was heard."""
        # one that has just started may not have heard everybody; routers have
        if residency.zones and self.clock.now() - self._began_s >= self.settings.silence_s:
            check_reachable(residency, model.name, self.workers(), self.fleet.workers(model.name))

    @contextlib.contextmanager
    def places(self, streams: int) -> Iterator[None]:
        """Room for so many streams while the block runs. Raises Overloaded, BadRequest for more than there ever are."""
        if streams > self.admission.most:
            raise BadRequest(f"one request may have at most {self.admission.most} choices here: send several",
                             param="n")
        self.admission.enter(streams, self.clock.now())
        self.metrics.active.set(self.admission.active)
        self._idle.clear()
        try:
            yield
        finally:
            self.admission.leave(streams, self.clock.now())
            self.metrics.active.set(self.admission.active)
            if not self.admission.active:
                self._idle.set()

    async def aside(self, size_bytes: int, work: Callable[[], T]) -> T:
        """`work()`, in a thread when the body it works on is long; of a crowd that comes at once a few at a time.

        In between the first of them are on their way, and streams under way get their tokens.
        """
        if size_bytes > LONG_BYTES:
            return await asyncio.to_thread(work)
        async with self._turns:
            done = work()
            await asyncio.sleep(0)
        return done

    def workers(self) -> list[WorkerStatus]:
        """The workers heard lately."""
        return [status for status in self.fleet.workers() if self._alive(status)]

    def routers(self) -> list[RouterStatus]:
        """The routers heard lately."""
        return [status for status in self.fleet.routers() if self._alive(status)]

    def not_ready(self) -> list[str]:
        """Why a request would not be served now; empty when it would."""
        reasons = []
        if self.draining:
            reasons.append("this gateway is leaving")
        models = self.catalogue.models
        if not models:
            reasons.append("no model is configured: start with --model")
        if not self.bus.connected:
            reasons.append("the bus is not connected")
        if not any(router.state == "ready" for router in self.routers()):
            reasons.append("no router is ready")
        # one model without workers is no reason to take the others' requests elsewhere
        if models and not any(self.serves(model) for model in models):
            reasons.append(f"no worker is ready with the model {' or '.join(model.name for model in models)}")
        return reasons

    def serves(self, model: ServedModel) -> bool:
        """Whether a worker is ready with this model."""
        return bool(self._servers(model.name))

    def recipe(self, model: ServedModel) -> str:
        """The numeric recipe that answers of this model come from, as its workers say it."""
        alive = self.fleet.workers_heard_since(self.clock.now() - self.settings.silence_s)
        return next((worker.recipe for worker in alive if worker.model == model.name and worker.state == "ready"), "")

    # --- life ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Listen, publish, keep time and beat while the block runs."""
        replies = await self.bus.subscribe(subjects.replies(self.id), self._on_replies)
        statuses = [await self.bus.subscribe(subjects.status(kind, "*"), self._on_status)
                    for kind in ("worker", "router")]
        async with self.billing.running(), asyncio.TaskGroup() as tasks:
            loops = [tasks.create_task(loop(), name=f"{self.id}-{loop.__name__}")
                     for loop in (self._send, self._keep_time, self._beat, self._follow, self._follow_certificate,
                                   self._write_record)]
            try:
                yield
            finally:
                for task in loops:
                    task.cancel()
                await replies.unsubscribe()
                for standing in statuses:
                    await standing.unsubscribe()
                if self.record is not None:
                    await asyncio.to_thread(self.record.write)

    async def drain(self) -> None:
        """Take nothing new and let what runs end, for `drain_s` at most; then end it with an error."""
        self.draining = True
        self._changed.set()
        log.info("draining", active=self.admission.active)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_s):
                await self._idle.wait()
        self.streams.give_up(MeshUnavailable("this gateway had to stop before the answer was complete: send the "
                                             "request again", retry_after_s=1.0))

    async def _send(self) -> None:
        while True:
            await self._publish(await self.streams.outbox.get())

    async def _publish(self, out: Outgoing) -> None:
        try:
            await self.bus.publish(out.subject, out.data, out.headers, out.unheard)
        except BusUnavailable:
            if out.unheard is not None:
                out.unheard()
        except ValueError as error:
            # a sender may have called itself something that no subject can name: not a reason to stop sending
            log.warning("publish_refused", subject=out.subject, reason=str(error))
            if out.too_large is not None:
                out.too_large(error)

    async def _keep_time(self) -> None:
        while True:
            if not self.answers:
                await self.streams.some.wait()
            await self.clock.sleep(TICK_S)
            self.streams.tick(self.bus.connected)
            self._tick_answers()
            self.billing.tick()

    def _tick_answers(self) -> None:
        now_s = self.clock.now()
        for answer in list(self.answers):
            answer.tick(now_s)

    async def _beat(self) -> None:
        while True:
            status = GatewayStatus(self.id, self.epoch, "draining" if self.draining else "ready",
                                   self.admission.active, self.url,
                                   self._busy.share(self.clock.cpu(), self.clock.now()))
            with contextlib.suppress(BusUnavailable):  # silence is what an outage looks like
                await self.bus.publish(subjects.status("gateway", self.id), encode(status))
            self.fleet.forget_silent(self.clock.now(), FORGET_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.settings.heartbeat_s):
                    await self._changed.wait()
            self._changed.clear()

    async def _write_record(self) -> None:
        while self.record is not None:
            await self.clock.sleep(self.settings.heartbeat_s)
            if self.record.some_wait:
                await asyncio.to_thread(self.record.write)

    async def _follow(self) -> None:
        while self.access.keyed:
            await self.clock.sleep(FOLLOW_S)
            await self.access.follow()

    async def _follow_certificate(self) -> None:
        while self.certificate is not None:
            await self.clock.sleep(FOLLOW_S)
            await asyncio.to_thread(self.certificate.follow)

    def _on_replies(self, delivery: Delivery) -> None:
        message: StepReplies | None = self._decoded(delivery, StepReplies)
        if message is not None:
            self.streams.hear(message)

    def _on_status(self, delivery: Delivery) -> None:
        status = self._decoded(delivery, Status)
        if isinstance(status, WorkerStatus | RouterStatus):
            self.fleet.fold(status, self.clock.now())
            if isinstance(status, WorkerStatus):
                self.streams.status(status)

    def _decoded(self, delivery: Delivery, kind: Any) -> Any:
        """The message, or None when it is none."""
        try:
            return decode(delivery.data, kind)
        except msgspec.DecodeError as error:
            self.metrics.bad_messages.inc()
            log.warning("message_unreadable", subject=delivery.subject, error=str(error))
            return None

    def _alive(self, status: WorkerStatus | RouterStatus) -> bool:
        silent_s = self.fleet.silent_s(status, self.clock.now())
        return silent_s is not None and silent_s <= self.settings.silence_s

    def _servers(self, model: str) -> list[WorkerStatus]:
        return [worker for worker in self.workers() if worker.model == model and worker.state == "ready"]


async def serve(bus: Bus, settings: GatewaySettings, clock: Clock, ready: asyncio.Event | None = None) -> None:
    """Serve HTTP until cancelled; then drain, close and end.

    `ready` is set once the port answers. Raises OSError with one clear sentence when the port is taken, UnusableModel
    when a model's folder is not usable, ValueError for settings that are none.
    """
    models = [ServedModel.load(folder, name) for name, folder in folders_of(settings)]
    gc.freeze()  # vocabularies are there for good, and many
    listener = _listen(settings.host, settings.port)
    with contextlib.closing(listener):
        gateway = Gateway(bus, settings, clock, models)
        host, port = listener.getsockname()[:2]
        scheme = "https" if gateway.certificate is not None else "http"
        gateway.url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        structlog.contextvars.bind_contextvars(service="gateway", id=gateway.id)
        tracing = telemetry.configure_tracing("gateway", gateway.id, settings.otlp)
        try:
            with gateway.metrics.served(settings.metrics_port, settings.metrics_host, lambda: not gateway.not_ready()):
                async with gateway.running():
                    await _serve_http(gateway, listener, ready)
        finally:
            await asyncio.to_thread(tracing.shutdown)


def folders_of(settings: GatewaySettings) -> list[tuple[str, str]]:
    """Name in the mesh and folder of each model to serve. Raises ValueError."""
    first = [(settings.model_name, settings.model)] if settings.model else []
    return first + list(pairs_of(settings.models, "--models").items())


async def _serve_http(gateway: Gateway, listener: socket.socket, ready: asyncio.Event | None) -> None:
    tls = gateway.certificate
    server = _Server(uvicorn.Config(
        build_app(gateway), ssl_context_factory=(lambda *_: tls.context) if tls is not None else None,
        http=DirectProtocol, ws="none", lifespan="off", log_config=None, access_log=False,
        proxy_headers=False, server_header=False, timeout_keep_alive=75, timeout_graceful_shutdown=int(CLOSE_S)), ready)
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(server.serve(sockets=[listener]), name=f"{gateway.id}-http")
        log.info("gateway_serving", id=gateway.id, url=gateway.url,
                 models=[model.name for model in gateway.catalogue.models])
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            await gateway.drain()
            server.should_exit = True
            await asyncio.shield(serving)
            raise


class _Server(uvicorn.Server):
    """uvicorn without hands on the process's signals."""

    def __init__(self, config: uvicorn.Config, ready: asyncio.Event | None) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready.set()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen on {host}:{port} ({error.strerror}): end what uses that port or "
                                   "choose another with --port") from None
