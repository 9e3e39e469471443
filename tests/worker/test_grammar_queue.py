"""Grammars are compiled beside the engine, and nobody's holds up another's for long."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from unittest import mock

import worker.grammar_queue
from shared.clock import LoopClock
from shared.errors import BadRequest, MillError, Overloaded
from shared.messages import Accepted, Cancel, Generate, Grammar, StepReplies
from tests.worker.builders import request
from tests.worker.test_grammar import SIZE, VOCABULARY
from worker.engine import Arrival
from worker.events import Heard
from worker.grammar import Grammars, GrammarState
from worker.grammar_queue import GrammarQueue
from worker.outbox import Outbox


class Door:
    """A queue, what it hands on, and grammars of the kind `slow...` that are compiled only when told so."""

    def __init__(self) -> None:
        self.grammars = Grammars(lambda: VOCABULARY, SIZE)
        self.handed: dict[str, Arrival] = {}
        self.told: list[str] = []
        self.begun: list[str] = []
        self.go_on = threading.Event()
        self.clock = LoopClock(0.0)
        self.queue = GrammarQueue(self.grammars, self.clock, self._take,
                                  lambda request: self.told.append(request.request_id))
        self._real = self.grammars._compile
        self.grammars._compile = self._compile  # type: ignore[method-assign]

    def add(self, name: str, text: str = "ab", tenant: str = "one", deadline: float = float("inf")) -> bool:
        return self.queue.add(Arrival(self.request(name, text, tenant), deadline))

    def request(self, name: str, text: str, tenant: str = "one") -> Generate:
        return request(name, tenant=tenant, cache_salt=tenant.encode(), grammar=Grammar("regex", text))

    def grammar(self, name: str) -> GrammarState | MillError | None:
        return self.handed[name].grammar

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.002)

    def _take(self, arrival: Arrival) -> None:
        self.handed[arrival.request.request_id] = arrival

    def _compile(self, grammar: Grammar):  # type: ignore[no-untyped-def]
        self.begun.append(grammar.text)
        if grammar.text.startswith("slow"):
            self.go_on.wait(30)
        return self._real(grammar)


def at_the_door(scenario: Callable[[Door], Awaitable[None]]) -> None:
    async def run() -> None:
        door = Door()
        serving = asyncio.ensure_future(door.queue.run())
        try:
            await scenario(door)
        finally:
            door.go_on.set()
            serving.cancel()
            await asyncio.wait([serving])
    asyncio.run(run())


def test_one_tenants_slow_grammar_holds_up_neither_another_tenant_nor_what_is_known() -> None:
    async def scenario(door: Door) -> None:
        door.add("first", "ab")
        await door.until(lambda: "first" in door.handed)
        door.add("slow", "slow")
        door.add("behind", "cd")
        door.add("known", "ab")
        door.add("other", "ef", "two")
        await door.until(lambda: {"known", "other"} <= door.handed.keys())
        assert door.begun == ["ab", "ef", "slow"] and len(door.queue) == 2
        door.go_on.set()
        await door.until(lambda: {"slow", "behind"} <= door.handed.keys())
        assert all(isinstance(arrival.grammar, GrammarState) for arrival in door.handed.values())
    at_the_door(scenario)


def test_a_grammar_that_takes_too_long_ends_its_request_and_is_refused_from_then_on() -> None:
    """One schema compiled for minutes, and every tenant's grammars waited behind it."""
    async def scenario(door: Door) -> None:
        for name in ("a", "b"):
            door.add(name, "slow")
            await door.until(lambda name=name: name in door.handed)
            error = door.grammar(name)
            assert isinstance(error, BadRequest) and "to compile" in error.message
        assert door.begun == ["slow"] and door.queue.slow == 1
        for number in range(2):
            door.add(f"more {number}", f"slow{number}")
            await door.until(lambda number=number: f"more {number}" in door.handed)
        door.add("no more", "xy")
        await door.until(lambda: "no more" in door.handed)
        assert isinstance(door.grammar("no more"), Overloaded)
        door.go_on.set()
        await door.until(lambda: door.queue._left == 0)
        door.add("again", "xy")
        await door.until(lambda: "again" in door.handed)
        assert isinstance(door.grammar("again"), GrammarState)
        door.add("still", "slow")
        await door.until(lambda: "still" in door.handed)
        assert isinstance(door.grammar("still"), BadRequest)
    with mock.patch("worker.grammar_queue.COMPILE_S", 0.05):
        at_the_door(scenario)


def test_what_is_cancelled_late_or_drained_is_handed_on_without_being_compiled() -> None:
    async def scenario(door: Door) -> None:
        door.add("slow", "slow")
        await door.until(lambda: door.begun)
        door.add("unwanted", "cd")
        door.add("late", "ef", deadline=-1.0)
        door.add("drained", "gh")
        door.queue.cancel(Cancel("unwanted", 1))
        assert door.grammar("unwanted") is None
        await door.until(lambda: "late" in door.handed)
        assert door.grammar("late") is None and "drained" not in door.handed
        door.queue.clear()
        assert door.grammar("drained") is None and door.grammar("slow") is None and len(door.queue) == 0
        door.go_on.set()
        await door.until(lambda: not door.queue._in_hand)
        assert door.begun == ["slow"] and door.grammar("slow") is None
    at_the_door(scenario)


def test_a_deadline_is_noticed_when_it_passes_though_all_threads_are_busy() -> None:
    """Only when a thread was free again did anybody look."""
    async def scenario(door: Door) -> None:
        for tenant in range(worker.grammar_queue.THREADS):
            door.add(f"slow {tenant}", f"slow{tenant}", f"{tenant}")
        await door.until(lambda: len(door.begun) == worker.grammar_queue.THREADS)
        soon = door.clock.now() + 0.05
        door.add("late", "ef", "late", deadline=soon)
        door.add("in time", "ef", "in time", deadline=soon + 1000.0)
        await door.until(lambda: "late" in door.handed)
        assert door.clock.now() >= soon and door.grammar("late") is None
        assert len(door.queue._in_hand) == worker.grammar_queue.THREADS and list(door.handed) == ["late"]
    at_the_door(scenario)


def test_tenants_take_turns_and_who_was_served_before_all_others_is_forgotten() -> None:
    """Every tenant of a busy day was kept."""
    async def scenario(door: Door) -> None:
        door.add("slow", "slow", "holds one thread")
        await door.until(lambda: door.begun)
        for number in range(20):
            door.add(f"r{number}", "ab", f"{number}")
            await door.until(lambda number=number: f"r{number}" in door.handed)
        assert list(door.queue._turns) == [f"{number}" for number in range(12, 20)]
        with mock.patch("worker.grammar_queue.THREADS", 1):
            for tenant in ("19", "13", "0"):
                door.add(tenant, f"{tenant}x", tenant)
            door.go_on.set()
            await door.until(lambda: {"19", "13", "0"} <= door.handed.keys())
        assert door.begun[-3:] == ["0x", "13x", "19x"]
    with mock.patch("worker.grammar_queue.QUEUE_LIMIT", 8):
        at_the_door(scenario)


def test_what_waits_longer_than_a_moment_is_told_to_be_here() -> None:
    """Its gateway sent it again and again, each time to be compiled once more."""
    async def scenario(door: Door) -> None:
        door.add("quick", "ab")
        await door.until(lambda: "quick" in door.handed)
        door.add("slow", "slow")
        door.add("slow", "slow")
        door.add("behind", "cd")
        await door.until(lambda: len(door.told) >= 2)
        assert door.told == ["slow", "behind"]
    with mock.patch("worker.grammar_queue.TELL_AFTER_S", 0.05):
        at_the_door(scenario)


def test_one_tenant_cannot_fill_the_queue_for_all() -> None:
    async def scenario(door: Door) -> None:
        assert all(door.add(f"r{number}", "slow") for number in range(worker.grammar_queue.TENANT_LIMIT))
        assert not door.add("more", "slow") and door.add("other", "ab", "two")
        door.queue.drop_gateways({"g1"})
        assert len(door.queue) == 0 and not door.handed
    at_the_door(scenario)


def test_refusals_are_counted() -> None:
    async def scenario(door: Door) -> None:
        door.add("bad", "(")
        await door.until(lambda: "bad" in door.handed)
        assert isinstance(door.grammar("bad"), BadRequest) and door.queue.refused == 1
        assert door.begun == ["("]
    at_the_door(scenario)


def test_a_request_that_was_heard_is_accepted_in_its_gateways_eyes() -> None:
    one = request("r")
    (message,) = Outbox("w1", 1).replies([Heard(one)])
    assert isinstance(message.message, StepReplies)
    assert message.message.replies == (Accepted("r", one.attempt, "w1"),)
