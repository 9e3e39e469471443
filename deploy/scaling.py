"""How many of each service a mesh needs, by the signal that each has of its own.

    worker   of a model: the most of
               streams that run, wait or are held, over those that one carries at `per_token_s`
               seconds of prompts that wait, over half of `first_token_s`
               KV blocks that streams hold
    drafter  of a kind: share of the time it works; no more where workers measured that drafts do not pay
    router   cores that the process takes, and so a gateway: one turns one core

Rules: up as soon as more was needed for `UP_S` without a break; down by one when fewer would do, with a margin, for
`DOWN_S` without a break. Two that are wanted for failures are wanted whatever the load. What drains does not count,
what starts does. Pure: statuses and the time come in, numbers and sentences go out.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from msgspec import Struct, field

from shared.messages import DrafterStatus, GatewayStatus, RouterStatus, Status, WorkerStatus

S = TypeVar("S")

FULL = 0.8  # of what one worker carries; the rest is for what comes in bursts
BUSY = 0.6  # of a core, or of a drafter's time: queues grow steeply beyond
MARGIN = 0.75  # fewer are enough when they would be used no more than this share of FULL or BUSY
UP_S, DOWN_S = 15.0, 600.0
DEFAULT_SLOTS = 64  # of a worker that says nothing of itself


class Goals(Struct, frozen=True):
    """What is promised, and the bounds of each role."""

    first_token_s: float = 1.0
    per_token_s: float = 0.05
    least: Mapping[str, int] = field(default_factory=lambda: {"gateway": 1, "router": 1, "worker": 1})  # absent: 0
    most: Mapping[str, int] = field(default_factory=dict)  # absent: as many as needed


class Need(NamedTuple):
    """What the moment asks for. `up`: fewer are too few; `down`: so many are enough with a margin."""

    role: str
    name: str  # model of workers, kind of drafters; empty: of gateways and routers
    have: int
    load: float  # in services that are used to the full
    up: int
    down: int
    why: str
    usd_per_hour: float = 0.0  # of one


class Advice(NamedTuple):
    """How many of a service there should be now."""

    need: Need
    wanted: int


def needs(statuses: Iterable[Status], goals: Goals) -> list[Need]:
    """Of every service heard, in the order of a request."""
    there = [status for status in statuses if status.state != "draining"]
    gateways = [status for status in there if isinstance(status, GatewayStatus)]
    routers = [status for status in there if isinstance(status, RouterStatus)]
    workers = [status for status in there if isinstance(status, WorkerStatus)]
    drafters = [status for status in there if isinstance(status, DrafterStatus)]
    found = [_of_cores("gateway", gateways), _of_cores("router", routers)]
    models = _by(workers, lambda worker: worker.model)
    streams = sum(worker.running + worker.waiting for worker in workers)
    held = sum(router.held for router in routers)
    for model, own in models.items():
        # routers do not say of which model: each has its part
        share = sum(worker.running + worker.waiting for worker in own) / streams if streams else 1 / len(models)
        found.append(_of_workers(model, own, held * share, goals))
    for kind, those in _by(drafters, lambda drafter: drafter.kind).items():
        found.append(_of_drafters(kind, those, workers))
    return found


class Advisor:
    """Needs over time, and what follows from them. What is wanted stays wanted until there is a reason."""

    def __init__(self, goals: Goals, up_s: float = UP_S, down_s: float = DOWN_S) -> None:
        self._goals, self._up_s, self._down_s = goals, up_s, down_s
        self._known: dict[tuple[str, str], _Course] = {}

    def advise(self, found: Sequence[Need], now: float) -> list[Advice]:
        """Take in what the moment asks for; `now` in seconds of one clock, at intervals well below `up_s`."""
        keys = {(need.role, need.name) for need in found}
        self._known = {key: course for key, course in self._known.items() if key in keys}
        return [Advice(need, self._wanted(need, now)) for need in found]

    def _wanted(self, need: Need, now: float) -> int:
        course = self._known.setdefault((need.role, need.name), _Course(need.have))
        if need.up <= course.wanted:
            course.short_since = None
        elif course.short_since is None:
            course.short_since, course.short_of = now, need.up
        else:
            course.short_of = min(course.short_of, need.up)
            if now - course.short_since >= self._up_s:
                course.wanted, course.short_since = course.short_of, None
        if need.down >= course.wanted:
            course.spare_since = None
        elif course.spare_since is None:
            course.spare_since = now
        elif now - course.spare_since >= self._down_s:
            course.wanted, course.spare_since = course.wanted - 1, None
        least = self._goals.least.get(need.role, 0)
        course.wanted = max(least, min(course.wanted, self._goals.most.get(need.role, course.wanted)))
        return course.wanted


class _Course:
    """One service: how many are wanted, since when that has been too few or too many, and the fewest needed then."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.short_since: float | None = None
        self.short_of = 0
        self.spare_since: float | None = None


def _of_workers(model: str, workers: Sequence[WorkerStatus], held: float, goals: Goals) -> Need:
    ready = [worker for worker in workers if worker.state == "ready"]
    have, price = len(workers), max(worker.price_usd_per_hour for worker in workers)
    if not ready:
        return Need("worker", model, have, 0.0, have, have, "none is ready yet", price)
    running = sum(worker.running for worker in ready)
    waiting = sum(worker.waiting for worker in ready) + held
    slots = sum(slots_of(worker, goals.per_token_s) for worker in ready) / len(ready)
    prompts_s = sum(worker.queued_tokens / worker.prefill_tok_s for worker in ready if worker.prefill_tok_s > 0)
    blocks = sum(worker.blocks_used for worker in ready) / max(1.0, sum(w.blocks_total for w in ready) / len(ready))
    by = {
        f"{running} streams run and {waiting:.0f} wait; one worker carries {slots:.0f} at "
        f"{1000 * goals.per_token_s:.0f} ms a token": (running + waiting) / slots,
        f"{prompts_s:.2f} s of prompts wait; a first token may wait {goals.first_token_s / 2:.2f} s for them":
            prompts_s / (goals.first_token_s / 2),
        f"streams hold the KV blocks of {blocks:.1f} workers": blocks,
    }
    why = max(by, key=lambda reason: by[reason])
    return _need("worker", model, have, by[why], FULL, why, price)


def slots_of(worker: WorkerStatus, per_token_s: float) -> int:
    """Streams that a worker carries so that each gets a token in `per_token_s`; at least 1."""
    most = worker.max_running or DEFAULT_SLOTS
    if worker.step_row_s <= 0.0:
        return most
    return max(1, min(most, math.floor((per_token_s - worker.step_base_s) / worker.step_row_s)))


def _of_drafters(kind: str, drafters: Sequence[DrafterStatus], workers: Sequence[WorkerStatus]) -> Need:
    have, price = len(drafters), max(drafter.price_usd_per_hour for drafter in drafters)
    left = sum(worker.drafting in ("slower", "dear") for worker in workers)
    load = sum(drafter.busy for drafter in drafters)
    if left * 2 > len(workers):
        why = f"{left} of {len(workers)} workers are faster without"
        return Need("drafter", kind, have, load, min(have, 1), 1, why, price)
    return _need("drafter", kind, have, load, BUSY, f"they work {load / have:.0%} of the time", price)


def _of_cores(role: str, those: Sequence[GatewayStatus] | Sequence[RouterStatus]) -> Need:
    load = sum(one.busy for one in those)
    return _need(role, "", len(those), load, BUSY, f"they take {load:.2f} cores, and one can use one")


def _need(role: str, name: str, have: int, load: float, full: float, why: str, price: float = 0.0) -> Need:
    return Need(role, name, have, load, max(1, math.ceil(load / full)), max(1, math.ceil(load / (full * MARGIN))), why,
                price)


def _by(those: Iterable[S], key: Callable[[S], str]) -> dict[str, list[S]]:
    groups: dict[str, list[S]] = {}
    for one in those:
        groups.setdefault(key(one), []).append(one)
    return dict(sorted(groups.items()))
