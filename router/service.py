"""The router: a request comes in, a worker is named, the request goes on.

Rules: it holds nothing that cannot be heard again (law 6); a handler is decode, decide, hand over. What happens to a
request is in `router.desk`, what is known of workers in `router.view`, what waits for the bus in `router.outgoing`.

    generate.*, router.<id>.cancel         -> the desk
    worker.*.kv, status.worker.*, placed.* -> the view        -> worker.<id>.kv_request, when incomplete
    status.router.*                        -> whether others take requests
    twice a second                                            -> status.router.<id>

A router that has just started, or has been without a bus, stands out of the queue group until it knows every cache: the
others take what comes. Where there are none it takes requests after a second at the latest, whatever it knows.
"""

import asyncio
import contextlib
from typing import Any, Literal

import msgspec
import structlog
from msgspec.structs import replace

from router.desk import Desk
from router.metrics import Metrics
from router.outgoing import Outbox
from router.placement import POLICIES
from router.queueing import weights_of
from router.view import View
from shared import subjects, telemetry
from shared.blocks import BLOCK_SIZE_TOKENS, HASH_BYTES
from shared.bus import Bus, BusUnavailable, Delivery, Subscription
from shared.busy import Busy
from shared.clock import Clock
from shared.ids import new_epoch, new_id
from shared.messages import Cancel, Generate, KvMessage, RouterStatus, SnapshotRequest, Status, WorkerStatus, decode
from shared.settings import RouterSettings

# a router waits this long to hear of a worker at all, and of what they hold, before it calls itself ready; where no
# other takes requests it does after the first: gateways keep what nobody hears for two seconds (`accept_s`)
STARTING_S, CATCH_UP_S = 1.0, 5.0
FLUSH_S = 1.0

_log = structlog.get_logger("router")


async def serve(bus: Bus, settings: RouterSettings, clock: Clock, ready: asyncio.Event | None = None) -> None:
    """Route until cancelled; then stop taking requests, send what is decided, say goodbye.

    `ready` is set once this router hears what workers say. Raises ValueError for an unknown policy or an id that cannot
    stand in a subject, BusUnavailable when the broker is gone at the start.
    """
    settings = checked(settings)
    tracing = telemetry.configure_tracing("router", settings.id, settings.otlp)
    router = Router(bus, settings, clock)
    try:
        with router.metrics.served(settings.metrics_port, settings.metrics_host, lambda: router.state == "ready"):
            await router.listen()
            async with asyncio.TaskGroup() as tasks:
                for work in (router.outbox.send, router.beat, router.desk.let_in):
                    tasks.create_task(work(), name=f"{router.id}-{work.__name__}")
                if ready is not None:
                    ready.set()
                try:
                    await asyncio.get_running_loop().create_future()
                finally:
                    await router.leave()
    finally:
        if tracing.tracer is not None:
            await asyncio.to_thread(tracing.shutdown)


def checked(settings: RouterSettings) -> RouterSettings:
    """The settings with an id made up if there is none. Raises ValueError for what no router can be told."""
    if settings.policy not in POLICIES:
        raise ValueError(f"unknown policy {settings.policy!r}: use one of {', '.join(POLICIES)}")
    weights_of(settings.tenant_weights)
    if settings.max_held < 1:
        raise ValueError(f"max_held must be 1 or more, got {settings.max_held}")
    return replace(settings, id=subjects.check_id(settings.id or new_id("router")))


class Router:
    """One router: its view and its desk, what it hears, and whether it is ready."""

    def __init__(self, bus: Bus, settings: RouterSettings, clock: Clock, view: View | None = None) -> None:
        """`view`: what it knows already, if anything."""
        self.id = settings.id
        self.epoch = new_epoch(clock)
        self._own_placed = subjects.placed(self.id)
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self.view = view or View(settings.silence_s)
        self.metrics = Metrics()
        self.outbox = Outbox(bus, self.id, self.epoch, self.metrics)
        self.desk = Desk(settings, clock, self.view, self.outbox, self.metrics)
        self._bus = bus
        self._settings = settings
        self._clock = clock
        self._started_at = clock.now()
        self._busy = Busy(clock.cpu(), self._started_at)
        self._intake: Subscription | None = None
        self._others: dict[str, float] = {}  # routers that are ready, and when they said so
        self._peers: dict[str, float] = {}  # routers that listen, ready or not
        self._caught_up = asyncio.Event()  # since the last heartbeat

    # --- what arrives

    async def listen(self) -> None:
        """Subscribe to all but requests."""
        for subject, handler in ((subjects.status("worker", "*"), self.on_status), (subjects.ALL_KV, self.on_kv),
                                 (subjects.status("router", "*"), self.on_router),
                                 (subjects.ALL_PLACED, self.on_placed),
                                 (subjects.router_cancel(self.id), self.on_cancel)):
            await self._bus.subscribe(subject, handler)

    async def take_requests(self) -> None:
        """Enter the queue group, unless this router is leaving."""
        intake = await self._bus.subscribe(subjects.ALL_GENERATE, self.on_generate, subjects.ROUTER_QUEUE)
        if self.state == "draining":
            await intake.unsubscribe()
        else:
            self._intake = intake

    def on_generate(self, delivery: Delivery) -> None:
        request = self._decoded(delivery, Generate)
        if request is not None:
            self.desk.take(request, telemetry.extract(delivery.headers))

    def on_cancel(self, delivery: Delivery) -> None:
        cancel = self._decoded(delivery, Cancel)
        if cancel is not None:
            self.desk.cancel(cancel)

    def on_status(self, delivery: Delivery) -> None:
        status = self._decoded(delivery, Status)
        if isinstance(status, WorkerStatus) and delivery.subject == subjects.status("worker", status.id):
            self._ask_snapshots(self.view.on_status(status, self._clock.now()))
            self.desk.admission.on_status(status, self._clock.now())
            self._sound_alarms()

    def on_router(self, delivery: Delivery) -> None:
        status = self._decoded(delivery, Status)
        if isinstance(status, RouterStatus) and delivery.subject == subjects.status("router", status.id):
            self._others.pop(status.id, None)
            self._peers.pop(status.id, None)
            if status.state != "draining" and status.id != self.id:
                self._peers[status.id] = self._clock.now()
                if status.state == "ready":
                    self._others[status.id] = self._clock.now()
            self.desk.has_peers = bool(self._peers)

    def on_kv(self, delivery: Delivery) -> None:
        message = self._decoded(delivery, KvMessage)
        if message is not None and delivery.subject == subjects.worker_kv(message.worker):
            self._ask_snapshots(self.view.on_kv(message, self._clock.now()))
            self._sound_alarms()
            if self.state == "starting" and self._knows_all(self._clock.now() - self._started_at):
                self._caught_up.set()

    def on_placed(self, delivery: Delivery) -> None:
        if delivery.subject == self._own_placed:
            return
        request = self._decoded(delivery, Generate)
        if request is not None and request.placement is not None:
            # the tokens were left out; the last block may be half full
            prompt_tokens = len(request.block_hashes) // HASH_BYTES * BLOCK_SIZE_TOKENS + BLOCK_SIZE_TOKENS // 2
            self.view.on_placed(request, prompt_tokens, self._clock.now())
            self.desk.admission.on_placed(request.placement.worker)

    def _ask_snapshots(self, workers: list[str]) -> None:
        for worker in workers:
            self.metrics.snapshots_asked.inc()
            self.outbox.publish(subjects.worker_kv_request(worker), SnapshotRequest(self.id))

    def _sound_alarms(self) -> None:
        for alarm in self.view.alarms:
            self.metrics.alarms.labels(alarm.kind).inc()
            _log.warning("worker_mismatch", kind=alarm.kind, worker=alarm.worker, reason=alarm.reason)
        self.view.alarms.clear()

    def _decoded(self, delivery: Delivery, kind: Any) -> Any:
        """The message, or None when these bytes are none."""
        try:
            return decode(delivery.data, kind)
        except msgspec.DecodeError as error:
            self.metrics.bad_messages.inc()
            _log.warning("bad_message", subject=delivery.subject, reason=str(error))
            return None

    # --- its life

    async def beat(self) -> None:
        """Twice a second, and once caught up: forget the silent, ask for what is missing, say how it goes."""
        while True:
            now = self._clock.now()
            if not self._bus.connected:
                await self._start_over(now)
            for worker in self.view.forget_silent(now):
                _log.info("worker_silent", worker=worker)
                self.metrics.forget(worker)
                self.desk.admission.forget(worker)
            self._ask_snapshots(self.view.snapshots_due(now))
            self._others, self._peers = (
                {router: at for router, at in heard.items() if now - at <= self._settings.silence_s}
                for heard in (self._others, self._peers))
            self.desk.has_peers = bool(self._peers)
            if self.state == "starting":
                self._catch_up(now - self._started_at)
            if self._intake is None and self._is_wanted(now):
                await self.take_requests()
            self.desk.look_after_held(now)
            self._say_status()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._settings.heartbeat_s):
                    await self._caught_up.wait()
            self._caught_up.clear()

    async def leave(self) -> None:
        """Take no more requests, let what is decided go out, and say goodbye."""
        self.state = "draining"
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._take_no_more()
                self.desk.hand_held_on()
                self._say_status()
                await self.outbox.all_sent()
        except (TimeoutError, BusUnavailable):
            _log.warning("left_in_haste", outgoing=len(self.outbox))

    def _catch_up(self, waited_s: float) -> None:
        """Ready when every cache is known, or has been waited for long enough."""
        # where others are ready there are workers to be heard of
        some = self.view.fleet.workers() or self._others
        if self._knows_all(waited_s) or waited_s >= (CATCH_UP_S if some else STARTING_S):
            self.state = "ready"

    def _knows_all(self, waited_s: float) -> bool:
        """Whether every cache is known: everybody speaks within a heartbeat, and snapshots come soon after."""
        return waited_s >= self._settings.heartbeat_s and self.view.complete

    def _is_wanted(self, now: float) -> bool:
        """Whether requests should come here: it knows where to send them, or nobody else does."""
        alone = not self._others and now - self._started_at >= STARTING_S
        return self.state == "ready" or (self.state == "starting" and alone)

    async def _start_over(self, now: float) -> None:
        # without a bus the silence of workers says nothing about them
        if self.state != "draining":
            self.state = "starting"
            self._started_at = now
            self._others.clear()
            await self._take_no_more()

    async def _take_no_more(self) -> None:
        intake, self._intake = self._intake, None
        if intake is not None:
            await intake.unsubscribe()

    def _say_status(self) -> None:
        index, desk = self.view.index, self.desk
        self.metrics.indexed_blocks.set(len(index))
        self.metrics.indexed_bytes.set(index.nbytes)
        self.metrics.overflow.set(index.overflow_total)
        self.metrics.gaps.set(self.view.resync.gaps_total)
        workers = self.view.fleet.workers()
        self.metrics.workers.set(len(workers))
        for worker in workers:
            self.metrics.learn(worker)
        self.metrics.blind_workers.set(len(self.view.blind))
        for tier, waiting in desk.admission.by_tier().items():
            self.metrics.held.labels(tier).set(waiting)
        self.outbox.publish(subjects.status("router", self.id), RouterStatus(
            self.id, self.epoch, self.state, desk.placed_total, desk.refused_total, len(index), len(desk.admission),
            self._busy.share(self._clock.cpu(), self._clock.now())))
