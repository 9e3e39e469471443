"""All streams of a gateway, on a clock that stands until it is set."""

import asyncio

from gateway.failover import Limits
from gateway.metrics import Metrics
from gateway.streams import Streams
from shared.clock import LoopClock
from shared.fleet import Fleet
from shared.messages import Accepted, Generate, StepReplies, Tokens, WorkerStatus
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
