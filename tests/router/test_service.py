"""Routers are forgetful, and it shows in nothing but cache hits (law 6)."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router import service
from shared import subjects, telemetry
from shared import trace_names as names
from shared.blocks import split_hashes
from shared.clock import LoopClock
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.messages import KvEvents, Residency, encode
from shared.nats_bus import NatsBus
from shared.settings import RouterSettings
from tests.nats_server import nats_server
from tests.router.builders import blocks, named, request
from tests.router.mesh import CachingWorker, Mesh
from tests.virtual_time import run_virtual

Scenario = Callable[[Mesh], Awaitable[None]]


def play(scenario: Scenario, faults: Faults | None = None, seed: int = 0) -> None:
    async def scene() -> None:
        async with Mesh(faults, seed).running() as mesh:
            await scenario(mesh)

    run_virtual(scene(), timeout_s=120)


def test_a_request_reaches_a_worker_with_its_placement_and_nothing_else_changed() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, worker, gateway = await mesh.router(), await mesh.worker(), await mesh.gateway()
        await asyncio.sleep(1)
        await gateway.ask(request())
        await asyncio.sleep(0.1)
        (got,) = worker.requests
        assert got.placement is not None
        assert (got.placement.router, got.placement.worker, got.placement.cached_tokens) == ("r0", "w0", 0)
        assert got.tokens == request().tokens
        assert router.router.desk.placed_total == 1

    play(scenario)


def test_other_routers_are_told_what_is_placed_without_its_tokens_and_only_while_there_are_some() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.router()
        worker, gateway = await mesh.worker(), await mesh.gateway()
        await asyncio.sleep(1)
        await gateway.ask(request(request_id="alone"))
        await asyncio.sleep(0.1)
        assert gateway.placed == []
        other = await mesh.router("r1")
        await asyncio.sleep(0.1)  # it has said that it starts, and does not take requests yet
        assert other.router.state == "starting"
        await gateway.ask(request(request_id="beside another"))
        await asyncio.sleep(0.1)
        (told,) = gateway.placed
        got = worker.requests[-1]
        assert told.request_id == got.request_id == "beside another"
        assert told.tokens == b"" and told.cache_salt == b""
        assert told.block_hashes == got.block_hashes
        await other.leave()
        await asyncio.sleep(0.1)
        await gateway.ask(request(request_id="alone again"))
        await asyncio.sleep(0.1)
        assert [told.request_id for told in gateway.placed] == ["beside another"]
        assert len(worker.requests) == 3

    play(scenario)


def test_the_next_request_with_the_same_beginning_follows_the_cache() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.router()
        workers = [await mesh.worker(f"w{i}") for i in range(4)]
        gateway = await mesh.gateway()
        await asyncio.sleep(1)
        for number in range(6):
            await gateway.ask(request(prompt_tokens=160 + 16 * number, request_id=f"turn{number}"))
            await asyncio.sleep(1)
        (home,) = [worker for worker in workers if worker.requests]
        cached = [got.placement.cached_tokens for got in home.requests if got.placement]
        assert cached == [0, 160, 176, 192, 208, 224]

    play(scenario)


def test_a_router_that_starts_again_knows_every_cache_before_it_says_ready() -> None:
    async def scenario(mesh: Mesh) -> None:
        first, gateway = await mesh.router(), await mesh.gateway()
        workers = [await mesh.worker(f"w{i}") for i in range(3)]
        await asyncio.sleep(1)
        for i, worker in enumerate(workers):
            worker.store(blocks(20, start=i * 10_000))
        await asyncio.sleep(0.5)
        first.crash()
        gateway.routers.clear()
        again = await mesh.router()
        await asyncio.sleep(1.01)
        assert [status.state for status in gateway.routers][-1] == "ready"
        assert all(worker.snapshots_sent == 1 for worker in workers)
        for worker in workers:
            assert again.view.index.blocks(worker.name) == named(worker.held)
        await gateway.ask(request(prompt_tokens=320, start=20_000))
        await asyncio.sleep(0.1)
        (got,) = workers[2].requests
        assert got.placement is not None and got.placement.cached_tokens == 304

    play(scenario)


@pytest.mark.parametrize(("lost", "ready_after_s"), [(0, (0.5, 1.0)), (2, (2.0, 4.0)), (99, (5.0, 5.6))])
def test_a_router_is_not_ready_before_it_has_caught_up_or_waited_long_enough(
        lost: int, ready_after_s: tuple[float, float]) -> None:
    async def scenario(mesh: Mesh) -> None:
        gateway, worker = await mesh.gateway(), await mesh.worker()
        worker.store(blocks(20))
        await asyncio.sleep(0.3)
        worker.deaf_to_requests = lost
        router = await mesh.router()
        begun = mesh.clock.now()
        while not any(status.state == "ready" for status in gateway.routers):
            await asyncio.sleep(0.01)
        assert ready_after_s[0] <= mesh.clock.now() - begun <= ready_after_s[1]
        assert router.view.index.count("w0") == (20 if lost < 99 else 0)
        # it works before as well, only without knowing
        await gateway.ask(request())
        await asyncio.sleep(0.1)
        assert len(worker.requests) == 1

    play(scenario)


def placed_by(worker: CachingWorker) -> list[str]:
    return [got.placement.router for got in worker.requests if got.placement]


# a worker that no crowd of a test fills
QUICK = {"prefill_tok_s": 1e9, "max_running": 1000}


async def a_router_joins(mesh: Mesh) -> None:
    """Another comes while requests do: it is asked for nothing until it says that it is ready, then for its share."""
    gateway, worker = await mesh.gateway(), await mesh.worker(**QUICK)
    worker.store(blocks(20))
    await mesh.router("old")
    while not any(status.state == "ready" for status in gateway.routers):
        await asyncio.sleep(0.05)
    worker.deaf_to_requests = 1
    born = await mesh.router("young")
    number = 0
    while born.router.state == "starting":
        await gateway.ask(request(start=1000 * (number := number + 1)))
        await asyncio.sleep(0.05)
    assert number >= 20  # its snapshot came a second late
    await asyncio.sleep(0.1)
    early = placed_by(worker)
    assert len(early) >= number - 1 and set(early[:number - 2]) == {"old"}
    for _ in range(40):
        await gateway.ask(request(start=1000 * (number := number + 1)))
    await asyncio.sleep(0.3)
    assert len(worker.requests) == number and gateway.unheard == 0
    assert set(placed_by(worker)) == {"old", "young"}


def test_a_router_that_has_just_started_leaves_requests_to_those_that_know() -> None:
    play(a_router_joins)


async def test_over_nats_too_a_router_that_has_just_started_leaves_requests_to_those_that_know() -> None:
    buses: list[NatsBus] = []
    with nats_server() as server:
        async def connect() -> NatsBus:
            buses.append(await NatsBus.connect(server.url, "test"))
            return buses[-1]

        try:
            async with asyncio.timeout(30), Mesh(connect=connect).running() as mesh:
                await a_router_joins(mesh)
        finally:
            for bus in buses:
                await bus.close()


@pytest.mark.parametrize(("deaf", "taken_after_s"), [(0, (0.5, 0.55)), (99, (1.0, 1.05))])
def test_the_only_router_takes_requests_after_a_second_whatever_it_knows(
        deaf: int, taken_after_s: tuple[float, float]) -> None:
    async def scenario(mesh: Mesh) -> None:
        worker, gateway = await mesh.worker(**QUICK), await mesh.gateway()
        worker.store(blocks(20))
        await asyncio.sleep(0.1)  # its status went by before the router came
        worker.deaf_to_requests = deaf
        await mesh.router()
        begun, number = mesh.clock.now(), 0
        while not worker.requests:
            await gateway.ask(request(start=1000 * (number := number + 1)))
            await asyncio.sleep(0.01)
        assert taken_after_s[0] <= mesh.clock.now() - begun <= taken_after_s[1]
        assert gateway.refusals == [] and gateway.unheard >= number - 2

    play(scenario)


def test_a_router_that_hears_of_others_and_of_no_worker_does_not_refuse_what_they_can_place() -> None:
    async def scenario(mesh: Mesh) -> None:
        gateway, worker = await mesh.gateway(), await mesh.worker(**QUICK)
        await mesh.router("old")
        await asyncio.sleep(1)
        worker.silent = True  # its heartbeats get lost for a while, not long enough for it to be taken for dead
        await mesh.router("young")
        for number in range(12):
            await gateway.ask(request(start=1000 * number))
            await asyncio.sleep(0.1)
        worker.silent = False
        assert gateway.refusals == [] and set(placed_by(worker)) == {"old"}
        await asyncio.sleep(1.1)
        for number in range(12, 50):
            await gateway.ask(request(start=1000 * number))
        await asyncio.sleep(0.1)
        assert set(placed_by(worker)) == {"old", "young"} and len(worker.requests) == 50

    play(scenario)


def test_lost_events_are_noticed_and_made_good() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, worker = await mesh.router(), await mesh.worker()
        await asyncio.sleep(1)
        worker.store(blocks(4))
        await asyncio.sleep(0.1)
        worker.mute = True
        worker.remove(blocks(4)[1:])
        worker.mute = False
        worker.store(blocks(6, start=5000))
        await asyncio.sleep(0.1)
        assert worker.snapshots_sent == 1
        assert router.view.index.blocks("w0") == named(worker.held)
        assert router.view.resync.gaps_total == 1

    play(scenario)


def test_a_loss_that_no_event_follows_is_noticed_by_the_status() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, worker = await mesh.router(), await mesh.worker()
        await asyncio.sleep(1)
        worker.mute = True
        worker.store(blocks(4))
        await asyncio.sleep(1.6)
        assert router.view.index.blocks("w0") == named(worker.held)

    play(scenario)


@pytest.mark.parametrize("seed", range(12))
def test_the_index_ends_as_the_workers_caches_whatever_is_lost(seed: int) -> None:
    bad = Faults(delay_s=(0.0, 0.02), loss=0.15, duplication=0.1, reordering=0.2)

    async def scenario(mesh: Mesh) -> None:
        routers = [await mesh.router(f"r{i}") for i in range(2)]
        workers = [await mesh.worker(f"w{i}") for i in range(2)]
        for number in range(60):
            worker = workers[number % 2]
            worker.store(blocks(5, start=number % 7 * 1000))
            if number % 3 == 0:
                worker.remove(blocks(5, start=number % 4 * 1000)[2:])
            await asyncio.sleep(0.05)
        mesh.broker.faults = None
        await asyncio.sleep(8)
        for router in routers:
            for worker in workers:
                assert router.view.index.blocks(worker.name) == named(worker.held)

    play(scenario, bad, seed)


def test_a_worker_that_starts_again_is_not_credited_with_its_old_cache() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, gateway, old = await mesh.router(), await mesh.gateway(), await mesh.worker()
        await asyncio.sleep(1)
        for _ in range(9):
            old.store(blocks(20))
        await asyncio.sleep(0.1)
        assert router.view.index.count("w0") == 20
        old.crash()
        new = await mesh.worker(epoch=2)
        await asyncio.sleep(0.1)
        assert router.view.index.count("w0") == 0
        # its numbers start at 1 again, and count
        new.store(blocks(3))
        await asyncio.sleep(0.1)
        assert router.view.index.blocks("w0") == named(new.held)
        # an echo of the old one
        late = MemoryBus(mesh.broker)
        await late.publish(subjects.worker_kv("w0"), encode(KvEvents("w0", 1, 10, ())))
        await gateway.ask(request(prompt_tokens=320))
        await asyncio.sleep(0.1)
        assert router.view.index.blocks("w0") == named(new.held)
        assert new.requests[0].placement is not None and new.requests[0].placement.cached_tokens == 48
        assert new.snapshots_sent == 0

    play(scenario)


def test_two_routers_share_the_load_place_each_request_once_and_spread_together() -> None:
    async def scenario(mesh: Mesh) -> None:
        routers = [await mesh.router(f"r{i}") for i in range(2)]
        workers = [await mesh.worker(f"w{i}", max_running=64, prefill_tok_s=4000.0) for i in range(4)]
        gateway = await mesh.gateway()
        await asyncio.sleep(1.02)
        for number in range(80):
            await gateway.ask(request(start=number * 1000))
            if number % 8 == 7:
                await asyncio.sleep(0.002)
        await asyncio.sleep(0.1)
        placed = Counter(got.request_id for worker in workers for got in worker.requests)
        assert len(placed) == 80 and set(placed.values()) == {1}
        assert all(router.router.desk.placed_total > 20 for router in routers)
        spread = [len(worker.requests) for worker in workers]
        assert max(spread) - min(spread) <= 8, spread

    play(scenario)


def test_what_one_router_placed_counts_at_the_others_at_once_as_load_and_as_cache_to_come() -> None:
    async def scenario(mesh: Mesh) -> None:
        routers, gateway = [await mesh.router(f"r{i}") for i in range(2)], await mesh.gateway()
        workers = [await mesh.worker(f"w{i}") for i in range(2)]
        await asyncio.sleep(1)
        for worker in workers:
            worker.mute = True
        await gateway.ask(request())
        await asyncio.sleep(0.01)
        (placed,) = gateway.placed
        assert placed.placement is not None
        for router in routers:
            seen = {one.status.id: one for one in router.view.candidates(request().block_hashes, mesh.clock.now())}
            there = seen.pop(placed.placement.worker)
            (elsewhere,) = seen.values()
            assert (there.sent_requests, there.cached_blocks, there.certain_blocks) == (1, 10, 0)
            assert (elsewhere.sent_requests, elsewhere.cached_blocks) == (0, 0)

    play(scenario)


def test_a_message_that_comes_twice_is_placed_once() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.router()
        worker, gateway = await mesh.worker(), await mesh.gateway()
        await asyncio.sleep(1)
        await gateway.ask(request())
        await gateway.ask(request())
        await gateway.ask(request(attempt=2))
        await asyncio.sleep(0.1)
        assert [got.attempt for got in worker.requests] == [1, 2]

    play(scenario)


def test_a_worker_that_died_a_moment_ago_costs_a_second_try_and_no_error() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, gateway = await mesh.router(), await mesh.gateway()
        dying, other = await mesh.worker("w0"), await mesh.worker("w1")
        await asyncio.sleep(1)
        dying.store(split_hashes(request().block_hashes))
        await asyncio.sleep(0.1)
        dying.crash()
        await gateway.ask(request())
        await asyncio.sleep(0.1)
        assert [got.request_id for got in other.requests] == ["r0"]
        assert gateway.refusals == []
        await gateway.ask(request(attempt=2))
        await asyncio.sleep(0.1)
        assert len(other.requests) == 2
        assert router.router.metrics.unheard._value.get() == 1

    play(scenario)


def test_when_the_only_worker_died_the_gateway_is_told_at_once_to_try_again() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.router()
        worker, gateway = await mesh.worker(), await mesh.gateway()
        await asyncio.sleep(1)
        worker.crash()
        await gateway.ask(request())
        await asyncio.sleep(0.1)
        (failed,) = gateway.refusals
        assert (failed.code, failed.retryable) == ("overloaded", True)
        await asyncio.sleep(10)
        await mesh.worker(epoch=2)
        await asyncio.sleep(0.1)
        await gateway.ask(request(attempt=2))
        await asyncio.sleep(0.1)
        assert len(gateway.refusals) == 1

    play(scenario)


def test_the_rates_that_placement_reckons_with_are_figures_for_as_long_as_their_worker_lives() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, worker = await mesh.router(), await mesh.worker(prefill_tok_s=4321.0, step_base_s=0.0125,
                                                                step_row_s=0.0005)
        await asyncio.sleep(1)

        def told() -> list[float | None]:
            return [router.router.metrics.registry.get_sample_value(f"mill_router_worker_{name}", {"worker": "w0"})
                    for name in ("prefill_tokens_per_second", "step_base_seconds", "step_row_seconds")]

        assert told() == [4321.0, 0.0125, 0.0005]
        worker.crash()
        await asyncio.sleep(3)
        assert told() == [None, None, None]

    play(scenario)


def test_a_silent_worker_is_forgotten_with_all_it_held() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, worker = await mesh.router(), await mesh.worker()
        await asyncio.sleep(1)
        worker.store(blocks(10))
        await asyncio.sleep(0.1)
        worker.crash()
        await asyncio.sleep(3)
        assert len(router.view.index) == 0
        assert router.view.fleet.workers() == []
        assert router.view.snapshots_due(1e9) == []

    play(scenario)


def test_refusals_are_numbered_per_gateway() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.router()
        await mesh.worker(zone="us")
        first, second = await mesh.gateway("g1"), await mesh.gateway("g2")
        await asyncio.sleep(1)
        for number in range(3):
            await first.ask(request(start=number, residency=Residency(("eu",))))
        await second.ask(request(start=9, model="unknown"))
        await second.ask(request(start=10, deadline=1.0))
        await asyncio.sleep(0.1)
        assert [step.seq for step in first.replies] == [1, 2, 3]
        assert [step.seq for step in second.replies] == [1, 2]
        assert {failed.code for failed in first.refusals} == {"no_eligible_worker"}
        assert [failed.code for failed in second.refusals] == ["no_eligible_worker", "deadline_exceeded"]

    play(scenario)


def test_a_router_told_to_stop_takes_nothing_more_and_says_goodbye() -> None:
    async def scenario(mesh: Mesh) -> None:
        leaving, _staying = await mesh.router("r0"), await mesh.router("r1")
        worker, gateway = await mesh.worker(), await mesh.gateway()
        await asyncio.sleep(1)
        await leaving.leave()
        for number in range(10):
            await gateway.ask(request(start=number * 1000))
        await asyncio.sleep(0.1)
        assert [status.state for status in gateway.routers if status.id == "r0"][-1] == "draining"
        assert {got.placement.router for got in worker.requests if got.placement} == {"r1"}
        assert len(worker.requests) == 10

    play(scenario)


def test_the_last_router_that_leaves_is_missed_at_once() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, gateway = await mesh.router(), await mesh.gateway()
        await router.leave()
        await gateway.ask(request())
        await asyncio.sleep(0.1)
        assert gateway.unheard == 1

    play(scenario)


def test_an_outage_of_the_bus_is_survived() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, worker, gateway = await mesh.router(), await mesh.worker(), await mesh.gateway()
        await asyncio.sleep(1)
        mesh.broker.stop()
        worker.store(blocks(2))
        await asyncio.sleep(0.9)
        mesh.broker.start()
        await gateway.ask(request(start=9000))
        await asyncio.sleep(0.1)
        assert gateway.unheard == 1 and not worker.requests
        await asyncio.sleep(1.4)
        await gateway.ask(request())
        await asyncio.sleep(0.1)
        assert len(worker.requests) == 1
        assert router.view.index.blocks("w0") == named(worker.held)
        assert router.router.metrics.lost.labels("bus")._value.get() >= 1

    play(scenario)


def test_bytes_that_are_no_message_are_counted_and_change_nothing() -> None:
    async def scenario(mesh: Mesh) -> None:
        router, worker, gateway = await mesh.router(), await mesh.worker(), await mesh.gateway()
        await asyncio.sleep(1)
        worker.store(blocks(2))
        for subject in (subjects.generate("m"), subjects.worker_kv("w0"), subjects.status("worker", "w0"),
                        subjects.placed("r9")):
            for data in (b"", b"\xc1", b"\x81\xa4type\xa8generate", b"{}" * 9):
                await gateway.bus.publish(subject, data)
        forged = encode(KvEvents("w0", 99, 1, ()))
        await gateway.bus.publish(subjects.worker_kv("w1"), forged)
        await asyncio.sleep(0.1)
        assert mesh.broker.handler_errors == 0
        assert router.router.metrics.bad_messages._value.get() == 16
        assert router.view.index.blocks("w0") == named(worker.held)

    # a listening gateway would stumble over these bytes itself
    async def scene() -> None:
        async with Mesh().running() as mesh:
            original, mesh.gateway = mesh.gateway, _bare_gateway(mesh)  # type: ignore[method-assign]
            await scenario(mesh)
            mesh.gateway = original  # type: ignore[method-assign]

    run_virtual(scene(), timeout_s=60)


def test_a_prompt_too_large_for_the_bus_is_refused_not_lost() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.router()
        await mesh.worker()
        gateway = await mesh.gateway()
        await asyncio.sleep(1)
        ask = request(prompt_tokens=1000, deadline=2e6)
        mesh.broker.max_payload_bytes = len(encode(ask)) + 20  # the request fits, the placement beside it does not
        await gateway.ask(ask)
        await asyncio.sleep(0.1)
        (failed,) = gateway.refusals
        assert failed.code == "request_too_large"

    play(scenario)


def test_the_route_span_is_the_receipt_and_the_parent_of_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    configure = telemetry.configure_tracing
    monkeypatch.setattr(service.telemetry, "configure_tracing",
                        lambda kind, name, otlp: configure(kind, name, exporter=exporter))

    async def at_once(call: Callable[[], bool]) -> bool:
        return call()

    # no threads under virtual time
    monkeypatch.setattr(asyncio, "to_thread", at_once)

    async def scenario(mesh: Mesh) -> None:
        await mesh.router(otlp="http://127.0.0.1:4318")
        worker, _far, gateway = await mesh.worker(), await mesh.worker("w1", zone="us"), await mesh.gateway()
        await asyncio.sleep(1)
        await gateway.ask(request(residency=Residency(("local",))), {
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"})
        await asyncio.sleep(0.1)
        (span,) = exporter.get_finished_spans()
        assert span.name == "route" and span.attributes is not None and span.parent is not None
        assert f"{span.parent.span_id:x}" == "b7ad6b7169203331"
        assert span.attributes[names.WORKER] == "w0"
        weighed: Any = span.attributes[names.PLACEMENT_CANDIDATES]
        assert weighed[0].startswith("w0: ") and "prefill" in weighed[0]
        assert weighed[1] == "w1: zone us is not allowed"
        assert span.context is not None
        assert worker.headers[0]["traceparent"].split("-")[2] == f"{span.context.span_id:016x}"

    play(scenario)


@pytest.mark.parametrize("settings", [{"policy": "fastest"}, {"id": "Not An Id"}])
def test_a_setting_that_cannot_be_is_said_at_the_start(settings: dict[str, str]) -> None:
    async def scene() -> None:
        await service.serve(MemoryBus(MemoryBroker()), RouterSettings(**settings), LoopClock())  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"policy|id"):
        run_virtual(scene())


def _bare_gateway(mesh: Mesh) -> Callable[..., Awaitable[Any]]:
    async def bare() -> Any:
        class Bare:
            bus = MemoryBus(mesh.broker)

        return Bare()

    return bare



def test_a_burst_of_equal_prompts_computes_them_in_one_place() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.router()
        workers = [await mesh.worker(f"w{i}", max_running=64) for i in range(4)]
        gateway = await mesh.gateway()
        await asyncio.sleep(1)
        for number in range(24):  # before any event or status can tell
            await gateway.ask(request(prompt_tokens=1600, request_id=f"same{number}"))
        await asyncio.sleep(0.01)
        assert sorted(len(worker.requests) for worker in workers) == [0, 0, 0, 24]
        (home,) = [worker for worker in workers if worker.requests]
        promised = [got.placement for got in home.requests if got.placement]
        assert [(placement.cached_tokens, placement.certain_tokens) for placement in promised] == [
            (0, 0), *[(1584, 0)] * 23]
        # once its events have told, what was expected is certain
        await gateway.ask(request(prompt_tokens=1600, request_id="later"))
        await asyncio.sleep(0.01)
        (got,) = [got for worker in workers for got in worker.requests if got.request_id == "later"]
        assert got.placement is not None and got.placement.certain_tokens == got.placement.cached_tokens

    play(scenario)
