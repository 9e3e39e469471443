"""All streams of a gateway, on a clock that stands until it is set."""

import asyncio
import random

import pytest

from gateway.failover import Limits, StreamState
from gateway.metrics import Metrics
from gateway.streams import Stream, Streams
from shared.clock import LoopClock
from shared.fleet import Fleet
from shared.messages import Accepted, Failed, Finished, Generate, StepReplies, Tokens, WorkerStatus
from shared.tokens import pack

SILENCE_S = 2.0


class Still(LoopClock):
    """It is as late as it is told."""

    def __init__(self) -> None:
        super().__init__(1e6)
        self.now_s = 100.0

    def now(self) -> float:
        return self.now_s


class Place:
    """A gateway's streams, with one stream that worker w1 works on."""

    def __init__(self) -> None:
        self.clock, self.fleet = Still(), Fleet()
        self.streams = Streams("g", Limits(), SILENCE_S, self.clock, self.fleet, Metrics(list))
        self.fleet.fold(WorkerStatus("w1", 1, model="m"), self.clock.now())
        request = Generate("r", 1, gateway="g", model="m", tokens=pack([1, 2]), max_tokens=99, deadline=0.0)
        self.stream = self.streams.open(request, {}, asyncio.Event(), 1e9)
        self.seq = 0
        self.say(Accepted("r", 1, "w1", 0))

    def say(self, *replies: Accepted | Tokens) -> None:
        self.seq += 1
        self.streams.hear(StepReplies("w1", 1, self.seq, replies))

    def later(self, seconds: float) -> None:
        """Time goes by as a gateway sees it: in ticks."""
        for _ in range(round(seconds / 0.1)):
            self.clock.now_s += 0.1
            self.streams.tick(connected=True)


async def test_a_worker_whose_statuses_are_lost_lives_while_it_replies() -> None:
    place = Place()
    for index in range(6):
        place.later(SILENCE_S - 0.5)
        place.say(Tokens("r", 1, index, pack([7])))
    assert place.stream.state.attempt == 1


async def test_a_worker_that_says_nothing_at_all_is_taken_for_dead() -> None:
    place = Place()
    place.later(SILENCE_S - 0.5)
    assert place.stream.state.attempt == 1
    place.later(1.0)
    assert place.stream.state.attempt == 2


class Crowd:
    """Streams of many requests, and workers that do as they like."""

    def __init__(self, chooser: random.Random) -> None:
        self.chooser = chooser
        self.clock, self.fleet = Still(), Fleet()
        self.streams = Streams("g", Limits(max_attempts=1000, max_deaths=1000, max_barren_deaths=1000), SILENCE_S,
                               self.clock, self.fleet, Metrics(list))
        self.opened: list[Stream] = []
        self.workers = [f"w{number}" for number in range(5)]
        self.epochs = dict.fromkeys(self.workers, 1)
        self.seqs = dict.fromkeys(self.workers, 0)

    def open(self) -> None:
        request = Generate(f"r{len(self.opened)}", 1, gateway="g", model="m", tokens=pack([1]), max_tokens=99,
                           deadline=0.0)
        self.opened.append(self.streams.open(request, {}, asyncio.Event(), 1e9))

    def reply(self, stream: Stream) -> None:
        """Some worker says something about it, mostly the right one; now and then a message before it got lost."""
        state = stream.state
        worker = state.worker if state.worker and self.chooser.random() < 0.9 else self.chooser.choice(self.workers)
        name, attempt, done = state.request.request_id, state.attempt, len(state.delivered)
        reply = self.chooser.choice([
            Accepted(name, attempt, worker), Tokens(name, attempt, done, pack([7])),
            Tokens(name, attempt, done, pack([7])), Failed(name, attempt, "worker_failed", "no", retryable=True),
            Finished(name, attempt, "stop", worker, completion_tokens=done)])
        self.seqs[worker] += self.chooser.choice([1, 1, 1, 2])
        self.streams.hear(StepReplies(worker, self.epochs[worker], self.seqs[worker], (reply,)))

    def beat(self, worker: str) -> None:
        if self.chooser.random() < 0.1:
            self.epochs[worker] += 1
            self.seqs[worker] = 0
        status = WorkerStatus(worker, self.epochs[worker], model="m")
        self.fleet.fold(status, self.clock.now())
        self.streams.status(status)

    def pass_time(self) -> None:
        self.clock.now_s += self.chooser.choice([0.1, 0.1, 0.9])
        self.streams.tick(connected=True)

    def do_something(self) -> None:
        live = [stream for stream in self.opened if stream.ended is None]
        deed = self.chooser.choice(["open", "reply", "reply", "reply", "reply", "beat", "beat", "time", "cancel"])
        if deed == "open" or not live:
            self.open()
        elif deed == "reply":
            self.reply(self.chooser.choice(live))
        elif deed == "beat":
            self.beat(self.chooser.choice(self.workers))
        elif deed == "time":
            self.pass_time()
        elif self.chooser.random() < 0.2:
            self.streams.cancel(self.chooser.choice(live))

    def files(self) -> tuple[dict[str, set[Stream]], dict[str, set[Stream]]]:
        """Who works on what, and who is mourned by whom, by looking at every stream."""
        working: dict[str, set[Stream]] = {}
        mourned: dict[str, set[Stream]] = {}
        for stream in self.streams._streams.values():
            if stream.state.worker:
                working.setdefault(stream.state.worker, set()).add(stream)
            for worker in stream.state.mourned:
                mourned.setdefault(worker, set()).add(stream)
        return working, mourned


async def test_each_stream_is_found_under_the_worker_that_has_it_and_under_those_it_mourns() -> None:
    mourned_at_all = 0
    for seed in range(20):
        crowd = Crowd(random.Random(seed))
        for _ in range(600):
            crowd.do_something()
            working, mourned = crowd.files()
            assert {worker: set(file) for worker, file in crowd.streams._by_worker.items()} == working
            assert {worker: set(file) for worker, file in crowd.streams._mourners.items()} == mourned
            mourned_at_all += len(mourned)
    assert mourned_at_all > 100


async def test_a_workers_heartbeat_looks_at_its_own_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    died, lives = StreamState.worker_died, StreamState.lives

    def worker_died(state: StreamState, *args: object, **named: object) -> object:
        looked.append(state.request.request_id)
        return died(state, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(StreamState, "worker_died", worker_died)
    monkeypatch.setattr(StreamState, "lives", lambda state, *args: looked.append("lives") or lives(state, *args))
    crowd = Crowd(random.Random(0))
    for number in range(200):
        crowd.open()
        worker = "w0" if number < 3 else "w1"
        crowd.seqs[worker] += 1
        crowd.streams.hear(StepReplies(worker, 1, crowd.seqs[worker], (Accepted(f"r{number}", 1, worker),)))
    crowd.streams.status(WorkerStatus("w0", 1, model="m"))
    assert looked == ["r0", "r1", "r2"]
