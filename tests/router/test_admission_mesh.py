"""A mesh that is full, end to end: gateways, a router and workers with the mock engine, under virtual time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

import router.service
import worker.service
from gateway.failover import Limits
from gateway.metrics import Metrics
from gateway.streams import Stream, Streams
from router.service import Router
from shared import subjects
from shared.blocks import hash_chain, join_hashes, tenant_salt
from shared.clock import LoopClock
from shared.errors import MillError
from shared.fleet import Fleet
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import Finished, Generate, Status, StepReplies, WorkerStatus, decode
from shared.settings import RouterSettings, WorkerSettings
from shared.tiers import Tier, priority
from shared.tokens import pack
from tests.virtual_time import run_virtual
from worker.mock_decoder import MockDecoder

PROMPT_TOKENS = 200  # a fifth of a second each on a worker of 1000 tokens/s
VOCABULARY = 2048


class Crowd:
    """Clients of one gateway."""

    def __init__(self, streams: Streams, clock: LoopClock) -> None:
        self.streams = streams
        self.clock = clock
        self.ended: list[tuple[str, Tier, str | MillError]] = []  # tenant, tier, request or error, in order
        self.count = 0

    async def ask(self, tenant: str, tier: Tier = "default", timeout_s: float = 500.0, weight: float = 1.0,
                  prompt_tokens: int = PROMPT_TOKENS, max_tokens: int = 4) -> None:
        """One request from its first to its last token."""
        stream, changed = self.send(tenant, tier, timeout_s, weight, prompt_tokens, max_tokens)
        while stream.ended is None:
            await changed.wait()
            changed.clear()
        name = stream.state.request.request_id
        self.ended.append((tenant, tier, name if isinstance(stream.ended, Finished) else stream.ended))

    def send(self, tenant: str, tier: Tier, timeout_s: float, weight: float = 1.0,
             prompt_tokens: int = PROMPT_TOKENS, max_tokens: int = 4) -> tuple[Stream, asyncio.Event]:
        self.count += 1
        tokens = [(self.count * 7919 + place) % VOCABULARY for place in range(prompt_tokens)]
        salt = tenant_salt(b"secret", tenant)
        changed = asyncio.Event()
        request = Generate(
            f"{tenant}-{self.count}", 1, "g", "m", pack(tokens), max_tokens, self.clock.wall() + timeout_s,
            tenant=tenant, cache_salt=salt, block_hashes=join_hashes(hash_chain(tokens, salt)), tier=tier,
            priority=priority(tier, 0), weight=weight)
        return self.streams.open(request, {}, changed, self.clock.now() + timeout_s), changed

    def finished(self, tenant: str) -> int:
        return sum(who == tenant and isinstance(what, str) for who, _, what in self.ended)

    def errors(self) -> list[MillError]:
        return [what for _, _, what in self.ended if isinstance(what, MillError)]


class World:
    def __init__(self) -> None:
        self.broker = MemoryBroker()
        self.clock = LoopClock(1e6)
        self.crowd: Crowd
        self.routers: list[Router] = []
        self.router_tasks: list[asyncio.Task[None]] = []
        self.router_buses: list[MemoryBus] = []
        self.statuses: dict[str, WorkerStatus] = {}

    @contextlib.asynccontextmanager
    async def running(self, workers: int = 2, routers: int = 1, token_s: float = 0.001,
                      **settings: Any) -> AsyncIterator["World"]:
        fleet = Fleet()
        streams = Streams("g", Limits(), 2.0, self.clock, fleet, Metrics(list))
        self.crowd = Crowd(streams, self.clock)
        bus = MemoryBus(self.broker)
        made = self.routers

        class Seen(Router):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments)
                made.append(self)

        await bus.subscribe(subjects.replies("g"), lambda delivery: streams.hear(decode(delivery.data, StepReplies)))

        def on_status(delivery: Any) -> None:
            status: Any = decode(delivery.data, Status)  # type: ignore[arg-type]
            fleet.fold(status, self.clock.now())
            if isinstance(status, WorkerStatus):
                self.statuses[status.id] = status
                streams.status(status)

        await bus.subscribe(subjects.ALL_STATUS, on_status)

        async def send() -> None:
            while True:
                out = await streams.outbox.get()
                await bus.publish(out.subject, out.data, out.headers, out.unheard)

        async def tick() -> None:
            while True:
                await asyncio.sleep(0.1)
                streams.tick(True)

        async with asyncio.TaskGroup() as tasks:
            original, router.service.Router = router.service.Router, Seen  # type: ignore[misc,assignment]
            for number in range(routers):
                self.router_buses.append(MemoryBus(self.broker))
                self.router_tasks.append(tasks.create_task(router.service.serve(
                    self.router_buses[-1], RouterSettings(id=f"r{number}", **settings), self.clock)))
            running = [*self.router_tasks, tasks.create_task(send()), tasks.create_task(tick())]
            for number in range(workers):
                told = WorkerSettings(id=f"w{number}", engine="mock", model_name="m", mock_step_s=0.005,
                                      mock_row_s=0.0, mock_token_s=token_s, max_running=8, drain_s=0.0)
                running.append(tasks.create_task(worker.service.serve(
                    MemoryBus(self.broker), told, self.clock, None,
                    MockDecoder(blocks=512, vocabulary_size=VOCABULARY))))
            await asyncio.sleep(1.5)
            router.service.Router = original  # type: ignore[misc]
            try:
                yield self
            finally:
                for task in running:
                    task.cancel()


def play(scenario: Callable[[World], Awaitable[None]], **settings: Any) -> None:
    async def scene() -> None:
        world = World()
        async with world.running(**settings):
            await scenario(world)

    run_virtual(scene(), timeout_s=600)


def test_a_crowd_is_served_whole_and_waits_in_the_router_instead_of_in_workers() -> None:
    async def scenario(world: World) -> None:
        crowd, (held_by,) = world.crowd, world.routers
        asking = [asyncio.ensure_future(crowd.ask("red")) for _ in range(120)]
        await asyncio.sleep(1.0)
        assert len(held_by.desk.admission) > 60
        # full, and no fuller: about FULL_S of prompts
        assert all(status.queued_tokens < 3500 for status in world.statuses.values())
        await asyncio.gather(*asking)
        assert crowd.finished("red") == 120
        # 24,000 prompt tokens on two workers that take 1000 a second
        assert world.clock.now() < 1.5 + 1.25 * 12
        assert len(held_by.desk.admission) == 0

    play(scenario)


@pytest.mark.parametrize(("settings", "weight"), [({"tenant_weights": "heavy=3"}, 1.0), ({}, 3.0)])
def test_tenants_share_a_full_mesh_by_weight_and_a_flood_holds_nobody_up(settings: dict[str, str],
                                                                         weight: float) -> None:
    """By the weight that a router was told, or by that which came with the requests."""
    async def scenario(world: World) -> None:
        crowd = world.crowd
        asking = [asyncio.ensure_future(crowd.ask("flood")) for _ in range(200)]
        await asyncio.sleep(2.0)
        asking += [asyncio.ensure_future(crowd.ask(tenant, weight=its))
                   for tenant, its, count in (("small", 1.0, 40), ("heavy", weight, 90)) for _ in range(count)]
        while crowd.finished("small") < 1:  # about twenty of the flood were at the workers before
            await asyncio.sleep(0.05)
        then = {tenant: crowd.finished(tenant) for tenant in ("flood", "small", "heavy")}
        while crowd.finished("heavy") < 80:
            await asyncio.sleep(0.05)
        # while all three wait: one, one, three; a worker that was told of no weights orders its two seconds otherwise
        got = {tenant: crowd.finished(tenant) - before for tenant, before in then.items()}
        assert 2.2 <= got["heavy"] / got["small"] <= 3.6
        assert abs(got["flood"] - got["small"]) <= 20
        before = crowd.finished("flood") - crowd.finished("small")
        while crowd.finished("small") < 40:
            await asyncio.sleep(0.05)
        assert abs(crowd.finished("flood") - crowd.finished("small") - before) <= 20
        await asyncio.gather(*asking)
        assert crowd.errors() == []

    play(scenario, **settings)


def test_priority_goes_first_and_flex_when_nobody_else_waits() -> None:
    async def scenario(world: World) -> None:
        crowd = world.crowd
        tiers: list[Tier] = ["flex", "default", "priority"]
        asking = [asyncio.ensure_future(crowd.ask("filler")) for _ in range(60)]
        await asyncio.sleep(1.0)
        asking += [asyncio.ensure_future(crowd.ask("red", tier)) for tier in tiers for _ in range(8)]
        await asyncio.gather(*asking)
        assert crowd.errors() == []
        order = [tier for tenant, tier, _ in crowd.ended if tenant == "red"]
        # four of them to one of the default
        assert order[:8].count("priority") >= 6 and "priority" not in order[10:]
        # nothing else was left when the first flex request ended
        assert all(tier == "flex" for _, tier, _ in crowd.ended[-8:])

    play(scenario)


def test_a_deadline_out_of_reach_is_refused_at_once_and_one_in_reach_is_met() -> None:
    async def scenario(world: World) -> None:
        crowd = world.crowd
        asking = [asyncio.ensure_future(crowd.ask("red")) for _ in range(100)]
        await asyncio.sleep(1.0)
        began = world.clock.now()
        await crowd.ask("red", timeout_s=6.0)
        assert world.clock.now() - began < 0.1
        (error,) = crowd.errors()
        assert (error.status, error.retryable) == (503, True)
        assert error.retry_after_s is not None and 1.0 <= error.retry_after_s <= 20.0
        assert "deadline" in error.message and "retry" in error.message
        await asyncio.gather(*asking, crowd.ask("red", timeout_s=30.0))
        assert len(crowd.errors()) == 1

    play(scenario)


def test_a_full_queue_is_503_for_its_only_tenant_and_429_for_the_one_over_its_share() -> None:
    async def scenario(world: World) -> None:
        crowd, (held_by,) = world.crowd, world.routers
        asking = [asyncio.ensure_future(crowd.ask("big")) for _ in range(100)]
        await asyncio.sleep(0.5)
        assert len(held_by.desk.admission) <= 30
        full = crowd.errors()
        assert full and {error.status for error in full} == {503}
        while len(held_by.desk.admission) < 30:
            asking.append(asyncio.ensure_future(crowd.ask("big")))
            await asyncio.sleep(0.01)
        asking += [asyncio.ensure_future(crowd.ask("small")) for _ in range(5)]
        await asyncio.gather(*asking)
        assert crowd.finished("small") == 5
        over = [error for error in crowd.errors() if error.status == 429]
        assert len(over) == 5 and all("share" in error.message and error.retry_after_s for error in over)
        reasons = held_by.metrics.turned_away
        assert reasons.labels("gave_way")._value.get() == 5
        assert reasons.labels("full")._value.get() == len(crowd.errors()) - 5

    play(scenario, max_held=30)


@pytest.mark.parametrize("max_tokens", [2, 4])
def test_a_thousand_short_requests_within_one_heartbeat_are_all_served(max_tokens: int) -> None:
    """Each counted for 256 tokens where it was sent, so that the shortest queue seemed to take more than a minute."""
    async def scenario(world: World) -> None:
        crowd = world.crowd
        asking = []
        for _ in range(1000):
            asking.append(asyncio.ensure_future(crowd.ask("red", prompt_tokens=2, max_tokens=max_tokens)))
            await asyncio.sleep(0.0004)
        await asyncio.gather(*asking)
        assert crowd.errors() == [] and crowd.finished("red") == 1000

    play(scenario, workers=1, token_s=0.0)


def test_what_a_dead_router_held_is_held_by_another_and_ends_well() -> None:
    async def scenario(world: World) -> None:
        crowd = world.crowd
        asking = [asyncio.ensure_future(crowd.ask("red")) for _ in range(100)]
        await asyncio.sleep(1.0)
        assert all(len(found.desk.admission) > 10 for found in world.routers)
        world.router_buses[0].crash()
        world.router_tasks[0].cancel()
        await asyncio.gather(*asking)
        assert crowd.errors() == [] and crowd.finished("red") == 100

    play(scenario, routers=2)


def test_a_router_that_leaves_hands_on_what_it_holds() -> None:
    async def scenario(world: World) -> None:
        crowd = world.crowd
        asking = [asyncio.ensure_future(crowd.ask("red")) for _ in range(100)]
        await asyncio.sleep(1.0)
        world.router_tasks[0].cancel()
        await asyncio.sleep(0.2)
        assert len(world.routers[0].desk.admission) == 0
        assert len(world.routers[1].desk.admission) > 20
        await asyncio.gather(*asking)
        assert crowd.errors() == [] and crowd.finished("red") == 100

    play(scenario, routers=2)


def test_clients_that_leave_take_their_requests_out_of_the_queue() -> None:
    async def scenario(world: World) -> None:
        crowd, (held_by,) = world.crowd, world.routers
        streams = [crowd.send("red", "default", 500.0)[0] for _ in range(100)]
        await asyncio.sleep(1.0)
        assert len(held_by.desk.admission) > 40
        for stream in streams:
            crowd.streams.cancel(stream)
        await asyncio.sleep(0.01)
        assert len(held_by.desk.admission) == 0
        # one that left before anybody was told who holds it
        for _ in range(100):
            crowd.streams.cancel(crowd.send("red", "default", 500.0)[0])
        await asyncio.sleep(1.0)
        assert len(held_by.desk.admission) == 0

    play(scenario)


def test_an_idle_queue_is_idle() -> None:
    async def scenario(world: World) -> None:
        (held_by,) = world.routers
        looked = 0
        look = held_by.desk._let_in_some

        def counted() -> int:
            nonlocal looked
            looked += 1
            return look()

        held_by.desk._let_in_some = counted  # type: ignore[method-assign]
        await world.crowd.ask("red")
        await asyncio.sleep(5.0)
        assert looked == 0

    play(scenario)
