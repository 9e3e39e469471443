"""Whether a request goes on to a worker, waits here, or is turned away.

Rules
- It waits here only when no worker that may serve it has room: in a worker's queue neither a cheaper worker, nor a
  tenant that has waited longer, nor a fresher cache can change anything any more. A worker has room while it would run
  dry before it can be sent more. For `flex` room is a free slot.
- Nobody of its lane is overtaken, and who has been delivered tokens does not wait again.
- What cannot be served in time is turned away when it comes, with the seconds after which it could be: 503 when the
  mesh is full, 429 when one tenant is.
Pure: no clock, no bus.

    seconds until the first token = cost ahead / drain rate + the least estimate of any worker
"""

from collections.abc import Iterator, Sequence
from typing import Generic, Literal, NamedTuple, TypeVar

from router.outstanding import SETTLE_S
from router.placement import RETRY_AFTER_LEAST_S, RETRY_AFTER_MOST_S, Candidate, Decision, Refused, Terms
from router.queueing import DrainRate, FairQueue, Full, Ticket
from shared.errors import DeadlineExceeded, Overloaded, RateLimited
from shared.messages import Generate, WorkerStatus
from shared.tiers import FLEX, TIERS, Tier, known, tenants_weight

T = TypeVar("T")

# prompts ahead that are enough for a worker: for as long as it may be unheard before it is taken for dead
FULL_S = 2.0
FLEX_S = 0.25
# streams at a worker, in units of its slots, that are enough: as short as they may be, three quarters wait
FULL_ROUNDS = 4
# a request takes a place for every so many bytes, so that places bound the memory too
PLACE_BYTES = 1 << 16
# a pace is measured over no less; it follows a faster measurement at once and a slower one half way
PACE_S, PACE_SHARE = 0.1, 0.5
# a worker that was taken for full and was not may have so many times as much the next time, up to the most: streams may
# be shorter than anybody told
MORE_TRUST, MOST_TRUST = 4, 64

Reason = Literal["full", "over_share", "gave_way", "too_long", "deadline", "expired"]
REASONS: tuple[Reason, ...] = ("full", "over_share", "gave_way", "too_long", "deadline", "expired")


class TurnedAway(NamedTuple, Generic[T]):
    """No place for this one, or none any more."""

    content: T
    reason: Reason
    refused: Refused


class _Hall(Generic[T]):
    """One model's queue."""

    def __init__(self, most_places: int) -> None:
        self.queue: FairQueue[T] = FairQueue(most_places)
        self.drain = DrainRate()
        self.workers = 1  # that could serve the last request looked at


class _Pace:
    """How fast streams end at one worker: what was placed there and is no longer there.

    `trust`: how often more than expected it has worked off. `doubted`: it was taken for full since it last spoke.
    """

    def __init__(self, status: WorkerStatus, now: float) -> None:
        self.epoch = status.epoch
        self.per_second = 0.0
        self.trust = 1
        self.doubted = False
        self.heard_s = self._since_s = now
        self._streams = status.running + status.waiting
        self._placed = 0

    def place(self) -> None:
        self._placed += 1

    def hear(self, status: WorkerStatus, now: float) -> None:
        self.heard_s = now
        if self.doubted and not status.waiting:
            self.trust = min(MOST_TRUST, MORE_TRUST * self.trust)
        elif status.waiting > max(1, status.max_running):
            self.trust = max(1, self.trust // MORE_TRUST)
        self.doubted = False
        if now - self._since_s < PACE_S:
            return
        streams = status.running + status.waiting
        ended = self._placed - (streams - self._streams)
        measured = ended / (now - self._since_s)
        self.per_second = max(measured, self.per_second + PACE_SHARE * (measured - self.per_second), 0.0)
        self._since_s, self._streams, self._placed = now, streams, 0


class Admission(Generic[T]):
    """The queues of one router, by model. `T` is whatever the caller wants back with a request.

    `weights`: of tenants for whom the router's own setting counts, whatever their requests say.
    """

    def __init__(self, most_places: int, max_wait_s: float, weights: dict[str, float]) -> None:
        self._most_places = most_places
        self._max_wait_s = max_wait_s
        self._weights = weights
        self._halls: dict[str, _Hall[T]] = {}
        self._paces: dict[str, _Pace] = {}

    def __len__(self) -> int:
        return sum(len(hall.queue) for hall in self._halls.values())

    def __iter__(self) -> Iterator[Ticket[T]]:
        for hall in self._halls.values():
            yield from hall.queue

    def by_tier(self) -> dict[Tier, int]:
        """How many wait."""
        waiting = dict.fromkeys(TIERS, 0)
        for ticket in self:
            waiting[ticket.tier] += 1
        return waiting

    # --- what is heard

    def on_status(self, status: WorkerStatus, now: float) -> None:
        """A worker's heartbeat."""
        pace = self._paces.get(status.id)
        if pace is None or pace.epoch != status.epoch:
            self._paces[status.id] = _Pace(status, now)
        else:
            pace.hear(status, now)

    def on_placed(self, worker: str) -> None:
        """A router, this one or another, sent a request there."""
        if (pace := self._paces.get(worker)) is not None:
            pace.place()

    def forget(self, worker: str) -> None:
        """The worker is gone."""
        self._paces.pop(worker, None)

    # --- room

    def finds_room(self, request: Generate, decision: Decision, workers: Sequence[Candidate], now: float) -> bool:
        """Whether any of `workers`, among whom `decision` was made, can take it now."""
        chosen, flex = decision.chosen, known(request.tier) == FLEX
        if chosen.slot_s == 0 and chosen.queue_s < (FLEX_S if flex else FULL_S):
            return True
        return next(self._with_room(flex, decision, workers, now), None) is not None

    def with_room(self, request: Generate, decision: Decision, workers: Sequence[Candidate],
                  now: float) -> list[Candidate]:
        """All of them that can."""
        return list(self._with_room(known(request.tier) == FLEX, decision, workers, now))

    def _with_room(self, flex: bool, decision: Decision, workers: Sequence[Candidate],
                   now: float) -> Iterator[Candidate]:
        terms_of = {terms.worker: terms for terms in decision.candidates}
        for worker in workers:
            terms = terms_of.get(worker.status.id)
            if terms is not None and self._has_room(flex, terms, worker, now):
                yield worker

    def would_overtake(self, request: Generate) -> bool:
        """Whether others of its lane came before it."""
        hall = self._halls.get(request.model)
        return hall is not None and len(hall.queue) > 0 and hall.queue.waits_before(
            known(request.tier), _lane(request))

    def _has_room(self, flex: bool, terms: Terms, worker: Candidate, now: float) -> bool:
        status = worker.status
        pace = self._paces.get(status.id)
        if pace is None:
            return True
        # what has been worked off of what it had when it last spoke, and of what was sent since a little before
        silent_s = max(0.0, now - pace.heard_s)
        slots = status.max_running or status.running + status.waiting + worker.sent_requests + 1
        per_second = pace.per_second
        if status.waiting <= slots * FULL_ROUNDS / 2:
            # no backlog: it keeps up with streams like this one, until it says otherwise
            per_second = max(per_second, slots / (terms.prefill_s + terms.decode_s))
        sent = max(0.0, worker.sent_requests - per_second * SETTLE_S)
        streams = status.running + status.waiting + sent - per_second * silent_s
        queue_s = terms.queue_s - silent_s
        if flex:
            return streams < slots and queue_s < FLEX_S
        if queue_s >= FULL_S:
            return False
        if streams >= FULL_ROUNDS * slots * pace.trust:
            pace.doubted = True
            return False
        return True

    # --- who waits

    def held(self, request_id: str) -> Ticket[T] | None:
        """The ticket of a request that waits here."""
        return next((ticket for hall in self._halls.values() if (ticket := hall.queue.get(request_id))), None)

    def hold(self, request: Generate, content: T, decision: Decision, workers: Sequence[Candidate], now: float,
             wall_s: float) -> list[TurnedAway[T]]:
        """Let it wait. Returns who is turned away for it: others, or itself."""
        hall = self._halls.get(request.model)
        if hall is None:
            hall = self._halls[request.model] = _Hall(self._most_places)
        hall.workers = len(decision.candidates)
        tier, tenant = known(request.tier), request.tenant
        ahead_s = hall.queue.ahead_s(tier, tenant, request.priority) / hall.drain.per_second(hall.workers, now)
        if (refusal := self._in_vain(request, tier, ahead_s, decision, len(hall.queue), wall_s)) is not None:
            return [TurnedAway(content, *refusal)]
        places = 1 + (len(request.tokens) + len(request.block_hashes)) // PLACE_BYTES
        given = hall.queue.offer(Ticket(
            request.request_id, content, tenant, tier, _cost_s(decision, workers), now, request.priority,
            _lane(request), places, self._weights.get(tenant, tenants_weight(request.weight))))
        if isinstance(given, Full):
            return [TurnedAway(content, *_no_place(given, request, hall.queue, ahead_s))]
        hall.drain.wait(now)
        return [TurnedAway(other.content, "gave_way", _refused(
            RateLimited.code, f"tenant {other.tenant} has more than its share of the queue for {request.model}, and "
            "others came: send less at a time, or retry later",
            hall.queue.ahead_s(other.tier, other.tenant, other.priority) / hall.drain.per_second(hall.workers, now)))
            for other in given]

    def turns(self, blocked: set[tuple[str, bool, object]]) -> Iterator[Ticket[T]]:
        """Whose turn it is, model by model. Between two the caller has placed, dropped or blocked the one before."""
        for model, hall in list(self._halls.items()):
            while True:
                first = {lane for name, flex, lane in blocked if name == model and not flex}
                behind = {lane for name, flex, lane in blocked if name == model and flex}
                ticket = hall.queue.next(first, behind)
                if ticket is None:
                    break
                yield ticket

    def take(self, model: str, ticket: Ticket[T], decision: Decision, workers: Sequence[Candidate],
             now: float) -> None:
        """It goes to a worker now."""
        hall = self._halls[model]
        hall.workers = len(decision.candidates)
        cost_s = _cost_s(decision, workers)
        hall.drain.serve(cost_s, now)
        hall.queue.take(ticket, cost_s)
        self._rest(hall, now)

    def drop(self, model: str, ticket: Ticket[T], now: float) -> None:
        """It leaves without being served."""
        hall = self._halls[model]
        hall.queue.drop(ticket)
        self._rest(hall, now)

    def overdue(self, ticket: Ticket[T], request: Generate, now: float, wall_s: float) -> TurnedAway[T] | None:
        """Why it should not wait any longer, if so."""
        if wall_s >= request.deadline:
            return TurnedAway(ticket.content, "expired", Refused(
                DeadlineExceeded.code, f"the deadline passed after {now - ticket.since_s:.1f} s in the queue", False,
                0.0, {}))
        if ticket.tier != FLEX and now - ticket.since_s > self._max_wait_s:
            return TurnedAway(ticket.content, "too_long", _refused(
                Overloaded.code, f"no worker had room within {self._max_wait_s:.0f} s: retry later",
                self._max_wait_s / 2))
        return None

    def _rest(self, hall: _Hall[T], now: float) -> None:
        if not len(hall.queue):
            hall.drain.rest(hall.workers, now)

    def _in_vain(self, request: Generate, tier: Tier, ahead_s: float, decision: Decision, waiting: int,
                 wall_s: float) -> tuple[Reason, Refused] | None:
        first_token_s = ahead_s + min(terms.estimate_s for terms in decision.candidates)
        left_s = request.deadline - wall_s
        if first_token_s > left_s:
            return "deadline", _refused(
                Overloaded.code, f"{waiting} requests wait for room at the workers of {request.model}, a first token "
                f"takes about {first_token_s:.1f} s and the deadline is {left_s:.1f} s away: allow more time, or retry "
                "later", first_token_s - left_s)
        if tier != FLEX and ahead_s > self._max_wait_s:
            return "too_long", _refused(
                Overloaded.code, f"{waiting} requests wait for room at the workers of {request.model}, about "
                f"{ahead_s:.1f} s of work, and nobody waits longer than {self._max_wait_s:.0f} s: retry later",
                ahead_s - self._max_wait_s)
        return None


def lane_of(ticket: Ticket[T], model: str) -> tuple[str, bool, object]:
    """What to block when this one finds no room."""
    return model, ticket.tier == FLEX, ticket.lane


def _lane(request: Generate) -> object:
    """Requests with equal walls."""
    return request.residency.zones, request.vocabulary


def _cost_s(decision: Decision, workers: Sequence[Candidate]) -> float:
    """Worker seconds: the prefill, and a row's part of each full step."""
    chosen = decision.chosen
    status = next(worker.status for worker in workers if worker.status.id == chosen.worker)
    rows = status.max_running or max(1, status.running + status.waiting)
    return chosen.prefill_s + chosen.decode_s / rows


def _no_place(full: Full, request: Generate, queue: FairQueue[T], ahead_s: float) -> tuple[Reason, Refused]:
    if full.over_share:
        return "over_share", _refused(
            RateLimited.code, f"tenant {request.tenant} has {queue.places_of(request.tenant)} of {queue.most_places} "
            f"places in the queue for {request.model}, which is its share while others wait: send less at a time, or "
            "retry later", ahead_s)
    return "full", _refused(
        Overloaded.code, f"{len(queue)} requests wait for room at the workers of {request.model}, and more may not: "
        "retry later", ahead_s)


def _refused(code: str, message: str, retry_after_s: float) -> Refused:
    return Refused(code, message, True, min(max(retry_after_s, RETRY_AFTER_LEAST_S), RETRY_AFTER_MOST_S), {})
