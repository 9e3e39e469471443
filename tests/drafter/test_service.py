"""A drafter on the bus: proposals where something repeats, silence elsewhere, and nobody depends on it (law 2)."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from drafter import service
from shared import subjects, telemetry
from shared import trace_names as names
from shared.clock import LoopClock
from shared.memory_bus import Faults, MemoryBroker, MemoryBus
from shared.messages import (
    Close,
    Commit,
    DrafterStatus,
    Drafts,
    Open,
    Proposal,
    WorkerStatus,
    decode,
    encode,
)
from shared.settings import DrafterSettings
from shared.tokens import unpack
from tests.drafter.builders import Teller, closed, commit, opened
from tests.virtual_time import run_virtual

LOOP = [11, 12, 13, 14, 15]


class Worker(Teller):
    """Tells a drafter of streams and keeps what it proposes."""

    def __init__(self, broker: MemoryBroker, name: str = "w0", epoch: int = 1, zone: str = "eu",
                 model: str = "m") -> None:
        super().__init__(name, epoch)
        self.bus = MemoryBus(broker)
        self.drafts: list[Drafts] = []
        self.running = 1
        self._status = WorkerStatus(name, epoch, model, zone=zone)

    async def start(self) -> None:
        await self.bus.subscribe(subjects.worker_drafts(self.worker),
                                 lambda delivery: self.drafts.append(decode(delivery.data, Drafts)))
        await self.say_status()

    async def say_status(self) -> None:
        status = replace(self._status, running=self.running)
        await self.bus.publish(subjects.status("worker", self.worker), encode(status))

    async def says(self, *events: Open | Commit | Close) -> None:
        await self.bus.publish(subjects.drafter_follow("d0"), encode(self.tell(*events)))
        await asyncio.sleep(0.01)

    @property
    def proposals(self) -> list[Proposal]:
        return [proposal for drafts in self.drafts for proposal in drafts.proposals]


class Stage:
    def __init__(self, faults: Faults | None = None, seed: int = 0) -> None:
        self.broker = MemoryBroker(faults, seed)
        self.statuses: list[DrafterStatus] = []
        self.bus = MemoryBus(self.broker)

    @asynccontextmanager
    async def drafting(self, **settings: object) -> AsyncIterator["Stage"]:
        listener = MemoryBus(self.broker)
        await listener.subscribe(subjects.status("drafter", "*"),
                                 lambda delivery: self.statuses.append(decode(delivery.data, DrafterStatus)))
        ready = asyncio.Event()
        self.task = asyncio.create_task(service.serve(
            self.bus, DrafterSettings(id="d0", **settings), LoopClock(1e6), ready))  # type: ignore[arg-type]
        await ready.wait()
        try:
            yield self
        finally:
            self.task.cancel()
            await asyncio.wait([self.task])
            if not self.task.cancelled():
                self.task.result()

    async def worker(self, *arguments: str | int, **fields: str) -> Worker:
        worker = Worker(self.broker, *arguments, **fields)  # type: ignore[arg-type]
        await worker.start()
        return worker


def play(scenario: Callable[[Stage], Awaitable[None]], **settings: object) -> None:
    async def scene() -> None:
        async with Stage().drafting(**settings) as stage:
            await scenario(stage)

    run_virtual(scene(), timeout_s=120)


def test_a_stream_that_repeats_itself_is_told_how_it_goes_on() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened([*LOOP, *LOOP, *LOOP[:2]]))
        (first,) = worker.proposals
        assert (first.request_id, first.attempt, first.base_length) == ("s", 1, 12)
        assert unpack(first.tokens)[:5] == [13, 14, 15, 11, 12]
        for at in range(12, 40):
            await worker.says(commit(at, [LOOP[at % 5]]))
        last = worker.proposals[-1]
        # long enough to still be of use a whole draft later
        assert unpack(last.tokens) == [LOOP[(last.base_length + i) % 5] for i in range(18)]

    play(scenario)


def test_a_stream_that_does_not_is_told_nothing() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(list(range(100))))
        for at in range(100, 150):
            await worker.says(commit(at, [at]))
        assert worker.drafts == []

    play(scenario)


def test_streams_of_one_step_are_answered_in_one_message() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(*(opened(LOOP * 3, name) for name in "abc"), opened([1, 2], "d"))
        (drafts,) = worker.drafts
        assert [proposal.request_id for proposal in drafts.proposals] == ["a", "b", "c"]
        assert drafts.drafter == "d0"

    play(scenario)


def test_what_piled_up_is_taken_in_before_anything_is_proposed() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(LOOP * 3))
        worker.drafts.clear()
        for at in range(15, 25):
            await worker.bus.publish(subjects.drafter_follow("d0"), encode(worker.tell(commit(at, [LOOP[at % 5]]))))
        await asyncio.sleep(0.01)
        assert [proposal.base_length for proposal in worker.proposals] == [25]

    play(scenario)


ANSWER = list(range(500, 560))


def test_a_tenants_finished_answers_help_its_next_streams_and_nobody_elses() -> None:
    async def scenario(stage: Stage) -> None:
        here, there, other_model = await stage.worker("w0"), await stage.worker("w1", 1, "us"), await stage.worker(
            "w2", 1, "eu", "another")
        await here.says(opened([1, 2, 3], tenant="acme"))
        await here.says(commit(3, ANSWER), closed())
        for worker, tenant in ((here, "rival"), (there, "acme"), (other_model, "acme")):
            await worker.says(opened([9, *ANSWER[:8]], "t", tenant=tenant))
            assert worker.drafts == [], (worker.worker, tenant)
        await here.says(opened([9, *ANSWER[:8]], "u", tenant="acme"))
        (proposal,) = here.proposals
        assert proposal.request_id == "u"
        assert unpack(proposal.tokens) == ANSWER[8:8 + len(unpack(proposal.tokens))] != []

    play(scenario)


def test_proposals_go_to_the_zone_that_the_stream_is_in_and_are_not_heard_elsewhere() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker(zone="us")
        there: list[Drafts] = []
        await worker.bus.subscribe(subjects.worker_drafts("w0", "eu"),
                                   lambda delivery: there.append(decode(delivery.data, Drafts)))
        told = replace(worker.tell(opened([*LOOP, *LOOP])), zone="eu")
        await worker.bus.publish(subjects.drafter_follow("d0", "eu-north1"), encode(told))
        await asyncio.sleep(0.01)
        assert there and not worker.drafts
        unheard: list[str] = []
        await worker.bus.publish(subjects.drafter_follow("d0", "us"), encode(told), None, lambda: unheard.append("us"))
        await asyncio.sleep(0.01)
        assert unheard == ["us"]

    play(scenario, zone="eu-north1")


def test_what_a_worker_said_in_its_last_life_is_not_shared_with_the_zone_it_came_back_in() -> None:
    async def scenario(stage: Stage) -> None:
        before = await stage.worker("w0", 1, zone="eu")
        await before.says(opened([*range(100, 140)], stream="a"))
        await stage.worker("w0", 2, zone="us")
        await before.says(closed(stream="a"))  # overtaken by its next life's status
        after = await stage.worker("w1", 1, zone="us")
        await after.says(opened([*range(100, 120)], stream="b"))
        assert after.proposals == []

    play(scenario)


def test_while_a_workers_zone_is_unknown_its_streams_share_nothing() -> None:
    async def scenario(stage: Stage) -> None:
        known, unknown = await stage.worker("w0"), Worker(stage.broker, "w1")
        await unknown.bus.subscribe(subjects.worker_drafts("w1"),
                                    lambda delivery: unknown.drafts.append(decode(delivery.data, Drafts)))
        await known.says(opened([1, 2, 3]), commit(3, ANSWER), closed())
        await unknown.says(opened([9, *ANSWER[:8]]))
        assert unknown.drafts == []
        await unknown.says(opened([*LOOP, *LOOP, *LOOP], "own"))
        assert len(unknown.proposals) == 1

    play(scenario)


def test_the_workers_limit_on_drafts_is_kept() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(LOOP * 9, "none", max_draft_tokens=0), opened(LOOP * 9, "two", max_draft_tokens=2),
                          opened(LOOP * 9, "less", max_draft_tokens=-1), opened(LOOP * 9, "many", max_draft_tokens=500))
        assert {proposal.request_id: len(proposal.tokens) // 4 for proposal in worker.proposals} == {
            "two": 6, "many": 18}

    play(scenario, max_draft_tokens=8)


def test_after_a_loss_the_drafter_asks_by_a_new_epoch_and_not_more_often_than_is_good() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(LOOP * 3))
        epoch = stage.statuses[-1].epoch
        worker.drafts.clear()
        worker.seq += 1
        for at in range(16, 36):
            await worker.says(commit(at, [LOOP[at % 5]]))
        assert worker.drafts == []
        await asyncio.sleep(0.6)
        assert stage.statuses[-1].epoch == epoch + 1
        for at in range(36, 46):
            await worker.says(commit(at, [1]))
            await asyncio.sleep(0.2)
        assert stage.statuses[-1].epoch == epoch + 1
        await worker.says(opened(LOOP * 3))
        assert worker.drafts[-1].epoch == epoch + 1

    play(scenario)


def test_streams_of_a_silent_worker_are_forgotten_and_those_of_one_that_lives_are_kept() -> None:
    async def scenario(stage: Stage) -> None:
        silent, alive = await stage.worker("w0"), await stage.worker("w1")
        await silent.says(opened([1, 2, 3]))
        await alive.says(opened([1, 2, 3]))
        for _ in range(10):
            await alive.say_status()
            await asyncio.sleep(0.5)
        assert stage.statuses[-1].following == 1

    play(scenario)


def test_a_stream_whose_close_was_lost_is_forgotten_when_its_worker_says_that_it_has_none() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened([1, 2, 3]))
        worker.running = 0
        for _ in range(10):
            await worker.say_status()
            await asyncio.sleep(0.5)
        assert (stage.statuses[-1].following, stage.statuses[-1].epoch) == (0, stage.statuses[0].epoch)
        worker.running = 1
        await worker.say_status()
        await worker.says(opened(LOOP * 3, "t"))
        assert worker.proposals[-1].request_id == "t"

    play(scenario)


def test_streams_of_a_worker_that_started_again_are_forgotten() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened([1, 2, 3]))
        await stage.worker("w0", 2)
        await asyncio.sleep(0.6)
        assert stage.statuses[-1].following == 0

    play(scenario)


def test_memory_stays_bounded_under_ten_thousand_streams() -> None:
    made: list[service.Drafter] = []

    class Seen(service.Drafter):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            made.append(self)

    async def scene() -> None:
        stage = Stage()
        async with stage.drafting(max_contexts=50):
            (drafter,) = made
            worker = await stage.worker()
            for number in range(0, 10_000, 100):
                tenant = f"t{number}"
                await worker.says(*(opened([number + i, 2, 3], f"s{number + i}", tenant=tenant) for i in range(100)))
                await worker.says(*(commit(3, list(range(20)), f"s{number + i}") for i in range(100)),
                                  *(closed(f"s{number + i}") for i in range(80)))
                assert len(drafter.contexts) <= 50
            assert drafter.contexts.tokens <= 50 * 23
            assert len(drafter.recent) <= 128
            assert len(drafter.contexts._evicted) <= 200

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service, "Drafter", Seen)
        run_virtual(scene(), timeout_s=300)


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_lost_a_proposal_is_for_a_text_the_worker_had(seed: int) -> None:
    rng = random.Random(seed)
    bad = Faults(delay_s=(0.0, 0.03), loss=0.1, duplication=0.1, reordering=0.2)

    async def scene() -> None:
        stage = Stage(bad, seed)
        async with stage.drafting():
            worker = await stage.worker()
            texts = {name: LOOP * 3 for name in "abc"}
            await worker.says(*(opened(tokens, name) for name, tokens in texts.items()))
            right = seen = 0
            for _ in range(300):
                name = rng.choice("abc")
                if rng.random() < 0.05:
                    await worker.says(opened(texts[name], name))
                new = [LOOP[(len(texts[name]) + i) % 5] for i in range(rng.randrange(1, 4))]
                await worker.says(commit(len(texts[name]), new, name))
                texts[name] = texts[name] + new
            await asyncio.sleep(0.1)
            for proposal in worker.proposals:
                assert proposal.base_length <= len(texts[proposal.request_id])
                tokens = unpack(proposal.tokens)
                truth = [LOOP[(proposal.base_length + i) % 5] for i in range(len(tokens))]
                seen += len(tokens)
                right += sum(token == real for token, real in zip(tokens, truth, strict=True))
            assert seen > 100 and right == seen
        assert stage.broker.handler_errors == 0

    run_virtual(scene(), timeout_s=120)


def test_garbage_is_counted_and_the_next_message_is_heard() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        for subject in (subjects.drafter_follow("d0"), subjects.status("worker", "w9")):
            for data in (b"", b"\xc1", b"{}" * 50, encode(commit(1, [2]))):
                await worker.bus.publish(subject, data)
        await worker.says(Open("odd", 1, b"12345"), Commit("odd", 1, 0, b"1"), opened([2**32 - 1] * 20, "sep"))
        await worker.says(opened(LOOP * 3))
        assert [proposal.request_id for proposal in worker.proposals] == ["s"]
        assert stage.broker.handler_errors == 0
        assert not stage.task.done()

    play(scenario)


def test_an_outage_of_the_bus_is_survived() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(LOOP * 3))
        stage.broker.stop()
        await asyncio.sleep(1.1)
        stage.broker.start()
        worker.drafts.clear()
        await worker.says(commit(15, [11]))
        assert len(worker.proposals) == 1

    play(scenario)


def test_a_drafter_that_leaves_says_so() -> None:
    async def scene() -> None:
        stage = Stage()
        async with stage.drafting():
            await asyncio.sleep(0.1)
            assert [status.state for status in stage.statuses] == ["ready"]
        await asyncio.sleep(0.1)
        assert stage.statuses[-1].state == "draining"

    run_virtual(scene())


def test_each_stream_leaves_one_span_under_its_own_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    configure = telemetry.configure_tracing
    monkeypatch.setattr(service.telemetry, "configure_tracing",
                        lambda kind, name, otlp: configure(kind, name, exporter=exporter))

    async def at_once(call: Callable[[], bool]) -> bool:
        return call()

    # no threads under virtual time
    monkeypatch.setattr(asyncio, "to_thread", at_once)

    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(LOOP * 4, traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"))
        await worker.says(commit(20, LOOP[:3]))
        await worker.says(commit(23, [99]))
        await worker.says(closed())
        (span,) = exporter.get_finished_spans()
        assert span.name == "draft" and span.parent is not None and span.attributes is not None
        assert f"{span.parent.span_id:x}" == "b7ad6b7169203331"
        assert span.attributes[names.DRAFT_ACCEPTED_TOKENS] == 3
        assert span.attributes[names.DRAFTER] == "d0" and span.attributes[names.WORKER] == "w0"

    play(scenario)


def test_a_kind_that_does_not_exist_is_said_at_the_start() -> None:
    async def scene() -> None:
        await service.serve(MemoryBus(MemoryBroker()), DrafterSettings(kind="oracle"), LoopClock())

    with pytest.raises(ValueError, match="oracle"):
        run_virtual(scene())
