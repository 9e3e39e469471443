"""Requests at one router: weighed against the workers, held while none has room, placed or refused.

Rule: what happens to a request is decided here and carried out by `router.outgoing`; every request that comes leaves
once, to a worker or with a reason.

    arrived -> weigh -> settle -> worker.<id>.generate, and where others listen placed.<router>
                               or -> replies.<gateway> with the reason
                     -> hold, while no worker has room                       -> replies.<gateway>, with each heartbeat
"""

import asyncio
import contextvars
import random
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import structlog
from msgspec.structs import replace
from opentelemetry.context import Context

from router import spans
from router.admission import Admission, TurnedAway, lane_of
from router.metrics import Metrics
from router.outgoing import Outbox, Outgoing
from router.placement import Candidate, Decision, Refused, decide
from router.queueing import Ticket, weights_of
from router.receipts import receipt_of, refusal_of
from router.view import View
from shared import receipts, subjects, telemetry, tiers
from shared.clock import Clock
from shared.errors import MeshUnavailable, Overloaded, TooLarge
from shared.messages import Cancel, Failed, Generate, Placement, Queued, Reply, encode
from shared.receipts import Receipt
from shared.settings import RouterSettings
from shared.tokens import count

# a request whose worker turned out to be gone is placed again this often
MAX_PLACEMENTS = 8
# attempts remembered, so that a message delivered twice is placed once
MAX_SEEN = 16_384
# how often held requests look for room, and how many go before everybody else has a turn of the event loop
ROOM_S, LET_IN_AT_ONCE = 0.05, 32

_log = structlog.get_logger("router")


class Arrived(NamedTuple):
    """A request on its way through this router."""

    request: Generate
    context: Context
    at_wall_s: float  # when it came
    placements: int = 0  # how often it was sent to a worker that was gone

    @property
    def traced(self) -> dict[str, str]:
        """The trace it belongs to, as fields of a line of the log."""
        return telemetry.ids_in(telemetry.traceparent_of(self.context))


class _Weighed(NamedTuple):
    """A request beside the workers as they are now."""

    workers: list[Candidate]
    verdict: Decision | Refused
    decision_s: float


class Desk:
    """The requests of one router, and what became of them.

    Spans belong to whoever made this object (`telemetry.configure_tracing`), not to the task that a message came with.
    """

    def __init__(self, settings: RouterSettings, clock: Clock, view: View, outbox: Outbox, metrics: Metrics) -> None:
        self.placed_total = 0
        self.refused_total = 0
        self.has_peers = False  # whether other routers listen to what is placed here
        self.admission: Admission[Arrived] = Admission(
            settings.max_held, settings.max_queue_s, weights_of(settings.tenant_weights))
        self._settings = settings
        self._clock = clock
        self._view = view
        self._outbox = outbox
        self._metrics = metrics
        self._rng = random.Random(settings.id)
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._some_held = asyncio.Event()
        self._context = contextvars.copy_context()
        self._log = _log.bind()  # once: it takes longer than what is logged at a level that nobody hears

    # --- what comes and goes

    def take(self, request: Generate, context: Context) -> None:
        """A request came, perhaps not for the first time."""
        if self._is_new(request):
            arrived = Arrived(request, context, self._clock.wall())
            if not self._takes_its_place(arrived):
                self._route(arrived)

    def cancel(self, cancel: Cancel) -> None:
        """Nobody wants the answer any more: let go of it if it is held here."""
        ticket = self.admission.held(cancel.request_id)
        if ticket is not None and ticket.content.request.attempt <= cancel.attempt:
            self._drop(ticket)

    # --- deciding

    def _route(self, arrived: Arrived) -> None:
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
        workers = self._view.candidates(request.block_hashes, now)
        verdict = self._decide(request, workers, now)
        decision_s = self._clock.now() - now
        self._metrics.decision_s.observe(decision_s)
        return _Weighed(workers, verdict, decision_s)

    def _among_those_with_room(self, request: Generate, weighed: _Weighed, now: float) -> _Weighed:
        """Flex goes nowhere else; all others may find it worth to queue behind a cache."""
        if tiers.known(request.tier) != tiers.FLEX or isinstance(weighed.verdict, Refused):
            return weighed
        workers = self.admission.with_room(request, weighed.verdict, weighed.workers, now)
        if len(workers) == len(weighed.verdict.candidates):
            return weighed
        return weighed._replace(workers=workers, verdict=self._decide(request, workers, now))

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
            served_lately=self._view.served_lately(request.model, now),
        )

    def _settle(self, arrived: Arrived, weighed: _Weighed) -> None:
        """Carry a verdict out."""
        request, verdict, decision_s = arrived.request, weighed.verdict, weighed.decision_s
        if isinstance(verdict, Refused):
            self._refuse_arrived(arrived, verdict, decision_s)
        else:
            prompt_tokens = count(request.tokens) + count(request.generated)
            receipt = receipt_of(self._settings.id, prompt_tokens, verdict, weighed.workers, decision_s,
                                 request.cache_hint)
            context = arrived.context
            if self._context.run(telemetry.records, context):
                told = spans.placed(self._settings.id, request, verdict, receipt)
                context = self._context.run(
                    telemetry.span_at, "route", arrived.at_wall_s, self._clock.wall(), context, told)
            self._place(arrived, verdict, receipt, telemetry.inject(context))

    # --- carrying it out

    def _place(self, arrived: Arrived, decision: Decision, receipt: Receipt, headers: Mapping[str, str]) -> None:
        chosen, prompt_tokens, router = decision.chosen, receipt.prompt_tokens, self._settings.id
        placement = Placement(router, chosen.worker, chosen.cached_tokens, chosen.estimate_s, decision.policy,
                              receipt.certain_tokens)
        request = replace(arrived.request, placement=replace(placement, receipt=receipts.pack(receipt)))
        # under a policy to where it was when this was decided: whoever is elsewhere under that name hears nothing
        there = self._view.fleet.worker(chosen.worker) if request.residency.zones else None
        self._view.on_placed(request, prompt_tokens, self._clock.now())
        self.admission.on_placed(chosen.worker)
        self._outbox.hand_over(Outgoing(
            subjects.worker_generate(chosen.worker, there.zone if there is not None else ""), encode(request), headers,
            unheard=lambda: self._unheard(arrived, request),
            too_large=lambda: self._refuse(arrived, Refused(
                TooLarge.code, f"{prompt_tokens} prompt tokens are more than the bus carries", False, 0.0, {})),
        ))
        if self.has_peers:
            told = replace(request, tokens=b"", generated=b"", prediction=b"", cache_salt=b"", placement=placement)
            self._outbox.hand_over(Outgoing(subjects.placed(router), encode(told), headers))
        self.placed_total += 1
        self._metrics.placed.labels(chosen.worker).inc()
        self._metrics.prompt_tokens.inc(prompt_tokens)
        self._metrics.cached_tokens.inc(chosen.cached_tokens)
        traceparent = headers.get("traceparent", "")
        self._metrics.estimate_s.observe(chosen.estimate_s, telemetry.exemplar_in(traceparent))
        self._log.debug("request_placed", request=request.request_id, attempt=request.attempt, worker=chosen.worker,
                        cached_tokens=chosen.cached_tokens, estimate_s=chosen.estimate_s,
                        candidates=len(decision.candidates), **telemetry.ids_in(traceparent))

    def _unheard(self, arrived: Arrived, request: Generate) -> None:
        """The worker that `request` was sent to does not listen: it died a moment ago, or is not up yet."""
        assert request.placement is not None
        worker = request.placement.worker
        self._metrics.unheard.inc()
        self._view.on_unheard(request, worker)
        _log.warning("worker_unheard", worker=worker, request=request.request_id, attempt=request.attempt,
                     **arrived.traced)
        if arrived.placements + 1 < MAX_PLACEMENTS:
            self._route(arrived._replace(placements=arrived.placements + 1))
        else:
            self._refuse(arrived, Refused(Overloaded.code, "every worker that was tried is gone", True, 1.0, {}))

    def _refuse_arrived(self, arrived: Arrived, refused: Refused, decision_s: float = 0.0) -> None:
        request = arrived.request
        prompt_tokens = count(request.tokens) + count(request.generated)
        self._context.run(telemetry.span_at, "route", arrived.at_wall_s, self._clock.wall(), arrived.context,
                          spans.refused(self._settings.id, request, refused), error=refused.code)
        receipt = refusal_of(self._settings.id, self._settings.policy, prompt_tokens, refused, decision_s)
        self._refuse(arrived, refused, receipts.pack(receipt))

    def _refuse(self, arrived: Arrived, refused: Refused, receipt: bytes = b"") -> None:
        request = arrived.request
        failed = Failed(request.request_id, request.attempt, refused.code, refused.message, refused.retryable,
                        refused.retry_after_s, receipt)
        self._outbox.reply(request.gateway, (failed,))
        self.refused_total += 1
        self._metrics.refused.labels(refused.code).inc()
        _log.info("request_refused", request=request.request_id, attempt=request.attempt, code=refused.code,
                  reason=refused.message, turned_away=dict(refused.turned_away), **arrived.traced)

    # --- who waits

    async def let_in(self) -> None:
        """While requests are held, look for room."""
        while True:
            await self._some_held.wait()
            # a turn for everybody else when many go at once
            await self._clock.sleep(0.0 if self._let_in_some() == LET_IN_AT_ONCE else ROOM_S)
            if not len(self.admission):
                self._some_held.clear()

    def look_after_held(self, now: float) -> None:
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
            self._outbox.reply(gateway, tuple(replies))

    def hand_held_on(self) -> None:
        """This router leaves: gateways send what it held to another."""
        for ticket in list(self.admission):
            self._drop(ticket)
            self._refuse_arrived(ticket.content, Refused(
                MeshUnavailable.code, "the router that held the request is leaving", True, 1.0, {}))

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
                    self._metrics.waited_s.labels(ticket.tier).observe(now - ticket.since_s)
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

    def _takes_its_place(self, arrived: Arrived) -> bool:
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

    def _drop(self, ticket: Ticket[Arrived]) -> None:
        self.admission.drop(ticket.content.request.model, ticket, self._clock.now())

    def _turn_away(self, away: TurnedAway[Arrived]) -> None:
        self._metrics.turned_away.labels(away.reason).inc()
        self._refuse_arrived(away.content, away.refused)

    def _is_new(self, request: Generate) -> bool:
        """Whether this attempt was not routed before: attempts are never reused, but messages may come twice."""
        key = (request.request_id, request.attempt)
        if key in self._seen:
            self._metrics.repeated.inc()
            return False
        self._seen[key] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return True
