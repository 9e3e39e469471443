"""Requests that wait at a router for room at a worker: who is next, and who is turned away.

Rules
- Cost is counted in worker seconds: what is not cached must be computed, and a stream takes its part of full steps.
- Between tenants: weighted start-time fair queueing. Whoever has waiting requests gets service in proportion to weight
  times the tier's shares, whatever others send; whoever comes back after a pause starts level, not with a credit.
- Within a tenant and tier: by priority, then arrival. Lanes (who may serve a request) do not wait for each other.
- `flex` stands in a line of its own, which moves only when nobody in the first may.
- The queue is bounded in places. When it is full a request gets in if one of a tenant that takes more room for its
  weight can give way: the last one, and flex before all others.
Pure: no clock, no bus.

    seconds ahead = cost of all that goes first / drain rate          exact while nobody else comes
"""

from bisect import insort
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from shared.tiers import FLEX, LEAST_WEIGHT, MOST_WEIGHT, TIERS, Tier, shares

T = TypeVar("T")

# tenants whose share is remembered while nothing of theirs waits
REMEMBERED = 4096
# the drain rate follows this much of the past; what was known before counts as so much of it
WINDOW_S, PRIOR_S = 30.0, 5.0
# how far costs may seem to be off: requests of next to no cost are held up by other things than workers, and what is
# seen of them says nothing of those that come next
MOST_OFF = 8.0
MAX_RELEASES = 4096


class Ticket(Generic[T]):
    """One waiting request. `lane`: requests of one lane can go to the same workers. `order` is set by the queue.

    `weight` is its tenant's; tickets of one tenant may differ while gateways learn of a new one.
    """

    __slots__ = ("content", "cost_s", "lane", "name", "order", "places", "priority", "share", "since_s", "tenant",
                 "tier", "weight")

    def __init__(self, name: str, content: T, tenant: str, tier: Tier, cost_s: float, since_s: float, priority: int = 0,
                 lane: Any = None, places: int = 1, weight: float = 1.0) -> None:
        self.name = name
        self.content = content
        self.tenant = tenant
        self.tier = tier
        self.cost_s = cost_s
        self.since_s = since_s
        self.priority = priority
        self.lane = lane
        self.places = places
        self.weight = weight
        self.share = weight * shares(tier)  # beside requests of other tenants and tiers
        self.order = 0

    @property
    def rank(self) -> tuple[int, int]:
        """Within its tenant and tier, smaller goes first."""
        return -self.priority, self.order


class Full(NamedTuple):
    """No place. `over_share`: other tenants wait too, and this one takes the most room for its weight."""

    over_share: bool


class _Flow(Generic[T]):
    """What one tenant has waiting in one tier. `tag`: service received so far, by weight; that of the next ticket."""

    __slots__ = ("tag", "tickets")

    def __init__(self, tag: float) -> None:
        self.tag = tag
        self.tickets: list[Ticket[T]] = []


class _Line(Generic[T]):
    """Flows that share by weight."""

    def __init__(self) -> None:
        self._flows: dict[tuple[str, str], _Flow[T]] = {}
        self._level = 0.0  # the tag that was served last

    def __iter__(self) -> Iterator[Ticket[T]]:
        for flow in self._flows.values():
            yield from flow.tickets

    def add(self, ticket: Ticket[T]) -> None:
        key = ticket.tier, ticket.tenant
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = _Flow(self._level)
        if not flow.tickets:
            flow.tag = max(flow.tag, self._level)
        insort(flow.tickets, ticket, key=lambda other: other.rank)

    def next(self, blocked: Collection[Any]) -> Ticket[T] | None:
        """Whose turn it is among those whose lane is not blocked."""
        best, best_at = None, (0.0, 0)
        for flow in self._flows.values():
            for ticket in flow.tickets:
                if ticket.lane not in blocked:
                    if best is None or (flow.tag, ticket.order) < best_at:
                        best, best_at = ticket, (flow.tag, ticket.order)
                    break
        return best

    def remove(self, ticket: Ticket[T], charge_s: float | None = None) -> None:
        """Take it out; `charge_s` when it is served."""
        flow = self._flows[ticket.tier, ticket.tenant]
        flow.tickets.remove(ticket)
        if charge_s is not None:
            self._level = max(self._level, flow.tag)
            flow.tag += charge_s / ticket.share
        if not any(flow.tickets for flow in self._flows.values()):
            # nobody is owed anything
            self._flows.clear()
            self._level = 0.0
        elif len(self._flows) > REMEMBERED:
            self._flows = {key: flow for key, flow in self._flows.items() if flow.tickets}

    def ahead_s(self, tier: Tier, tenant: str, priority: int) -> float:
        """The cost of all that would go before such a request if it came now."""
        own = self._flows.get((tier, tenant))
        mine = [] if own is None else [ticket for ticket in own.tickets if ticket.priority >= priority]
        tag = self._level if own is None else own.tag if own.tickets else max(own.tag, self._level)
        start = tag + sum(ticket.cost_s / ticket.share for ticket in mine)
        total = sum(ticket.cost_s for ticket in mine)
        for flow in self._flows.values():
            if flow is not own:
                at = flow.tag
                for ticket in flow.tickets:
                    if at > start:
                        break
                    total += ticket.cost_s
                    at += ticket.cost_s / ticket.share
        return total

    def last_of(self, tenant: str, besides: Collection[Ticket[T]]) -> Ticket[T] | None:
        """The request that this tenant misses least: of its lowest tier, the last in turn."""
        for tier in reversed(TIERS):
            flow = self._flows.get((tier, tenant))
            for ticket in reversed(flow.tickets if flow else ()):
                if ticket not in besides:
                    return ticket
        return None


class FairQueue(Generic[T]):
    """At most `most_places` places for requests of one model."""

    def __init__(self, most_places: int) -> None:
        self.most_places = most_places
        self.places = 0
        self._first: _Line[T] = _Line()
        self._flex: _Line[T] = _Line()
        self._tickets: dict[str, Ticket[T]] = {}
        self._filled: dict[str, int] = {}  # tenant -> places
        self._weights: dict[str, float] = {}  # tenant -> that of its last ticket
        self._lanes: Counter[tuple[bool, Any]] = Counter()  # (flex, lane) -> tickets
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def __iter__(self) -> Iterator[Ticket[T]]:
        return iter(self._tickets.values())

    def get(self, name: str) -> Ticket[T] | None:
        """The ticket of that name."""
        return self._tickets.get(name)

    def places_of(self, tenant: str) -> int:
        """How many places it has taken."""
        return self._filled.get(tenant, 0)

    def waits_before(self, tier: Tier, lane: Any) -> bool:
        """Whether somebody of this lane must not be overtaken by a request of `tier` that comes now."""
        return self._lanes[False, lane] > 0 or (tier == FLEX and self._lanes[True, lane] > 0)

    def offer(self, ticket: Ticket[T]) -> list[Ticket[T]] | Full:
        """Let it wait. Returns who gave way for it, or Full: then nothing has changed."""
        given = self._room_for(ticket)
        if isinstance(given, Full):
            return given
        for other in given:
            self.drop(other)
        self._arrivals += 1
        ticket.order = self._arrivals
        self._tickets[ticket.name] = ticket
        self.places += ticket.places
        self._filled[ticket.tenant] = self._filled.get(ticket.tenant, 0) + ticket.places
        self._weights[ticket.tenant] = ticket.weight
        self._lanes[ticket.tier == FLEX, ticket.lane] += 1
        self._line(ticket.tier).add(ticket)
        return given

    def next(self, blocked: Collection[Any] = (), blocked_flex: Collection[Any] = ()) -> Ticket[T] | None:
        """Whose turn it is, still in the queue, among those whose lane is not blocked."""
        return self._first.next(blocked) or self._flex.next(blocked_flex)

    def take(self, ticket: Ticket[T], cost_s: float | None = None) -> None:
        """It is served, at `cost_s` if that is known better now."""
        self._remove(ticket, ticket.cost_s if cost_s is None else cost_s)

    def drop(self, ticket: Ticket[T]) -> None:
        """It leaves without being served."""
        self._remove(ticket, None)

    def ahead_s(self, tier: Tier, tenant: str, priority: int = 0) -> float:
        """Worker seconds that go before such a request if it came now."""
        if tier != FLEX:
            return self._first.ahead_s(tier, tenant, priority)
        return sum(ticket.cost_s for ticket in self._first) + self._flex.ahead_s(tier, tenant, priority)

    def _remove(self, ticket: Ticket[T], charge_s: float | None) -> None:
        del self._tickets[ticket.name]
        self.places -= ticket.places
        self._filled[ticket.tenant] -= ticket.places
        if not self._filled[ticket.tenant]:
            del self._filled[ticket.tenant], self._weights[ticket.tenant]
        lane = ticket.tier == FLEX, ticket.lane
        self._lanes[lane] -= 1
        if not self._lanes[lane]:
            del self._lanes[lane]
        self._line(ticket.tier).remove(ticket, charge_s)

    def _line(self, tier: Tier) -> _Line[T]:
        return self._flex if tier == FLEX else self._first

    def _room_for(self, ticket: Ticket[T]) -> list[Ticket[T]] | Full:
        missing = self.places + ticket.places - self.most_places
        filled = dict(self._filled)
        given: list[Ticket[T]] = []
        while missing > 0:
            victim = self._gives_way(ticket, filled, given)
            if victim is None:
                others = [places / self._weights[tenant] for tenant, places in self._filled.items()
                          if tenant != ticket.tenant]
                mine = (self.places_of(ticket.tenant) + ticket.places) / ticket.weight
                return Full(bool(others) and mine >= max(others))
            given.append(victim)
            filled[victim.tenant] -= victim.places
            missing -= victim.places
        return given

    def _gives_way(self, ticket: Ticket[T], filled: Mapping[str, int],
                   given: Collection[Ticket[T]]) -> Ticket[T] | None:
        if ticket.tier != FLEX:
            flex = [other for other in self._flex if other not in given]
            if flex:
                return max(flex, key=lambda other: other.order)
        mine = (filled.get(ticket.tenant, 0) + ticket.places) / ticket.weight
        fuller = {tenant: fill for tenant, places in filled.items()
                  if tenant != ticket.tenant and (fill := places / self._weights[tenant]) > mine}
        for tenant in sorted(fuller, key=lambda tenant: -fuller[tenant]):
            victim = self._line(ticket.tier).last_of(tenant, given)
            if victim is not None:
                return victim
        return None


class DrainRate:
    """Worker seconds served a second, measured while requests wait: one per worker if costs were exact."""

    def __init__(self) -> None:
        self._served: deque[tuple[float, float]] = deque(maxlen=MAX_RELEASES)
        self._busy_since_s: float | None = None
        self._ratio = 1.0  # of what was measured last to one per worker

    def wait(self, now: float) -> None:
        """Somebody waits from now on."""
        if self._busy_since_s is None:
            self._busy_since_s = now

    def serve(self, cost_s: float, now: float) -> None:
        """So much was given to a worker."""
        self._served.append((now, cost_s))

    def rest(self, workers: int, now: float) -> None:
        """Nobody waits any more."""
        if self._busy_since_s is not None and workers:
            self._ratio = self.per_second(workers, now) / workers
        self._busy_since_s = None
        self._served.clear()

    def per_second(self, workers: int, now: float) -> float:
        """With so many workers. Within a factor of MOST_OFF of one per worker."""
        nominal = float(max(1, workers))
        expected = nominal * self._ratio
        if self._busy_since_s is None:
            return expected
        begin = max(self._busy_since_s, now - WINDOW_S)
        if len(self._served) == MAX_RELEASES:
            begin = max(begin, self._served[0][0])
        while self._served and self._served[0][0] < begin:
            self._served.popleft()
        served_s = sum(cost_s for _, cost_s in self._served)
        measured = (served_s + expected * PRIOR_S) / (now - begin + PRIOR_S)
        return min(MOST_OFF * nominal, max(nominal / MOST_OFF, measured))


def weights_of(text: str) -> dict[str, float]:
    """`acme=4,example=0.5` as a mapping. Raises ValueError saying what is wrong."""
    weights = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        tenant, equals, number = part.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not tenant or not equals or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            raise ValueError(f"bad tenant weight {part!r}: write TENANT=WEIGHT with a weight from "
                             f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}, several with commas between them")
        weights[tenant.strip()] = weight
    return weights
