"""The router: a request comes in, a worker is named, the request goes on.

Rules: it holds nothing that cannot be heard again (law 6); a handler is decode, decide, hand over; one task sends, in
order, so that no handler waits for the bus. What cannot leave is dropped and counted: the gateway sends a request again
that nobody accepted.

    generate.*  -> decide -> worker.<id>.generate, placed.<router>      or -> replies.<gateway> with the reason
                -> hold, while no worker has room                       -> replies.<gateway>, with each heartbeat
    router.<id>.cancel -> let go of what is held
    worker.*.kv, status.worker.*, placed.* -> the view                  -> worker.<id>.kv_request, when incomplete
"""

import asyncio
import contextvars
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import msgspec
import structlog
from msgspec.structs import replace
from opentelemetry.context import Context

from router.admission import Admission, TurnedAway, lane_of
from router.metrics import Metrics
from router.placement import POLICIES, Candidate, Decision, Refused, decide
from router.queueing import Ticket, weights_of
from router.receipts import receipt_of, refusal_of
from router.view import View
from shared import receipts, subjects, telemetry, tiers
from shared import trace_names as names
from shared.blocks import BLOCK_SIZE_TOKENS, HASH_BYTES, split_hashes
from shared.bus import Bus, BusUnavailable, Delivery, Subscription
from shared.clock import Clock
from shared.errors import MeshUnavailable, NoEligibleWorker, Overloaded, TooLarge
from shared.ids import new_epoch, new_id
from shared.messages import (
    Cancel,
    Failed,
    Generate,
    KvMessage,
    Placement,
    Queued,
    Reply,
    RouterStatus,
    SnapshotRequest,
    Status,
    StepReplies,
    Wire,
    WorkerStatus,
    decode,
    encode,
)
from shared.receipts import Receipt
from shared.settings import RouterSettings
from shared.tokens import count

# a router waits this long for snapshots before it calls itself ready
STARTING_S = 1.0
# what a starting router may only seem to lack: workers, or ones with room
PATIENCE_HELPS = (NoEligibleWorker.code, Overloaded.code)
# requests held while a starting router has not heard any worker
MAX_PARKED = 1024
# messages that wait for the bus; past it they are dropped, as a broker would
MAX_OUTGOING = 10_000
# a request whose worker turned out to be gone is placed again this often
MAX_PLACEMENTS = 8
# attempts remembered, so that a message delivered twice is placed once
MAX_SEEN = 16_384
MAX_GATEWAYS = 4096
FLUSH_S = 1.0
# how often held requests look for room, and how many go before everybody else has a turn of the event loop
ROOM_S, LET_IN_AT_ONCE = 0.05, 32

_log = structlog.get_logger("router")


class _Outgoing(NamedTuple):
    subject: str
    data: bytes
    headers: Mapping[str, str] | None = None
    unheard: Callable[[], None] | None = None
    too_large: Callable[[], None] | None = None


class _Arrived(NamedTuple):
    """A request on its way through this router."""

    request: Generate
    context: Context
    at_wall_s: float  # when it came
    placements: int = 0  # how often it was sent to a worker that was gone


class _Weighed(NamedTuple):
    """A request beside the workers as they are now."""

    workers: list[Candidate]
    hashes: list[bytes]
    verdict: Decision | Refused
    decision_s: float


async def serve(bus: Bus, settings: RouterSettings, clock: Clock, ready: asyncio.Event | None = None) -> None:
    """Route until cancelled; then stop taking requests, send what is decided, say goodbye.

    `ready` is set once this router is subscribed. Raises ValueError for an unknown policy or an id that cannot stand in
    a subject, BusUnavailable when the broker is gone at the start.
    """
    settings = checked(settings)
    tracing = telemetry.configure_tracing("router", settings.id, settings.otlp)
    router = Router(bus, settings, clock)
    try:
        with router.metrics.served(settings.metrics_port):
            await router.listen()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(router.send(), name=f"{router.id}-send")
                tasks.create_task(router.beat(), name=f"{router.id}-beat")
                tasks.create_task(router.let_in(), name=f"{router.id}-let-in")
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
    """One router: the view, the counters that go with its id, and the messages that wait to leave.

    Spans belong to whoever made this object (`telemetry.configure_tracing`), not to the task that a message came with.
    """

    def __init__(self, bus: Bus, settings: RouterSettings, clock: Clock) -> None:
        self.id = settings.id
        self.epoch = new_epoch(clock)
        self.state: Literal["starting", "ready", "draining"] = "starting"
        self.view = View(settings.silence_s)
        self.metrics = Metrics()
        self.admission: Admission[_Arrived] = Admission(
            settings.max_held, settings.max_queue_s, weights_of(settings.tenant_weights))
        self.placed_total = 0
        self.refused_total = 0
        self._bus = bus
        self._settings = settings
        self._clock = clock
        self._started_at = clock.now()
        self._rng = random.Random(self.id)
        self._outgoing: asyncio.Queue[_Outgoing] = asyncio.Queue(MAX_OUTGOING)
        self._parked: list[_Arrived] = []
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._reply_seq: OrderedDict[str, int] = OrderedDict()
        self._some_held = asyncio.Event()
        self._intake: Subscription | None = None
        self._context = contextvars.copy_context()

    # --- what arrives

    async def listen(self) -> None:
        """Subscribe; to requests last, when everything that helps to place them is heard."""
        for subject, handler in ((subjects.status("worker", "*"), self.on_status), (subjects.ALL_KV, self.on_kv),
                                 (subjects.ALL_PLACED, self.on_placed),
                                 (subjects.router_cancel(self.id), self.on_cancel)):
            await self._bus.subscribe(subject, handler)
        self._intake = await self._bus.subscribe(subjects.ALL_GENERATE, self.on_generate, subjects.ROUTER_QUEUE)

    def on_generate(self, delivery: Delivery) -> None:
        request: Generate | None = self._decoded(delivery, Generate)
        if request is not None and self._is_new(request):
            arrived = _Arrived(request, telemetry.extract(delivery.headers), self._clock.wall())
            if not self._takes_its_place(arrived):
                self._route(arrived)

    def on_cancel(self, delivery: Delivery) -> None:
        cancel = self._decoded(delivery, Cancel)
        ticket = None if cancel is None else self.admission.held(cancel.request_id)
        if ticket is not None and ticket.content.request.attempt <= cancel.attempt:
            self._drop(ticket)

    def on_status(self, delivery: Delivery) -> None:
        status = self._decoded(delivery, Status)
        if isinstance(status, WorkerStatus) and delivery.subject == subjects.status("worker", status.id):
            self._ask_snapshots(self.view.on_status(status, self._clock.now()))
            self.admission.on_status(status, self._clock.now())
            self._sound_alarms()

    def on_kv(self, delivery: Delivery) -> None:
        message = self._decoded(delivery, KvMessage)
        if message is not None and delivery.subject == subjects.worker_kv(message.worker):
            self._ask_snapshots(self.view.on_kv(message, self._clock.now()))
            self._sound_alarms()

    def on_placed(self, delivery: Delivery) -> None:
        request = self._decoded(delivery, Generate)
        if request is not None and request.placement is not None and request.placement.router != self.id:
            # the tokens were left out; the last block may be half full
            prompt_tokens = len(request.block_hashes) // HASH_BYTES * BLOCK_SIZE_TOKENS + BLOCK_SIZE_TOKENS // 2
            self.view.on_placed(request, prompt_tokens, self._clock.now())
            self.admission.on_placed(request.placement.worker)

    # --- deciding

    def _route(self, arrived: _Arrived) -> None:
        """Place one request, or hold it while no worker has room, or refuse it."""
        request, now = arrived.request, self._clock.now()
        weighed = self._weigh(request, now)
        # who has been delivered tokens has waited before
        if isinstance(weighed.verdict, Refused) or request.generated:
            self._settle(arrived, weighed)
            return
        has_room = self.admission.finds_room(request, weighed.verdict, weighed.workers, now)
        if has_room and not self.admission.would_overtake(request):
            self._settle(arrived, self._among_those_with_room(request, weighed, now))
            return
        turned_away = self.admission.hold(
            request, arrived, weighed.verdict, weighed.workers, now, self._clock.wall())
        for away in turned_away:
            self._turn_away(away)
        self._some_held.set()

    def _weigh(self, request: Generate, now: float) -> _Weighed:
        hashes = split_hashes(request.block_hashes)
        workers = self.view.candidates(hashes, now)
        verdict = self._decide(request, workers, now)
        decision_s = self._clock.now() - now
        self.metrics.decision_s.observe(decision_s)
        return _Weighed(workers, hashes, verdict, decision_s)

    def _among_those_with_room(self, request: Generate, weighed: _Weighed, now: float) -> _Weighed:
        """Flex goes nowhere else; all others may find it worth to queue behind a cache."""
        if tiers.known(request.tier) != tiers.FLEX or isinstance(weighed.verdict, Refused):
            return weighed
        workers = self.admission.with_room(request, weighed.verdict, weighed.workers, now)
        if len(workers) == len(weighed.verdict.candidates):
            return weighed
        return weighed._replace(workers=workers, verdict=self._decide(request, workers, now))

    def _settle(self, arrived: _Arrived, weighed: _Weighed) -> None:
        """Carry a verdict out; one that patience may change is parked while this router has not heard of everybody."""
        request, verdict, decision_s = arrived.request, weighed.verdict, weighed.decision_s
        if isinstance(verdict, Refused):
            if self.state == "starting" and verdict.code in PATIENCE_HELPS and len(self._parked) < MAX_PARKED:
                self._parked.append(arrived)
                return
            self._refuse_arrived(arrived, verdict, decision_s)
        else:
            chosen = verdict.chosen
            prompt_tokens = count(request.tokens) + count(request.generated)
            credited = weighed.hashes[:chosen.cached_tokens // BLOCK_SIZE_TOKENS]
            certain_tokens = self.view.certain_blocks(chosen.worker, credited) * BLOCK_SIZE_TOKENS
            receipt = receipt_of(self.id, prompt_tokens, verdict, weighed.workers, certain_tokens, decision_s,
                                 request.cache_hint)
            context = self._context.run(telemetry.span_at, "route", arrived.at_wall_s, self._clock.wall(),
                                        arrived.context, self._receipt(request, verdict, receipt))
            self._place(arrived, verdict, receipt, telemetry.inject(context))

    def _refuse_arrived(self, arrived: _Arrived, refused: Refused, decision_s: float = 0.0) -> None:
        request = arrived.request
        prompt_tokens = count(request.tokens) + count(request.generated)
        self._context.run(telemetry.span_at, "route", arrived.at_wall_s, self._clock.wall(), arrived.context,
                          self._refusal(request, refused), error=refused.code)
        receipt = refusal_of(self.id, self._settings.policy, prompt_tokens, refused, decision_s)
        self._refuse(request, refused, receipts.pack(receipt))

    def _decide(self, request: Generate, workers: list[Candidate], now: float) -> Decision | Refused:
        return decide(
            request,
            workers,
            wall_s=self._clock.wall(),
            rng=self._rng,
            policy=self._settings.policy,
            turn=self.placed_total,
            max_queue_s=self._settings.max_queue_s,
            recipe=request.recipe,
            served_lately=self.view.served_lately(request.model, now),
        )

    def _place(self, arrived: _Arrived, decision: Decision, receipt: Receipt, headers: Mapping[str, str]) -> None:
        chosen, prompt_tokens = decision.chosen, receipt.prompt_tokens
        placement = Placement(self.id, chosen.worker, chosen.cached_tokens, chosen.estimate_s, decision.policy,
                              receipt.certain_tokens)
        request = replace(arrived.request, placement=replace(placement, receipt=receipts.pack(receipt)))
        # under a policy to where it was when this was decided: whoever is elsewhere under that name hears nothing
        there = self.view.fleet.worker(chosen.worker) if request.residency.zones else None
        self.view.on_placed(request, prompt_tokens, self._clock.now())
        self.admission.on_placed(chosen.worker)
        self._hand_over(_Outgoing(
            subjects.worker_generate(chosen.worker, there.zone if there is not None else ""), encode(request), headers,
            unheard=lambda: self._unheard(arrived, request),
            too_large=lambda: self._refuse(request, Refused(
                TooLarge.code, f"{prompt_tokens} prompt tokens are more than the bus carries", False, 0.0, {})),
        ))
        told = replace(request, tokens=b"", generated=b"", prediction=b"", cache_salt=b"", placement=placement)
        self._hand_over(_Outgoing(subjects.placed(self.id), encode(told), headers))
        self.placed_total += 1
        self.metrics.placed.labels(chosen.worker).inc()
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self.metrics.cached_tokens.inc(chosen.cached_tokens)
        self.metrics.estimate_s.observe(chosen.estimate_s)
        _log.debug("request_placed", request=request.request_id, attempt=request.attempt, worker=chosen.worker,
                   cached_tokens=chosen.cached_tokens, estimate_s=chosen.estimate_s,
                   candidates=len(decision.candidates))

    def _unheard(self, arrived: _Arrived, request: Generate) -> None:
        """The worker that `request` was sent to does not listen: it died a moment ago, or is not up yet."""
        assert request.placement is not None
        worker = request.placement.worker
        self.metrics.unheard.inc()
        self.view.on_unheard(request, worker)
        _log.warning("worker_unheard", worker=worker, request=request.request_id, attempt=request.attempt)
        if arrived.placements + 1 < MAX_PLACEMENTS:
            self._route(arrived._replace(placements=arrived.placements + 1))
        else:
            self._refuse(request, Refused(Overloaded.code, "every worker that was tried is gone", True, 1.0, {}))

    def _refuse(self, request: Generate, refused: Refused, receipt: bytes = b"") -> None:
        failed = Failed(request.request_id, request.attempt, refused.code, refused.message, refused.retryable,
                        refused.retry_after_s, receipt)
        self._reply(request.gateway, (failed,))
        self.refused_total += 1
        self.metrics.refused.labels(refused.code).inc()
        _log.info("request_refused", request=request.request_id, attempt=request.attempt, code=refused.code,
                  reason=refused.message, turned_away=dict(refused.turned_away))

    def _reply(self, gateway: str, replies: tuple[Reply, ...]) -> None:
        seq = self._reply_seq.pop(gateway, 0) + 1
        self._reply_seq[gateway] = seq
        if len(self._reply_seq) > MAX_GATEWAYS:
            self._reply_seq.popitem(last=False)
        self._publish(subjects.replies(gateway), StepReplies(self.id, self.epoch, seq, replies))

    def _ask_snapshots(self, workers: list[str]) -> None:
        for worker in workers:
            self.metrics.snapshots_asked.inc()
            self._publish(subjects.worker_kv_request(worker), SnapshotRequest(self.id))

    def _sound_alarms(self) -> None:
        for alarm in self.view.alarms:
            self.metrics.alarms.labels(alarm.kind).inc()
            _log.warning("worker_mismatch", kind=alarm.kind, worker=alarm.worker, reason=alarm.reason)
        self.view.alarms.clear()

    # --- who waits

    async def let_in(self) -> None:
        """While requests are held, look for room."""
        while True:
            await self._some_held.wait()
            # a turn for everybody else when many go at once
            await self._clock.sleep(0.0 if self._let_in_some() == LET_IN_AT_ONCE else ROOM_S)
            if not len(self.admission):
                self._some_held.clear()

    def _let_in_some(self) -> int:
        """Place those whose turn it is; how many left the queue."""
        left = 0
        blocked: set[tuple[str, bool, object]] = set()
        now = self._clock.now()
        for ticket in self.admission.turns(blocked):
            request = ticket.content.request
            weighed = self._weigh(request, now)
            if isinstance(weighed.verdict, Refused):
                self._drop(ticket)
            elif self.admission.finds_room(request, weighed.verdict, weighed.workers, now):
                weighed = self._among_those_with_room(request, weighed, now)
                if isinstance(weighed.verdict, Decision):
                    self.admission.take(request.model, ticket, weighed.verdict, weighed.workers, now)
                    self.metrics.waited_s.labels(ticket.tier).observe(now - ticket.since_s)
                else:
                    self._drop(ticket)
            else:
                blocked.add(lane_of(ticket, request.model))
                continue
            self._settle(ticket.content, weighed)
            left += 1
            if left == LET_IN_AT_ONCE:
                break
        return left

    def _takes_its_place(self, arrived: _Arrived) -> bool:
        """Whether an earlier attempt of the same request waits here: then this one waits in its stead."""
        request = arrived.request
        ticket = self.admission.held(request.request_id)
        if ticket is None:
            return False
        if ticket.content.request.attempt < request.attempt:
            if request.generated:
                self._drop(ticket)
                return False
            ticket.content = arrived
        return True

    def _drop(self, ticket: Ticket[_Arrived]) -> None:
        self.admission.drop(ticket.content.request.model, ticket, self._clock.now())

    def _turn_away(self, away: TurnedAway[_Arrived]) -> None:
        self.metrics.turned_away.labels(away.reason).inc()
        self._refuse_arrived(away.content, away.refused)

    def _look_after_held(self, now: float) -> None:
        """Turn away whose time is up, and tell gateways of the others that they are still here."""
        waiting: dict[str, list[Reply]] = {}
        for ticket in list(self.admission):
            request = ticket.content.request
            away = self.admission.overdue(ticket, request, now, self._clock.wall())
            if away is not None:
                self._drop(ticket)
                self._turn_away(away)
            else:
                waiting.setdefault(request.gateway, []).append(Queued(request.request_id, request.attempt))
        for gateway, replies in waiting.items():
            self._reply(gateway, tuple(replies))

    def _hand_held_on(self) -> None:
        """This router leaves: gateways send what it held to another."""
        for ticket in list(self.admission):
            self._drop(ticket)
            self._refuse_arrived(ticket.content, Refused(
                MeshUnavailable.code, "the router that held the request is leaving", True, 1.0, {}))

    # --- what leaves

    async def send(self) -> None:
        """Publish what was decided, in order, until cancelled."""
        while True:
            out = await self._outgoing.get()
            try:
                await self._bus.publish(out.subject, out.data, out.headers, out.unheard)
            except BusUnavailable:
                self.metrics.lost.labels("bus").inc()
                _log.warning("publish_failed", subject=out.subject)
            except ValueError as error:
                self.metrics.lost.labels("too_large").inc()
                _log.warning("publish_refused", subject=out.subject, reason=str(error))
                if out.too_large is not None:
                    out.too_large()
            finally:
                self._outgoing.task_done()

    async def beat(self) -> None:
        """Twice a second: forget the silent, ask again for what is missing, say how it goes."""
        while True:
            now = self._clock.now()
            if not self._bus.connected:
                self._start_over(now)
            for worker in self.view.forget_silent(now):
                _log.info("worker_silent", worker=worker)
                self.metrics.placed.remove(worker)
                self.admission.forget(worker)
            self._ask_snapshots(self.view.snapshots_due(now))
            if self.state == "starting" and (now - self._started_at >= STARTING_S or self._has_caught_up(now)):
                self._become_ready()
            self._look_after_held(now)
            self._say_status()
            await self._clock.sleep(self._settings.heartbeat_s)

    async def leave(self) -> None:
        """Take no more requests, let what is decided go out, and say goodbye."""
        self.state = "draining"
        try:
            async with asyncio.timeout(FLUSH_S):
                if self._intake is not None:
                    await self._intake.unsubscribe()
                for arrived in self._parked:
                    self._route(arrived)
                self._hand_held_on()
                self._say_status()
                await self._outgoing.join()
        except (TimeoutError, BusUnavailable):
            _log.warning("left_in_haste", outgoing=self._outgoing.qsize())

    def _has_caught_up(self, now: float) -> bool:
        # every worker speaks once within a heartbeat
        return self.view.complete and now - self._started_at >= self._settings.heartbeat_s

    def _start_over(self, now: float) -> None:
        # without a bus the silence of workers says nothing about them
        if self.state != "draining":
            self.state = "starting"
            self._started_at = now

    def _become_ready(self) -> None:
        self.state = "ready"
        parked, self._parked = self._parked, []
        for arrived in parked:
            self._route(arrived)

    def _say_status(self) -> None:
        index = self.view.index
        self.metrics.indexed_blocks.set(len(index))
        self.metrics.indexed_bytes.set(index.bytes_estimate)
        self.metrics.overflow.set(index.overflow_total)
        self.metrics.gaps.set(self.view.resync.gaps_total)
        self.metrics.workers.set(len(self.view.fleet.workers()))
        self.metrics.blind_workers.set(len(self.view.blind))
        for tier, waiting in self.admission.by_tier().items():
            self.metrics.held.labels(tier).set(waiting)
        self._publish(subjects.status("router", self.id), RouterStatus(
            self.id, self.epoch, self.state, self.placed_total, self.refused_total, len(index), len(self.admission)))

    def _publish(self, subject: str, message: Wire) -> None:
        self._hand_over(_Outgoing(subject, encode(message)))

    def _hand_over(self, out: _Outgoing) -> None:
        try:
            self._outgoing.put_nowait(out)
        except asyncio.QueueFull:
            self.metrics.lost.labels("queue_full").inc()
            _log.warning("outgoing_full", subject=out.subject)

    # --- what cannot be trusted

    def _decoded(self, delivery: Delivery, kind: Any) -> Any:
        """The message, or None when these bytes are none."""
        try:
            return decode(delivery.data, kind)
        except msgspec.DecodeError as error:
            self.metrics.bad_messages.inc()
            _log.warning("bad_message", subject=delivery.subject, reason=str(error))
            return None

    def _is_new(self, request: Generate) -> bool:
        """Whether this attempt was not routed before: attempts are never reused, but messages may come twice."""
        key = (request.request_id, request.attempt)
        if key in self._seen:
            self.metrics.repeated.inc()
            return False
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return True

    # --- what is told of a decision

    def _receipt(self, request: Generate, decision: Decision, receipt: Receipt) -> Mapping[str, telemetry.Attribute]:
        """Everything that was weighed, as attributes of the span; `tokenmill explain` shows it too."""
        if not self._settings.otlp:
            return {}
        chosen = decision.chosen
        return {
            names.REQUEST_ID: request.request_id,
            names.ATTEMPT: request.attempt,
            names.ROUTER: self.id,
            names.WORKER: chosen.worker,
            names.PLACEMENT_POLICY: decision.policy,
            names.PLACEMENT_CACHED_TOKENS: chosen.cached_tokens,
            names.PLACEMENT_ESTIMATE_S: chosen.estimate_s,
            names.PLACEMENT_CERTAIN_TOKENS: receipt.certain_tokens,
            names.PLACEMENT_MOST_CACHED_TOKENS: receipt.most_cached_tokens,
            names.PLACEMENT_BECAUSE: receipt.because,
            names.PLACEMENT_RUNNER_UP: receipt.runner_up,
            names.PLACEMENT_CANDIDATES: [
                *(str(terms) for terms in sorted(decision.candidates, key=lambda terms: terms.cost_s)),
                *(f"{worker}: {wall}" for worker, wall in decision.turned_away.items()),
            ],
        }

    def _refusal(self, request: Generate, refused: Refused) -> Mapping[str, telemetry.Attribute]:
        return {
            names.REQUEST_ID: request.request_id,
            names.ATTEMPT: request.attempt,
            names.ROUTER: self.id,
            names.RESIDENCY: list(request.residency.zones),
            names.PLACEMENT_CANDIDATES: [f"{worker}: {wall}" for worker, wall in refused.turned_away.items()],
        }
