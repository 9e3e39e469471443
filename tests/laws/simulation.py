"""The whole mesh in virtual time under a seeded schedule of faults, and what must hold whatever the schedule.

One seed decides everything: how messages are delayed, lost, doubled and reordered, which service dies when and comes
back, when the broker is gone, what clients ask for and when they hang up. The services are the real ones; only the
network and the clock are ours, and the model is the mock whose every token depends on all tokens before it.

    schedule = Schedule.draw(seed)          pure: what will happen
    history = run(schedule)                 what did
    violations(history)                     which laws that breaks
"""

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import structlog

import drafter.service
import router.service
import worker.service
from gateway.service import Gateway
from gateway.streams import Stream
from shared import subjects
from shared.blocks import hash_chain, join_hashes
from shared.clock import LoopClock
from shared.errors import MillError
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.messages import Finished, Generate, Sampling, Status, WorkerStatus, decode
from shared.settings import DrafterSettings, GatewaySettings, RouterSettings, WorkerSettings
from shared.tokens import pack
from tests.virtual_time import run_virtual
from worker.mock_decoder import MockDecoder

EPOCH_S = 1_700_000_000.0
MODEL = "mock"
VOCABULARY = 2048
SALT = b"0123456789abcdef"
KNOWN_AGAIN_S = 2.0  # after a start, until everyone has heard of it
QUIET_S = 30.0  # after the last fault, for everything to come to rest
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


@dataclass(frozen=True)
class Blow:
    """One service dies at `at_s` and is back `for_s` later. `who` is e.g. `worker-2` or `broker`."""

    at_s: float
    who: str
    for_s: float


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

    @property
    def someone_always_serves(self) -> bool:
        """Whether at any time a worker and a router live that the others know of. If so nothing may fail.

        Otherwise a stream that has not begun may be refused with a retryable error; one that has begun may not.
        """
        if any(blow.who == "broker" for blow in self.blows):
            return False
        for kind, count in (("worker", self.workers), ("router", self.routers)):
            down = [
                (blow.at_s, blow.at_s + blow.for_s + KNOWN_AGAIN_S) for blow in self.blows if blow.who.startswith(kind)
            ]
            if any(sum(start <= moment < end for start, end in down) >= count for moment, _ in down):
                return False
        return True

    @staticmethod
    def draw(seed: int, *, blows: bool = True, loss: bool = True, drafters: int | None = None) -> "Schedule":
        """The schedule of `seed`; parts of it can be left out to isolate one law."""
        rng = random.Random(seed)
        workers, routers = rng.randint(2, 3), rng.randint(1, 2)
        faults = Faults(
            delay_s=(0.0002, rng.choice((0.001, 0.01, 0.05))),
            loss=rng.choice((0.0, 0.002, 0.01)) if loss else 0.0,
            duplication=rng.choice((0.0, 0.02)),
            reordering=rng.choice((0.0, 0.02)),
            reorder_s=(0.0, 0.05),
        )
        shared = [rng.randrange(64, VOCABULARY) for _ in range(rng.randint(16, 96))]
        asks = tuple(_ask(rng, number, shared) for number in range(rng.randint(4, 14)))
        names = [
            f"{kind}-{i + 1}"
            for kind, count in (("worker", workers), ("router", routers), ("drafter", 1))
            for i in range(count)
        ] + ["broker"]
        struck = tuple(
            Blow(rng.uniform(1.5, 7.0), who, rng.uniform(0.2, 3.0)) for who in rng.sample(names, rng.randint(1, 3))
        )
        return Schedule(
            seed,
            faults,
            asks,
            struck if blows else (),
            workers,
            routers,
            rng.randint(0, 1) if drafters is None else drafters,
            rng.choice((32, 64, 256)),
            rng.choice((48, 96, 512)),
        )


def _ask(rng: random.Random, number: int, shared: list[int]) -> Ask:
    own = [rng.randrange(64, VOCABULARY) for _ in range(rng.randint(1, 60))]
    prompt = (shared if rng.random() < 0.6 else []) + own
    if rng.random() < 0.3:
        prompt += prompt[-20:] * 2  # something for drafters to find
    return Ask(
        number,
        rng.uniform(1.2, 6.0),
        tuple(prompt),
        rng.randint(1, 80),
        Sampling(temperature=rng.choice((0.0, 0.8)), seed=rng.getrandbits(64)),
        tuple(rng.randrange(64, 576) for _ in range(rng.choice((0, 0, 8)))),
        rng.randint(1, 30) if rng.random() < 0.15 else 0,
    )


@dataclass
class Told:
    """What one client was given."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    ends: list[Finished | MillError] = field(default_factory=list)
    attempts: int = 0
    hung_up: bool = False


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
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    return run_virtual(_Mesh(schedule).play(), timeout_s=600.0)


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
            if told.tokens or not error.retryable or history.schedule.someone_always_serves:
                yield f"{who}: law 5: it failed after {len(told.tokens)} tokens ({error.code}: {error.message})"
        elif len(told.tokens) != len(truth):
            yield f"{who}: law 1: {len(told.tokens)} tokens of {len(truth)}"
        elif told.ends[0].completion_tokens != len(truth):
            yield f"{who}: law 8: billed {told.ends[0].completion_tokens} tokens, delivered {len(truth)}"
    for name, status in history.workers.items():
        left = (status.running, status.waiting, status.blocks_used, status.queued_tokens)
        if any(left):
            yield f"seed {history.schedule.seed}: law 9: {name} still holds {left} (running, waiting, blocks, tokens)"
    if history.handler_errors:
        yield f"seed {history.schedule.seed}: {history.handler_errors} handlers raised"


def _first_difference(tokens: list[int], truth: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(tokens, truth, strict=False)) if a != b), len(truth))


@cache
def expected(ask: Ask) -> tuple[int, ...]:
    """The stream as a decoder gives it that does nothing else: one token at a time, no cache, no drafts."""
    from tests.laws.plain import plain_stream

    return plain_stream(
        MockDecoder(blocks=64, vocabulary_size=VOCABULARY), ask.prompt, ask.sampling, ask.max_tokens, ask.stop_token_ids
    )


class _Mesh:
    """The services of one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.clock = LoopClock(wall_offset_s=EPOCH_S)
        self.broker = MemoryBroker(None, seed=schedule.seed)
        self.told = [Told(ask) for ask in schedule.asks]
        self.statuses: dict[str, WorkerStatus] = {}
        self._alive: dict[str, tuple[MemoryBus, asyncio.Task[None]]] = {}

    async def play(self) -> History:
        schedule = self.schedule
        watcher = MemoryBus(self.broker)
        await watcher.subscribe(subjects.ALL_STATUS, self._see)
        for kind, count in (("router", schedule.routers), ("drafter", schedule.drafters), ("worker", schedule.workers)):
            for i in range(count):
                self._start(f"{kind}-{i + 1}")
        settings = GatewaySettings(id="gateway-1", model_name=MODEL, max_attempts=8)
        gateway = Gateway(MemoryBus(self.broker), settings, self.clock, None)
        async with gateway.running():
            await asyncio.sleep(1.0)  # everyone has heard everyone
            self.broker.faults = schedule.faults
            async with asyncio.TaskGroup() as group:
                for told in self.told:
                    group.create_task(self._client(gateway, told))
                for blow in schedule.blows:
                    group.create_task(self._strike(blow))
            self.broker.faults = None
            await asyncio.sleep(QUIET_S)
            history = History(
                schedule,
                self.told,
                dict(self.statuses),
                sum(told.attempts - 1 for told in self.told),
                self.broker.lost,
                self.broker.handler_errors,
                sum(status.accepted_draft_tokens_total for status in self.statuses.values()),
            )
        for name in list(self._alive):
            await self._kill(name)
        return history

    def _see(self, delivery: Any) -> None:
        status = decode(delivery.data, Status)  # type: ignore[arg-type]
        if isinstance(status, WorkerStatus):
            self.statuses[status.id] = status

    def _start(self, name: str) -> None:
        kind = name.split("-")[0]
        bus = MemoryBus(self.broker)
        task = asyncio.create_task(SERVE[kind](bus, self._settings(name), self.clock), name=name)
        self._alive[name] = bus, task

    def _settings(self, name: str) -> Any:
        kind = name.split("-")[0]
        if kind == "router":
            return RouterSettings(id=name)
        if kind == "drafter":
            return DrafterSettings(id=name)
        return WorkerSettings(
            id=name,
            model_name=MODEL,
            engine="mock",
            mock_vocabulary=VOCABULARY,
            kv_blocks=self.schedule.kv_blocks,
            step_tokens=self.schedule.step_tokens,
            max_running=16,
            drain_s=0.0,
            mock_step_s=0.02,
            mock_row_s=0.0002,
            mock_token_s=0.0002,
        )

    async def _kill(self, name: str) -> None:
        bus, task = self._alive.pop(name)
        bus.crash()  # from here on nothing it does is heard
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task

    async def _strike(self, blow: Blow) -> None:
        await asyncio.sleep(blow.at_s)
        if blow.who == "broker":
            self.broker.stop()
            await asyncio.sleep(blow.for_s)
            self.broker.start()
        elif blow.who in self._alive:
            await self._kill(blow.who)
            await asyncio.sleep(blow.for_s)
            self._start(blow.who)

    async def _client(self, gateway: Gateway, told: Told) -> None:
        ask = told.ask
        await asyncio.sleep(ask.at_s)
        changed = asyncio.Event()
        request = Generate(
            request_id=f"ask-{ask.number}",
            attempt=1,
            gateway="gateway-1",
            model=MODEL,
            tokens=pack(ask.prompt),
            max_tokens=ask.max_tokens,
            deadline=self.clock.wall() + 300.0,
            sampling=ask.sampling,
            cache_salt=SALT,
            block_hashes=join_hashes(hash_chain(ask.prompt, SALT)),
            stop_token_ids=ask.stop_token_ids,
        )
        stream = gateway.streams.open(request, {}, changed, self.clock.now() + 300.0)
        await _until(changed, lambda: self._take(gateway, stream, told))

    def _take(self, gateway: Gateway, stream: Stream, told: Told) -> bool:
        told.tokens += stream.take()
        told.attempts = stream.submitted
        if stream.ended is not None:
            told.ends.append(stream.ended)
        elif told.ask.hang_up_after and len(told.tokens) >= told.ask.hang_up_after:
            told.hung_up = True
            gateway.streams.cancel(stream)
        return stream.ended is not None or told.hung_up


async def _until(changed: asyncio.Event, done: Callable[[], bool]) -> None:
    while not done():
        await changed.wait()
        changed.clear()
