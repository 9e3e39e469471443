"""A drafter on the bus: proposals where something repeats, silence elsewhere, and nobody depends on it (law 2)."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from msgspec.structs import replace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from drafter import service
from drafter.drafting import Ask, Audience, Continuation, Key, Stream
from drafter.suffix import SuffixDraftsman
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
from shared.tokens import digest, pack, unpack
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
            assert len(drafter.draftsman.recent) <= 128
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


def test_a_proposal_says_which_text_it_is_for_how_sure_it_is_and_what_it_cost() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker(epoch=7)
        text = LOOP * 4
        await worker.says(opened(text))
        await worker.says(commit(20, LOOP[:2]))
        (drafts,) = worker.drafts[-1:]
        assert drafts.worker_epoch == 7 and drafts.seconds >= 0.0
        (proposal,) = drafts.proposals
        assert proposal.digest == digest(pack([*text, *LOOP[:2]]))
        assert len(proposal.confidence) == len(unpack(proposal.tokens))
        assert min(proposal.confidence) > 128

    play(scenario)


def test_a_drafter_whose_text_is_not_the_workers_says_nothing_and_has_it_opened_again() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(LOOP * 4))
        epoch = stage.statuses[-1].epoch
        worker.drafts.clear()
        await worker.says(Commit("s", 1, 20, pack(LOOP[:1]), digest(pack([*LOOP * 3, 1, 2, 3, 4, 5]))))
        await worker.says(Commit("s", 1, 21, pack(LOOP[1:2])))
        await asyncio.sleep(0.6)
        assert worker.drafts == [] and stage.statuses[-1].epoch == epoch + 1
        await worker.says(opened(LOOP * 4))
        assert len(worker.proposals) == 1

    play(scenario)


def test_the_later_answers_come_the_longer_they_are() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened(LOOP * 12))
        for at, lead in ((60, 0), (61, 20), (62, 10**6)):
            told = replace(worker.tell(commit(at, [LOOP[at % 5]])), lead_tokens=lead)
            await worker.bus.publish(subjects.drafter_follow("d0"), encode(told))
            await asyncio.sleep(0.01)
        lengths = [len(unpack(proposal.tokens)) for proposal in worker.proposals[-3:]]
        assert lengths[0] == 18 and lengths[1] == 38
        assert lengths[1] < lengths[2] <= 256

    play(scenario)


def test_a_predicted_answer_is_proposed_before_anything_was_said() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened([1, 2, 3], prediction=pack(ANSWER)))
        (proposal,) = worker.proposals
        tokens = unpack(proposal.tokens)
        assert tokens and tokens == ANSWER[:len(tokens)]

    play(scenario)


FORK = [1, 2, 3, 4, 50, 51, 52, 53]
OTHER = [1, 2, 3, 4, 60, 61, 62, 63]


@pytest.mark.parametrize(("most", "some"), [(4, True), (0, False)])
def test_outcomes_of_the_step_under_way_are_prepared_for_as_far_as_is_allowed(most: int, some: bool) -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        await worker.says(opened([9, *FORK, 8, *FORK, 7, *OTHER, 6, *FORK, 5, 1, 2, 3]))
        conditions = [unpack(proposal.assumed) for proposal in worker.proposals if proposal.assumed]
        assert (conditions == [[4, 60]]) is some
        assert {proposal.base_length for proposal in worker.proposals} == {worker.proposals[0].base_length}

    play(scenario, max_branches=most)


class Slow:
    """A draftsman in a thread that answers when it is let."""

    kind, vocabulary, threaded, behind = "slow", "abcd", True, ()

    def __init__(self) -> None:
        self.may = threading.Event()
        self.asked = threading.Event()
        self.texts: dict[Key, list[int]] = {}

    def open(self, key: Key, stream: Stream) -> None:
        self.texts[key] = list(stream.tokens)

    def advance(self, key: Key, base: int, tokens: Sequence[int]) -> None:
        assert len(self.texts[key]) == base
        self.texts[key] += tokens

    def close(self, key: Key, audience: Audience | None) -> None:
        del self.texts[key]

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        self.asked.set()
        assert self.may.wait(10.0)
        return [Continuation(ask.key, len(self.texts[ask.key]), (), [7, 8, 9], [0.9] * 3) for ask in asks]


async def test_a_draftsman_in_a_thread_keeps_nobody_waiting_and_what_came_too_late_is_not_said(
        monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    monkeypatch.setattr(service.kinds, "draftsman_of", lambda settings: slow)
    stage = Stage()
    async with stage.drafting(heartbeat_s=0.01), asyncio.timeout(20.0):
        worker = await stage.worker()
        await worker.says(opened([1], "late"), opened([1], "fits"), opened([1], "over"))
        await asyncio.to_thread(slow.asked.wait, 10.0)
        beats = len(stage.statuses)
        # the service goes on hearing and telling
        await worker.says(commit(1, [5], "late"), commit(1, [7], "fits"), closed("over"))
        while len(stage.statuses) < beats + 2:
            await asyncio.sleep(0.001)
        assert stage.statuses[-1].vocabulary == "abcd" and not worker.drafts
        slow.may.set()
        while len(worker.drafts) < 2:
            await asyncio.sleep(0.001)
    proposed = [[(proposal.request_id, proposal.base_length, unpack(proposal.tokens)) for proposal in drafts.proposals]
                for drafts in worker.drafts]
    # what was said of a text that went on as expected still holds; the others are another text now, or over
    assert proposed == [[("fits", 1, [7, 8, 9])], [("late", 2, [7, 8, 9]), ("fits", 2, [7, 8, 9])]]


def test_a_long_prompt_is_taken_in_piece_by_piece_while_other_streams_are_answered() -> None:
    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        long = [*range(100, 20_100), *LOOP * 4]
        await worker.bus.publish(subjects.drafter_follow("d0"), encode(worker.tell(opened(long, "long"))))
        await worker.bus.publish(subjects.drafter_follow("d0"), encode(worker.tell(opened(LOOP * 4, "short"))))
        await asyncio.sleep(0.01)
        assert [proposal.request_id for proposal in worker.proposals] == ["short", "long"]
        # and then there is nothing to do
        await asyncio.sleep(1.0)
        assert len(worker.proposals) == 2

    play(scenario)


class Fragile(SuffixDraftsman):
    """Fails whenever it is asked for a stream of this name."""

    def __init__(self, fails_for: str) -> None:
        super().__init__()
        self.fails_for = fails_for
        self.failures = 0

    def propose(self, asks: Sequence[Ask], budget_s: float) -> list[Continuation]:
        if any(ask.key.request_id == self.fails_for for ask in asks):
            self.failures += 1
            raise RuntimeError("token id 310 lies outside 0..255")
        return super().propose(asks, budget_s)


def test_a_draftsman_that_fails_loses_its_streams_and_the_drafter_asks_for_them_again(
        monkeypatch: pytest.MonkeyPatch) -> None:
    draftsman = Fragile("bad")
    monkeypatch.setattr(service.kinds, "draftsman_of", lambda settings: draftsman)

    async def scenario(stage: Stage) -> None:
        worker = await stage.worker()
        good = opened([*LOOP, *LOOP, *LOOP[:2]])
        await worker.says(good)
        before, said = stage.statuses[-1].epoch, len(worker.proposals)
        assert said
        await worker.says(opened(LOOP, "bad"))
        await asyncio.sleep(1.1)
        assert not stage.task.done()
        assert (stage.statuses[-1].epoch, stage.statuses[-1].following) == (before + 1, 0)
        for _ in range(3):
            # as a worker does that hears of another epoch
            await worker.says(good, opened(LOOP, "bad"))
            await asyncio.sleep(5.1)
        assert draftsman.failures == 4
        assert stage.statuses[-1].epoch == before + 4
        await worker.says(good)
        assert len(worker.proposals) > said

    play(scenario)
