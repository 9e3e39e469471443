"""The whole mesh in virtual time under a seeded schedule of faults, and what must hold whatever the schedule.

One seed decides everything: how messages are delayed, lost, doubled and reordered, which service dies when and comes
back, when the broker is gone, what clients ask for and when they hang up. The services are the real ones; only the
network and the clock are ours, and the model is the mock whose every token depends on all tokens before it. A witness
reads what they say as they say it, and after the quiet their insides are looked at: nothing may be left anywhere.

    schedule = Schedule.draw(seed)          pure: what will happen
    history = run(schedule)                 what did
    violations(history)                     which laws that breaks
"""

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal
from unittest import mock

import numpy as np
import structlog

import drafter.service
import router.service
import worker.service
from gateway.service import Gateway
from gateway.streams import Stream
from router.prefix_index import NAME_BYTES
from shared import subjects
from shared.blocks import BLOCK_SIZE_TOKENS, hash_chain, join_hashes
from shared.clock import LoopClock
from shared.errors import MillError
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.messages import Adjust, Finished, Generate, Residency, Sampling, Status, WorkerStatus, decode
from shared.residency import allows
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, WorkerSettings
from shared.tokens import pack
from tests.laws.plain import mock_stream
from tests.laws.witness import Witness
from tests.virtual_time import run_virtual
from tests.worker.test_embedding import normalised, rows_of
from worker.mock_decoder import MockDecoder

EPOCH_S = 1_700_000_000.0
MODEL = "mock"
VOCABULARY = 2048
SALTS = {"red": b"0123456789abcdef", "blue": b"fedcba9876543210"}  # by tenant
KNOWN_AGAIN_S = 2.0  # after a start, until everyone has heard of it
MAX_ATTEMPTS = 8
QUIET_S = 12.0  # after the last fault, for everything to come to rest
GATEWAY_QUIET_S = 26.0  # the same when a gateway died: its workers wait long before they let go of its streams
ZONES = ("eu-north1", "eu-west1", "us-east1")
ANYWHERE = Residency()
POLICIES = ((), ("eu",), ("eu-north1",), ("us",), ("eu-west1", "us"))
SLOW = (
    *[("", 0.0)] * 3,
    ("generate.>", 2.2),
    ("worker.*.generate|", 1.5),
    ("worker.*.cancel", 1.0),
    ("worker.*.kv", 2.0),
    ("worker.*.drafts|", 0.3),
    ("drafter.*.follow|", 0.5),
    ("status.>", 1.2),
)
SERVE = {"router": router.service.serve, "drafter": drafter.service.serve, "worker": worker.service.serve}


@dataclass(frozen=True)
class Ask:
    """One client: when it asks, for what, and whether it hangs up."""

    number: int
    at_s: float
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop_token_ids: tuple[int, ...]
    hang_up_after: int  # tokens read; 0: it stays
    tenant: str = "red"
    residency: Residency = ANYWHERE
    adjust: Adjust | None = None
    pooling: Literal["", "mean", "last"] = ""  # it wants a vector of its prompt, and no token


@dataclass(frozen=True)
class Blow:
    """One service goes at `at_s` and is back `for_s` later. `who` is e.g. `worker-2`, `gateway` or `broker`.

    `drain_s`: it is asked to leave and may take so long over its streams. None: it dies at once.
    `back_in`: the zone it comes back in, under the same name. Empty: where it was.
    """

    at_s: float
    who: str
    for_s: float
    drain_s: float | None = None
    back_in: str = ""


@dataclass(frozen=True)
class Schedule:
    """Everything that will happen, drawn from one seed."""

    seed: int
    faults: Faults
    asks: tuple[Ask, ...]
    blows: tuple[Blow, ...]
    workers: int
    routers: int
    drafters: int
    step_tokens: int
    kv_blocks: int
    kv_tier_mib: int  # 16 blocks of the mock in each
    zones: tuple[tuple[str, str], ...] = ()  # of workers and drafters by name, at the start; others are in `local`

    @property
    def someone_always_serves(self) -> bool:
        """Whether at any time a worker and a router live that the others know of. If so nothing may fail.

        Otherwise a stream that has not begun may be refused with a retryable error; one that has begun may not.
        """
        return self.always_serves(ANYWHERE)

    def always_serves(self, residency: Residency) -> bool:
        """The same for requests under this policy: of the workers that are where it allows, all their lives."""
        if any(blow.who in ("broker", "gateway") for blow in self.blows):
            return False
        workers, routers = self.may_serve(residency), tuple(f"router-{i + 1}" for i in range(self.routers))
        for names in (workers, routers):
            down = [
                (blow.at_s, blow.at_s + (blow.drain_s or 0.0) + blow.for_s + KNOWN_AGAIN_S)
                for blow in self.blows
                if blow.who in names
            ]
            if any(sum(start <= moment < end for start, end in down) >= len(names) for moment, _ in down):
                return False
        return bool(workers)

    def may_serve(self, residency: Residency, once: bool = False) -> tuple[str, ...]:
        """Workers that are in an allowed zone in all their lives; with `once` in any of them."""
        first = dict(self.zones)
        found = []
        for name in (f"worker-{i + 1}" for i in range(self.workers)):
            lives = [first.get(name, "local"), *(blow.back_in for blow in self.blows
                                                 if blow.who == name and blow.back_in)]
            if (any if once else all)(allows(residency, zone) for zone in lives):
                found.append(name)
        return tuple(found)

    @property
    def worker_deaths(self) -> int:
        return sum(blow.who.startswith("worker") and blow.drain_s is None for blow in self.blows)

    @property
    def patience_s(self) -> float:
        """How long a worker may go on with what nobody wants: cancels get lost, and are sent once a second."""
        outages_s = sum(blow.for_s for blow in self.blows if blow.who == "broker")
        # nobody tells the workers of a dead gateway: they notice
        dead_s = 24.0 if any(blow.who == "gateway" for blow in self.blows) else 0.0
        return 4.0 + outages_s + dead_s + 4 * self.slowest_s

    @property
    def longest_pause_s(self) -> float:
        """What a stream may wait for its next token: well below the timers that notice what nothing else did."""
        nobody_s = sum(blow.for_s + (blow.drain_s or 0.0) for blow in self.blows)
        # in a crowd whoever gave way waits for others to end: 14 s were seen
        always = all(self.always_serves(ask.residency) for ask in self.asks)
        # whose workers have moved away waits for them as long as for a stalled one
        moved_s = 0.0 if all(self.may_serve(ask.residency) for ask in self.asks) else 20.0
        return 16.0 + 4 * self.slowest_s + (0.0 if always else nobody_s) + moved_s

    @property
    def slowest_s(self) -> float:
        """The longest that a message may be under way."""
        every = [self.faults, *(faults for _, faults in self.faults.overrides)]
        return max(faults.delay_s[1] + faults.reorder_s[1] for faults in every)

    @staticmethod
    def draw(seed: int, *, blows: bool = True, loss: bool = True, drafters: int | None = None,
             walls: bool | None = None, vectors: bool = False) -> "Schedule":
        """The schedule of `seed`; parts of it can be left out to isolate one law.

        `walls`: whether workers and drafters are in zones and requests under policies; None: every other seed.
        `vectors`: half of those who stay want a vector instead of tokens.
        """
        rng = random.Random(seed)
        workers, routers = rng.randint(2, 3), rng.randint(1, 2)
        crowd = rng.random() < 0.25
        kv_blocks = rng.choice((20, 32) if crowd else (20, 32, 48, 96, 512))
        shared = [rng.randrange(64, VOCABULARY) for _ in range(rng.randint(16, 96))]
        room_tokens = kv_blocks * BLOCK_SIZE_TOKENS
        count = rng.randint(12, 20) if crowd else rng.randint(4, 14)
        asks = tuple(_ask(rng, number, shared, room_tokens) for number in range(count))
        if crowd:
            asks = tuple(_grown(rng, ask, room_tokens) for ask in asks)
        names = [
            f"{kind}-{i + 1}"
            for kind, count in (("worker", workers), ("router", routers), ("drafter", 1))
            for i in range(count)
        ] + ["broker"] + ["gateway"] * (rng.random() < 0.4)
        # several of them may strike the same service
        struck = tuple(_blow(rng, rng.choice(names)) for _ in range(rng.choice((1, 2, 3, 3, 4, 6))))
        schedule = Schedule(
            seed,
            _faults(rng, loss),
            asks,
            struck if blows else (),
            workers,
            routers,
            rng.randint(0, 1) if drafters is None else drafters,
            rng.choice((32, 64, 256)),
            kv_blocks,
            rng.choice((0, 0, 1, 4)),
        )
        if seed % 2 if walls is None else walls:
            schedule = _walled(schedule)
        if vectors:
            schedule = replace(schedule, asks=tuple(map(_embedding, schedule.asks)))
        if all(schedule.always_serves(ask.residency) for ask in schedule.asks):
            return schedule
        # a stream outlasts its mesh for `stall_s` and no longer
        return replace(schedule, blows=tuple(replace(blow, for_s=min(blow.for_s, 3.0)) for blow in schedule.blows))


def _grown(rng: random.Random, ask: Ask, room_tokens: int) -> Ask:
    """The same in a crowd whose prompts fit and whose answers do not: somebody has to give way."""
    prompt = ask.prompt[-rng.randint(1, 20) :]
    wanted = ask.max_tokens if ask.hang_up_after else rng.randint(100, 250)
    return replace(ask, at_s=rng.uniform(1.2, 1.6), prompt=prompt, max_tokens=min(wanted, room_tokens - len(prompt)))


def _walled(schedule: Schedule) -> Schedule:
    """The same with zones and policies, drawn apart: what else happens does not depend on them."""
    rng = random.Random(f"{schedule.seed} walls")
    names = [f"{kind}-{i + 1}" for kind, count in (("worker", schedule.workers), ("drafter", schedule.drafters))
             for i in range(count)]
    blows = tuple(
        replace(blow, back_in=rng.choice(ZONES)) if blow.who in names and rng.random() < 0.5 else blow
        for blow in schedule.blows)
    asks = tuple(replace(ask, residency=Residency(rng.choice(POLICIES))) for ask in schedule.asks)
    zones = tuple((name, rng.choice(ZONES)) for name in names)
    return replace(schedule, blows=blows, asks=asks, zones=zones)


def _faults(rng: random.Random, loss: bool) -> Faults:
    delay_s = rng.choice((0.001, 0.01, 0.05))
    common = Faults(
        delay_s=(0.0002, delay_s),
        loss=rng.choice((0.0, 0.002, 0.01, 0.03)) if loss else 0.0,
        duplication=rng.choice((0.0, 0.02)),
        reordering=rng.choice((0.0, 0.02)),
        reorder_s=(0.0, 0.05),
    )
    # one kind of message that takes its time: beyond the wait for an acceptance, up to what counts as silence
    pattern, most_s = rng.choice(SLOW)
    if not pattern or not loss:
        return common
    slow = replace(common, delay_s=(0.0, most_s))
    patterns = [pattern] if pattern[-1] != "|" else [pattern[:-1], pattern[:-1] + ".*"]  # with a zone and without
    return replace(common, overrides=tuple((f"mill.v1.{pattern}", slow) for pattern in patterns))


def _blow(rng: random.Random, who: str) -> Blow:
    drains = who[:6] in ("worker", "router", "drafte") and rng.random() < 0.35
    # some stay away for so long that nobody can wait for them
    long = who.startswith(("worker", "router")) and rng.random() < 0.2
    away_s = 24.0 if long else rng.uniform(0.05, 3.0)
    return Blow(rng.uniform(1.5, 8.0), who, away_s, rng.choice((0.0, 0.3, 2.0)) if drains else None)


def _ask(rng: random.Random, number: int, shared: list[int], room_tokens: int) -> Ask:
    own = [rng.randrange(64, VOCABULARY) for _ in range(rng.randint(1, 60))]
    prompt = (shared if rng.random() < 0.6 else []) + own
    if rng.random() < 0.3:
        prompt += prompt[-20:] * 2  # something for drafters to find
    hangs_up = rng.random() < 0.15
    # who hangs up asked for much: what runs on is seen
    max_tokens = 600 if hangs_up else rng.randint(1, 80)
    return Ask(
        number,
        rng.uniform(1.2, 6.0),
        tuple(prompt),
        min(max_tokens, room_tokens - len(prompt)),
        Sampling(temperature=rng.choice((0.0, 0.8)), seed=rng.getrandbits(64)),
        () if hangs_up else tuple(rng.randrange(1024, 1536) for _ in range(rng.choice((0, 0, 8)))),
        rng.randint(1, 30) if hangs_up else 0,
        rng.choice(("red", "red", "blue")),
        adjust=_adjust(random.Random(repr(prompt))),
    )


def _adjust(rng: random.Random) -> Adjust | None:
    """What one client in four asks to shift or mask; by a chance of its own, so that schedules stay what they were."""
    if rng.random() < 0.75:
        return None
    likely = [rng.randrange(1024, 1536) for _ in range(40)]
    return Adjust(
        repetition_penalty=rng.choice((1.0, 1.3)),
        frequency_penalty=rng.choice((0.0, 1.5)),
        presence_penalty=rng.choice((0.0, 0.7)),
        min_tokens=rng.choice((0, 10)),
        bad_words=(pack(likely[:1]), pack(likely[1:3])),
        allowed=pack(sorted(set(likely))) if rng.random() < 0.5 else b"",
    )


def _embedding(ask: Ask) -> Ask:
    """The same, or a vector of its prompt."""
    rng = random.Random(f"{ask.prompt} vector")
    if ask.hang_up_after or rng.random() < 0.5:
        return ask
    return replace(ask, pooling=rng.choice(("mean", "last")), max_tokens=1, stop_token_ids=(), adjust=None)


@dataclass
class Told:
    """What one client was given."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    ends: list[Finished | MillError] = field(default_factory=list)
    attempts: int = 0
    hung_up: bool = False
    stream: Stream | None = None
    lives: int = 0  # of its gateway: each starts the answer anew
    longest_pause_s: float = 0.0
    ended_s: float = 0.0

    @property
    def request_id(self) -> str:
        return f"ask-{self.ask.number}-{self.lives}"


@dataclass
class History:
    """What happened."""

    schedule: Schedule
    told: list[Told]
    workers: dict[str, WorkerStatus]  # last words of each, after the quiet
    resubmissions: int = 0
    lost_messages: int = 0
    handler_errors: int = 0
    accepted_drafts: int = 0
    under_policy: int = 0  # messages that only some zones may hear, where they arrived
    complaints: list[str] = field(default_factory=list)  # of the witness, and of those who looked inside afterwards

    @property
    def refused(self) -> int:
        """Streams that ended with an error before their first token."""
        return sum(1 for told in self.told for end in told.ends if isinstance(end, MillError))

    @property
    def faults(self) -> int:
        """Blows and lost messages."""
        return len(self.schedule.blows) + self.lost_messages


def run(schedule: Schedule) -> History:
    """Play a schedule to its end."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    try:
        return run_virtual(_Mesh(schedule).play(), timeout_s=600.0)
    finally:
        structlog.configure(**before)


def violations(history: History) -> list[str]:
    """Which laws the history breaks, in words."""
    return list(_violations(history))


def _violations(history: History) -> Iterator[str]:
    for told in history.told:
        who = f"seed {history.schedule.seed}, request {told.ask.number}"
        truth = expected(told.ask)
        if told.tokens != list(truth[: len(told.tokens)]):
            yield f"{who}: law 1: token {_first_difference(told.tokens, truth)} differs from the undisturbed stream"
        if told.hung_up:
            continue
        if len(told.ends) != 1:
            yield f"{who}: law 5: it ended {len(told.ends)} times"
        elif isinstance(error := told.ends[0], MillError):
            if "workers died while serving" in error.message and history.schedule.worker_deaths >= 2:
                continue  # the law's own limit: it might be the request that kills them
            if not _excused(history.schedule, told, error):
                yield f"{who}: law 5: it failed after {len(told.tokens)} tokens ({error.code}: {error.message})"
        elif len(told.tokens) != len(truth):
            yield f"{who}: law 1: {len(told.tokens)} tokens of {len(truth)}"
        elif told.ends[0].completion_tokens != len(truth):
            yield f"{who}: law 8: billed {told.ends[0].completion_tokens} tokens, delivered {len(truth)}"
        elif told.ends[0].embedding != vector(told.ask):
            yield f"{who}: law 1: another vector than that of the prompt alone"
    for name, status in history.workers.items():
        left = (status.running, status.waiting, status.blocks_used, status.queued_tokens)
        if any(left):
            yield f"seed {history.schedule.seed}: law 9: {name} still holds {left} (running, waiting, blocks, tokens)"
    for told in history.told:
        if told.longest_pause_s > history.schedule.longest_pause_s:
            yield (
                f"seed {history.schedule.seed}, request {told.ask.number}: nothing came for "
                f"{told.longest_pause_s:.1f} s, which no fault explains"
            )
    for complaint in history.complaints:
        yield f"seed {history.schedule.seed}: {complaint}"
    if history.handler_errors:
        yield f"seed {history.schedule.seed}: {history.handler_errors} handlers raised"


def _excused(schedule: Schedule, told: Told, error: MillError) -> bool:
    """Whether a stream that nobody gave up may end with this error."""
    residency = told.ask.residency
    if schedule.always_serves(residency):
        return False
    walled_off = error.code == "no_eligible_worker" and bool(residency.zones)
    moved_away = bool(schedule.may_serve(residency, once=True)) and not schedule.may_serve(residency)
    return (moved_away or not told.tokens) and (walled_off or error.retryable)


def _first_difference(tokens: list[int], truth: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(tokens, truth, strict=False)) if a != b), len(truth))


@cache
def expected(ask: Ask) -> tuple[int, ...]:
    """The stream as a decoder gives it that does nothing else: one token at a time, no cache, no drafts."""
    if ask.pooling:
        return ()
    return mock_stream(_mock(), ask.prompt, ask.sampling, ask.max_tokens, ask.stop_token_ids, ask.adjust)


@cache
def vector(ask: Ask) -> bytes:
    """The same of a vector: the whole prompt in one step; empty where none is wanted."""
    if not ask.pooling:
        return b""
    rows = rows_of(list(ask.prompt), _mock()).astype(np.float64)
    return normalised(rows[-1] if ask.pooling == "last" else np.add.accumulate(rows)[-1])


@cache
def _mock() -> MockDecoder:
    return MockDecoder(blocks=64, vocabulary_size=VOCABULARY)


class _Mesh:
    """The services of one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.clock = LoopClock(wall_offset_s=EPOCH_S)
        self.broker = MemoryBroker(None, seed=schedule.seed)
        self.told = [Told(ask) for ask in schedule.asks]
        self.statuses: dict[str, WorkerStatus] = {}
        self.gateway: Gateway | None = None
        self.routers: dict[str, router.service.Router] = {}
        self.drafters: dict[str, drafter.service.Drafter] = {}
        self.workers: dict[str, worker.service.Worker] = {}
        self.complaints: list[str] = []
        self.witness = Witness(
            schedule.patience_s,
            not any(blow.who == "broker" for blow in schedule.blows),
            lambda request: expected(self._ask_of(request)),
            self._delivered,
            lambda request: self._ask_of(request).residency,
        )
        self._zones = dict(schedule.zones)
        self._alive: dict[str, tuple[MemoryBus, asyncio.Task[None]]] = {}
        self._gateway_changed = asyncio.Condition()

    async def play(self) -> History:
        schedule = self.schedule
        with self._watched():
            await MemoryBus(self.broker).subscribe(subjects.ALL_STATUS, self._see)
            for kind, count in (
                ("router", schedule.routers),
                ("drafter", schedule.drafters),
                ("worker", schedule.workers),
            ):
                for i in range(count):
                    self._start(f"{kind}-{i + 1}", 0.0)
            self._start("gateway", 0.0)
            await asyncio.sleep(1.0)  # everyone has heard everyone
            self.broker.faults = schedule.faults
            async with asyncio.TaskGroup() as group:
                for told in self.told:
                    group.create_task(self._client(told))
                for blow in schedule.blows:
                    group.create_task(self._strike(blow))
            self.broker.faults = None
            gateway_died = any(blow.who == "gateway" for blow in schedule.blows)
            await asyncio.sleep(GATEWAY_QUIET_S if gateway_died else QUIET_S)
            await asyncio.sleep(0.0137)  # off the beat
            self._look_inside()
            history = History(
                schedule,
                self.told,
                dict(self.statuses),
                sum(told.attempts - 1 for told in self.told if told.attempts),
                self.broker.lost,
                self.broker.handler_errors,
                sum(status.accepted_draft_tokens_total for status in self.statuses.values()),
                self.witness.under_policy,
                [*self.witness.complaints, *self.complaints],
            )
            for name in list(self._alive):
                await self._kill(name)
        return history

    # --- what is seen

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """Every message passes the witness, every service is known by its name."""
        send = self.broker._send

        def seen(sender: Any, delivery: Any, unheard: Any) -> None:
            self.witness.see(delivery.subject, delivery.data, self.clock.now(), getattr(sender, "zone", ""))
            send(sender, delivery, unheard)

        self.broker._send = seen  # type: ignore[method-assign]
        with contextlib.ExitStack() as stack:
            for module, name, found in (
                (router.service, "Router", self.routers),
                (drafter.service, "Drafter", self.drafters),
                (worker.service, "Worker", self.workers),
            ):
                stack.enter_context(mock.patch.object(module, name, _noting(getattr(module, name), found)))
            yield

    def _see(self, delivery: Any) -> None:
        status = decode(delivery.data, Status)  # type: ignore[arg-type]
        if isinstance(status, WorkerStatus):
            self.statuses[status.id] = status

    def _ask_of(self, request_id: str) -> Ask:
        return self.schedule.asks[int(request_id.split("-")[1])]

    def _delivered(self, request_id: str) -> int:
        """Tokens that the stream has given to its client, fetched or not."""
        stream = self.told[int(request_id.split("-")[1])].stream
        return len(stream.state.delivered) if stream is not None else 0

    def _look_inside(self) -> None:
        """After the quiet: nothing is left of any stream, and routers know what workers hold."""
        for name, (_, task) in self._alive.items():
            if task.done():
                self.complaints.append(f"{name} is dead: {task.exception()!r}")
        self.complaints += self._left_over()
        struck = {blow.who.split("-")[0] for blow in self.schedule.blows}
        if "worker" not in struck:
            self.complaints += self.witness.placed_twice()
        if not struck & {"broker", "drafter", "worker"}:
            self.complaints += self.witness.never_closed()
        named = {name: set(self.workers[name]._pool.names()) for name in self._alive if name.startswith("worker")}
        for name in (name for name in self._alive if name.startswith("router")):
            index = self.routers[name].view.index
            for held_by, names in named.items():
                thought, true = index.blocks(held_by), {name[:NAME_BYTES] for name in names}
                if thought != true:
                    self.complaints.append(
                        f"{name} is wrong about {held_by}: {len(thought - true)} blocks too many, "
                        f"{len(true - thought)} too few"
                    )
        allowed = {block for ask in self.schedule.asks for block in _blocks_of(ask)}
        for name, names in named.items():
            if names - allowed:
                self.complaints.append(f"{name} names {len(names - allowed)} blocks that no stream of any tenant has")

    def _left_over(self) -> Iterator[str]:
        """What should be nothing and is something."""
        assert self.gateway is not None
        streams = self.gateway.streams
        left = {"gateway": {"streams": len(streams), "outbox": streams.outbox.qsize(), "awake": streams.some.is_set()}}
        for name, found in self.drafters.items():
            if name in self._alive:
                left[name] = {
                    "contexts": len(found.contexts),
                    "tokens": found.contexts.tokens,
                    "inbox": found._inbox.qsize(),
                }
        for name, service in self.workers.items():
            if name in self._alive:
                scheduler, engine = service._scheduler, service._engine
                left[name] = {
                    "live": len(scheduler._live),
                    "waiting": len(scheduler.waiting),
                    "slots": service._settings.max_running - len(scheduler._slots),
                    "blocks": scheduler.pool.blocks - scheduler.pool.available,
                    "drafts": len(scheduler.speculation.drafts._streams),
                    "inbox": len(engine._inbox),
                    "unsaid": len(engine._kept) + len(service._said),
                    "open at its drafter": len(service._following._open),
                    "failed steps": engine.failed_steps,
                    "repairs": engine.repairs + scheduler.audit().repairs,
                }
                if not self.witness._always_connected:
                    continue
                sent = self.witness.tokens.get((name, service._outbox.epoch), 0)
                left[name]["uncounted tokens"] = engine.rate.total - sent
        for name, router_found in self.routers.items():
            if name in self._alive:
                left[name] = {"outgoing": len(router_found.outbox)}
        for name, things in left.items():
            if any(things.values()):
                yield f"law 9: {name} still has {({what: much for what, much in things.items() if much})}"

    # --- services

    def _start(self, name: str, drain_s: float) -> None:
        kind = name.split("-")[0]
        bus = _BusIn(self.broker, self._zones.get(name, "local"), self.witness)
        if kind == "gateway":
            run = self._serve_gateway(bus)
        else:
            run = SERVE[kind](bus, self._settings(name, drain_s), self.clock)
        self._alive[name] = bus, asyncio.create_task(run, name=name)

    async def _serve_gateway(self, bus: MemoryBus) -> None:
        settings = GatewaySettings(id="gateway-1", model_name=MODEL, max_attempts=MAX_ATTEMPTS)
        gateway = Gateway(bus, settings, self.clock, None)
        async with gateway.running():
            self.gateway = gateway
            async with self._gateway_changed:
                self._gateway_changed.notify_all()
            await asyncio.get_running_loop().create_future()

    def _settings(self, name: str, drain_s: float) -> Any:
        kind = name.split("-")[0]
        if kind == "router":
            return RouterSettings(id=name)
        if kind == "drafter":
            return DrafterSettings(id=name, zone=self._zones.get(name, "local"))
        return WorkerSettings(
            id=name,
            zone=self._zones.get(name, "local"),
            model_name=MODEL,
            engine="mock",
            mock_vocabulary=VOCABULARY,
            kv_blocks=self.schedule.kv_blocks,
            kv_tier_mib=self.schedule.kv_tier_mib,
            step_tokens=self.schedule.step_tokens,
            max_running=16,
            drain_s=drain_s,
            mock_step_s=0.02,
            mock_row_s=0.0002,
            mock_token_s=0.0002,
        )

    async def _kill(self, name: str) -> None:
        bus, task = self._alive.pop(name)
        bus.crash()  # from here on nothing it does is heard
        task.cancel()
        if name == "gateway" and (dead := self.gateway) is not None:
            self.gateway = None
            for told in self.told:
                if told.stream is not None and not told.ends and not told.hung_up:
                    self.witness.unwanted(told.request_id, self.clock.now())
                    told.stream.changed.set()
            dead.draining = True
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task

    async def _ask_to_leave(self, name: str) -> None:
        bus, task = self._alive.pop(name)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await bus.close()

    async def _strike(self, blow: Blow) -> None:
        await asyncio.sleep(blow.at_s)
        if blow.who == "broker":
            if self.broker.running:
                self.broker.stop()
                await asyncio.sleep(blow.for_s)
                self.broker.start()
        elif blow.who in self._alive:
            if blow.drain_s is None:
                await self._kill(blow.who)
            else:
                await self._ask_to_leave(blow.who)
            await asyncio.sleep(blow.for_s)
            self._zones[blow.who] = blow.back_in or self._zones.get(blow.who, "local")
            self._start(blow.who, max((other.drain_s or 0.0) for other in self.schedule.blows))

    # --- clients

    async def _client(self, told: Told) -> None:
        """Ask, and ask again when the gateway is gone."""
        await asyncio.sleep(told.ask.at_s)
        while not (told.ends or told.hung_up):
            async with self._gateway_changed:
                await self._gateway_changed.wait_for(lambda: self.gateway is not None)
            assert self.gateway is not None
            await self._listen(self.gateway, told)

    async def _listen(self, gateway: Gateway, told: Told) -> None:
        ask = told.ask
        changed = asyncio.Event()
        told.lives += 1
        told.tokens.clear()
        told.stream = None
        salt = SALTS[ask.tenant]
        request = Generate(
            request_id=told.request_id,
            attempt=1,
            gateway="gateway-1",
            model=MODEL,
            tokens=pack(ask.prompt),
            max_tokens=ask.max_tokens,
            deadline=self.clock.wall() + 300.0,
            sampling=ask.sampling,
            adjust=ask.adjust,
            tenant=ask.tenant,
            residency=ask.residency,
            cache_salt=salt,
            block_hashes=join_hashes(hash_chain(ask.prompt, salt)),
            stop_token_ids=ask.stop_token_ids,
            pooling=ask.pooling,
        )
        heard_s = self.clock.now()
        told.stream = gateway.streams.open(request, {}, changed, heard_s + 300.0)
        while self.gateway is gateway:
            if taken := told.stream.take():
                told.longest_pause_s = max(told.longest_pause_s, self.clock.now() - heard_s)
                heard_s = self.clock.now()
                told.tokens += taken
            told.attempts = told.stream.submitted
            if told.stream.ended is not None:
                told.longest_pause_s = max(told.longest_pause_s, self.clock.now() - heard_s)
                told.ended_s = self.clock.now()
                told.ends.append(told.stream.ended)
                return
            if ask.hang_up_after and len(told.tokens) >= ask.hang_up_after:
                told.hung_up = True
                gateway.streams.cancel(told.stream)
                self.witness.unwanted(request.request_id, self.clock.now())
                return
            await changed.wait()
            changed.clear()


class _BusIn(MemoryBus):
    """The bus of a service in one zone: the witness sees what arrives there, before the service does."""

    def __init__(self, broker: MemoryBroker, zone: str, witness: Witness) -> None:
        super().__init__(broker)
        self.zone = zone
        self._witness = witness

    async def subscribe(self, subject: str, handler: Any, queue: str | None = None) -> Any:
        def seen(delivery: Any) -> None:
            self._witness.arrived(delivery.subject, delivery.data, self.zone)
            handler(delivery)

        return await super().subscribe(subject, seen, queue)


def _noting(kind: Any, found: dict[str, Any]) -> Any:
    """`kind`, which notes the newest of each name."""

    class Noted(kind):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            found[self.name if hasattr(self, "name") else self.id] = self

    return Noted


@cache
def _blocks_of(ask: Ask) -> tuple[bytes, ...]:
    """All blocks that the stream of `ask` may fill."""
    return tuple(hash_chain([*ask.prompt, *expected(ask)], SALTS[ask.tenant]))
