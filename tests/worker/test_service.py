"""A worker as the rest of the mesh meets it: on the bus, under virtual time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec.structs import replace

from shared import subjects
from shared.blocks import split_hashes
from shared.clock import LoopClock
from shared.memory_bus import MemoryBroker, MemoryBus
from shared.messages import (
    Accepted,
    Cancel,
    Close,
    Commit,
    DrafterStatus,
    Drafts,
    Failed,
    Finished,
    Follow,
    GatewayStatus,
    KvEvents,
    KvSnapshot,
    Open,
    Proposal,
    Residency,
    SnapshotRequest,
    Stored,
    Tokens,
    encode,
)
from shared.settings import WorkerSettings
from shared.tokens import digest, pack, unpack
from shared.vocabulary import Vocabulary
from tests.virtual_time import run_virtual
from tests.worker.builders import BLOCK, VOCABULARY, make_scheduler, mock_decoder, plain, request
from tests.worker.mesh import WALL_S, Mesh, PoisonedDecoder
from worker.draft_wait import DraftWait
from worker.engine import Engine
from worker.events import Advanced, Ended, Started
from worker.following import Following
from worker.outbox import Outgoing
from worker.service import serve

DEADLINE = WALL_S + 1000.0


def play(scenario: Callable[[Mesh], Awaitable[None]], mesh: Mesh | None = None, **settings: object) -> Mesh:
    """Run a scenario around one worker; the mesh as it was when the worker had drained."""
    async def run() -> Mesh:
        world = mesh or Mesh(**settings)  # type: ignore[arg-type]
        async with world:
            await scenario(world)
        return world
    return run_virtual(run(), timeout_s=600)


def test_a_request_is_accepted_streamed_and_finished_in_order() -> None:
    one = request(deadline=DEADLINE, max_tokens=10)

    async def scenario(mesh: Mesh) -> None:
        await mesh.send(one)
        end = await mesh.ended("r")
        assert isinstance(end, Finished)
        assert (end.reason, end.worker, end.prompt_tokens, end.completion_tokens) == ("length", "w1", 3, 10)
        assert end.decode_s > 9 * 0.01 > end.prefill_s > 0.0

    mesh = play(scenario)
    kinds = [type(reply) for reply in mesh.replies]
    assert kinds == [Accepted, *[Tokens] * 10, Finished]
    assert [reply.index for reply in mesh.replies if isinstance(reply, Tokens)] == list(range(10))
    assert mesh.stream("r") == plain(one)
    assert [batch.seq for batch in mesh.batches] == list(range(1, len(mesh.batches) + 1))


def test_streams_of_one_gateway_share_a_message_per_step() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(*[request(f"r{number}", [number], deadline=DEADLINE, max_tokens=5) for number in range(20)])
        for number in range(20):
            await mesh.ended(f"r{number}")

    mesh = play(scenario)
    assert len(mesh.batches) <= 7
    for number in range(20):
        assert mesh.stream(f"r{number}") == plain(request(prompt=[number], max_tokens=5))


def test_a_cancel_ends_the_stream_within_a_step() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(request(deadline=DEADLINE, max_tokens=400))
        await mesh.until(lambda: len(mesh.stream("r")) >= 3)
        sent_at, had = mesh.clock.now(), len(mesh.stream("r"))
        await mesh.send(Cancel("r", 1))
        end = await mesh.ended("r")
        assert isinstance(end, Finished) and end.reason == "cancelled"
        assert len(mesh.stream("r")) <= had + 2
        assert mesh.clock.now() - sent_at < 2 * 0.0102
        await asyncio.sleep(1.0)
        assert mesh.statuses[-1].running == mesh.statuses[-1].blocks_used == 0

    play(scenario)


def test_a_cancel_before_its_request_and_a_duplicate_request_leave_one_last_word() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(Cancel("early", 1), request("early", deadline=DEADLINE))
        await mesh.send(request("twice", deadline=DEADLINE), request("twice", deadline=DEADLINE))
        await mesh.ended("early")
        await mesh.ended("twice")
        await mesh.send(request("twice", deadline=DEADLINE))
        await asyncio.sleep(1.0)

    mesh = play(scenario)
    assert len(mesh.ends("early")) == len(mesh.ends("twice")) == 1
    assert mesh.stream("early") == []
    assert mesh.stream("twice") == plain(request())


def test_a_resubmission_goes_on_exactly_where_the_stream_was() -> None:
    one = request(deadline=DEADLINE, max_tokens=20)
    whole = plain(one)

    async def scenario(mesh: Mesh) -> None:
        await mesh.send(replace(one, attempt=2, generated=pack(whole[:7])))
        end = await mesh.ended("r", 2)
        assert isinstance(end, Finished) and end.completion_tokens == 20

    mesh = play(scenario)
    assert mesh.stream("r", 2) == whole[7:]
    assert next(reply.index for reply in mesh.replies if isinstance(reply, Tokens)) == 7


def test_a_poisonous_request_dies_alone() -> None:
    decoder = PoisonedDecoder(blocks=64, block_size_tokens=BLOCK, vocabulary_size=VOCABULARY, context_length=512)

    async def scenario(mesh: Mesh) -> None:
        names = [f"r{number}" for number in range(4)]
        await mesh.send(*[request(name, [ord(name[1])], deadline=DEADLINE, max_tokens=20) for name in names])
        await mesh.until(lambda: len(mesh.stream("r0")) > 3)
        await mesh.send(request("poison", [13], deadline=DEADLINE))
        end = await mesh.ended("poison")
        assert isinstance(end, Failed)
        assert (end.code, end.retryable) == ("worker_failed", False)
        for name in names:
            assert isinstance(await mesh.ended(name), Finished)
            assert mesh.stream(name) == plain(request(prompt=[ord(name[1])], max_tokens=20))

    async def run() -> None:
        async with Mesh(decoder) as mesh:
            await scenario(mesh)
    run_virtual(run())


def test_a_dead_device_hands_its_streams_back_and_the_worker_lives() -> None:
    async def run() -> None:
        decoder = PoisonedDecoder(blocks=64, block_size_tokens=BLOCK, vocabulary_size=VOCABULARY, context_length=512)
        async with Mesh(decoder) as mesh:
            await mesh.send(*[request(name, deadline=DEADLINE, max_tokens=50) for name in "ab"])
            await mesh.until(lambda: len(mesh.stream("b")) > 3)
            decoder.dead = True
            for name in "ab":
                end = await mesh.ended(name)
                assert isinstance(end, Failed) and end.retryable
            decoder.dead = False
            await mesh.send(request("c", deadline=DEADLINE))
            assert isinstance(await mesh.ended("c"), Finished)
    run_virtual(run())


def test_draining_says_so_first_then_lets_streams_end_and_refuses_new_ones() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(request("running", deadline=DEADLINE, max_tokens=50),
                        request("waiting", deadline=DEADLINE, max_tokens=50))
        await mesh.until(lambda: mesh.stream("running"))
        mesh.serving.cancel()
        await mesh.until(lambda: mesh.statuses[-1].state == "draining")
        await mesh.send(request("late", deadline=DEADLINE))
        late = await mesh.ended("late")
        assert isinstance(late, Failed) and (late.code, late.retryable) == ("overloaded", True)
        waiting = await mesh.ended("waiting")
        assert isinstance(waiting, Failed) and waiting.retryable
        assert isinstance(await mesh.ended("running"), Finished)

    mesh = play(scenario, max_running=1)
    assert mesh.stream("running") == plain(request(max_tokens=50))
    assert mesh.stream("waiting") == []


def test_a_drain_that_takes_too_long_hands_the_rest_back_to_be_continued() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(request(deadline=DEADLINE, max_tokens=300))
        await mesh.until(lambda: mesh.stream("r"))
        started = mesh.clock.now()
        mesh.serving.cancel()
        end = await mesh.ended("r")
        assert isinstance(end, Failed) and end.retryable
        assert 0.5 <= mesh.clock.now() - started < 0.6

    mesh = play(scenario, drain_s=0.5)
    got = mesh.stream("r")
    assert 0 < len(got) < 300
    assert got == plain(request(max_tokens=300))[:len(got)]


def test_a_request_outside_its_residency_is_refused_and_never_computed() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(request("out", deadline=DEADLINE, residency=Residency(("us",))),
                        request("in", deadline=DEADLINE, residency=Residency(("eu",))))
        end = await mesh.ended("out")
        assert isinstance(end, Failed)
        assert (end.code, end.retryable) == ("no_eligible_worker", True)
        assert isinstance(await mesh.ended("in"), Finished)

    mesh = play(scenario, zone="eu-north1")
    assert not any(isinstance(reply, Accepted) and reply.request_id == "out" for reply in mesh.replies)


def test_a_worker_is_not_reached_by_what_was_meant_for_one_of_its_name_in_another_zone() -> None:
    async def scenario(mesh: Mesh) -> None:
        unheard: list[str] = []
        secret = request("secret", deadline=DEADLINE, residency=Residency(("eu",)))
        await mesh.bus.publish(subjects.worker_generate("w1", "eu"), encode(secret), None, lambda: unheard.append("eu"))
        await mesh.bus.publish(subjects.worker_drafts("w1", "eu"), encode(Drafts("d1", 1, ())), None,
                               lambda: unheard.append("drafts"))
        here = request("here", deadline=DEADLINE, residency=Residency(("us",)))
        await mesh.bus.publish(subjects.worker_generate("w1", "us-east1"), encode(here))
        assert isinstance(await mesh.ended("here"), Finished)
        assert unheard == ["eu", "drafts"]

    mesh = play(scenario, zone="us-east1")
    assert {reply.request_id for reply in mesh.replies} == {"here"}


def test_a_worker_that_came_back_with_another_model_computes_nothing_for_the_one_before() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(request("other", deadline=DEADLINE, model="n"), request("own", deadline=DEADLINE))
        end = await mesh.ended("other")
        assert isinstance(end, Failed)
        assert (end.code, end.retryable) == ("no_eligible_worker", True)
        assert isinstance(await mesh.ended("own"), Finished)

    assert not play(scenario).stream("other")


@pytest.mark.parametrize("zone", ["", "eu north", "eu.north", "eu-"])
def test_a_worker_does_not_start_in_what_is_no_zone(zone: str) -> None:
    async def start() -> None:
        await serve(MemoryBus(MemoryBroker()), WorkerSettings(id="w1", engine="mock", zone=zone), LoopClock())

    with pytest.raises(ValueError, match="is no zone"):
        run_virtual(start())


def test_a_late_word_of_a_drafters_last_life_opens_nothing_to_the_zone_it_was_in() -> None:
    following = Following("w1", 1, "eu", "", 8, 2.0)
    following.hear(DrafterStatus("d1", 2, zone="us"), 0.0)
    following.hear(DrafterStatus("d1", 1, zone="eu"), 0.1)
    assert following.chosen is not None and following.chosen.zone == "us"
    following.hear(DrafterStatus("d1", 1, zone="eu"), 3.0)  # nobody heard the other for long: a clock was set back
    following.hear(DrafterStatus("d1", 1, zone="eu"), 3.1)
    assert following.chosen.zone == "eu"


def test_an_expired_deadline_fails_on_arrival() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(request(deadline=WALL_S - 1.0))
        end = await mesh.ended("r")
        assert isinstance(end, Failed) and end.code == "deadline_exceeded"

    play(scenario)


def test_requests_of_a_gateway_that_fell_silent_are_dropped() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(GatewayStatus("g1", 1), request(deadline=DEADLINE, max_tokens=480))
        await mesh.until(lambda: mesh.statuses[-1].running)
        await mesh.until(lambda: not mesh.statuses[-1].running)
        assert mesh.clock.now() < 3.0

    assert len(play(scenario, silence_s=0.1).stream("r")) < 480


def test_a_gateway_that_dies_before_its_first_heartbeat_falls_silent_too() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(request(deadline=DEADLINE, max_tokens=480))
        await mesh.until(lambda: mesh.statuses[-1].running)
        await mesh.until(lambda: not mesh.statuses[-1].running)
        assert mesh.clock.now() < 3.0

    assert len(play(scenario, silence_s=0.1).stream("r")) < 480


def test_routers_learn_every_block_once_and_a_snapshot_says_the_same() -> None:
    async def scenario(mesh: Mesh) -> None:
        assert mesh.kv == [KvSnapshot("w1", mesh.statuses[-1].epoch, 0, b"")]
        await mesh.send(request(prompt=list(range(20)), deadline=DEADLINE, max_tokens=13))
        await mesh.ended("r")
        await asyncio.sleep(0.1)
        await mesh.send(SnapshotRequest("x"), SnapshotRequest("y"))
        await mesh.until(lambda: isinstance(mesh.kv[-1], KvSnapshot) and len(mesh.kv) > 1)
        await asyncio.sleep(1.0)
        assert mesh.statuses[-1].kv_seq == mesh.kv[-1].seq

    mesh = play(scenario)
    *events, snapshot = mesh.kv[1:]
    assert isinstance(snapshot, KvSnapshot) and (snapshot.part, snapshot.parts) == (0, 1)
    assert [message.seq for message in events] == list(range(1, snapshot.seq + 1))
    stored: list[bytes] = []
    for message in events:
        assert isinstance(message, KvEvents)
        for event in message.events:
            assert isinstance(event, Stored)
            stored += split_hashes(event.hashes)
    assert len(stored) == len(set(stored)) == 8
    assert set(split_hashes(snapshot.hashes)) == set(stored)


def oracle(mesh: Mesh, streams: dict[str, list[int]], lie: bool = False) -> Callable[[Follow], None]:
    """A drafter that knows the future, or pretends to."""
    def propose(follow: Follow) -> None:
        proposals = []
        for event in follow.events:
            if isinstance(event, Close):
                continue
            base = (event.base_length if isinstance(event, Commit) else 0) + len(event.tokens) // 4
            done = base - 3
            tokens = streams[event.request_id][done:done + 8]
            if lie:
                tokens[1:] = [(token + 1) % VOCABULARY for token in tokens[1:]]
            if tokens:
                proposals.append(Proposal(event.request_id, event.attempt, base, pack(tokens[1:]), pack(tokens[:1])))
        tasks.append(asyncio.ensure_future(mesh.send(Drafts("d1", 1, tuple(proposals)))))
    tasks: list[asyncio.Future[None]] = []
    return propose


def test_drafts_make_a_stream_faster_and_lies_change_nothing() -> None:
    one = request(deadline=DEADLINE, max_tokens=100)
    seconds = {}
    for lie in (False, True):
        async def scenario(mesh: Mesh, lie: bool = lie) -> None:
            mesh.on_follow = oracle(mesh, {"r": plain(one)}, lie)
            await mesh.send(mesh.drafter())
            await mesh.send(one)
            end = await mesh.ended("r")
            seconds[lie] = mesh.clock.now()
            assert isinstance(end, Finished)
            assert end.drafter == "d1" and end.draft_tokens > 0
            assert (end.accepted_draft_tokens < 0.5 * end.draft_tokens) is lie
            assert mesh.stream("r") == plain(one)

        mesh = play(scenario)
        last = mesh.follows[-1].events[-1]
        assert isinstance(last, Close)
        assert mesh.statuses[-1].drafter == "d1"
    assert seconds[False] < 0.6 * seconds[True]


def test_a_drafter_hears_a_stream_without_gaps_and_from_its_start_after_a_restart() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(mesh.drafter())
        await mesh.send(request(deadline=DEADLINE, max_tokens=60))
        await mesh.until(lambda: len(mesh.stream("r")) > 10)
        await mesh.send(mesh.drafter(epoch=2))
        await mesh.ended("r")
        await mesh.until(lambda: isinstance(mesh.follows[-1].events[-1], Close))

    mesh = play(scenario)
    assert [follow.seq for follow in mesh.follows] == list(range(1, len(mesh.follows) + 1))
    heard: list[int] = []
    opens = 0
    for follow in mesh.follows:
        for event in follow.events:
            if isinstance(event, Open):
                opens += 1
                heard = unpack(event.tokens)
            elif isinstance(event, Commit):
                assert event.base_length == len(heard)
                heard += unpack(event.tokens)
    assert opens == 2
    assert heard == [5, 6, 7, *plain(request(max_tokens=60))]


def test_a_drafter_whose_heartbeats_were_lost_is_told_that_its_streams_are_over() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(mesh.drafter(), request(deadline=DEADLINE, max_tokens=400))
        await mesh.until(lambda: any(isinstance(event, Commit) for follow in mesh.follows for event in follow.events))
        await mesh.until(lambda: not mesh.statuses[-1].drafter)
        assert mesh.statuses[-1].running

    mesh = play(scenario, silence_s=0.5)
    assert [type(event) for event in mesh.follows[-1].events] == [Close]


def test_a_stream_that_ends_while_its_drafter_asks_for_all_again_is_closed_there() -> None:
    following = Following("w1", 1, "", "", 8, 2.0)
    scheduler = make_scheduler(mock_decoder())
    sequence = scheduler.add(request(), 0.0, DEADLINE)
    assert sequence is not None
    following.hear(DrafterStatus("d1", 1), 0.0)
    following.follow([], [])
    opened = following.follow([Started(sequence)], [sequence])
    assert [type(event) for event in opened[0].message.events] == [Open]  # type: ignore[attr-defined]
    following.hear(DrafterStatus("d1", 2), 1.0)
    end = Finished("r", 1, "stop")
    (closed,) = following.follow([Ended(sequence, end)], [])
    assert [type(event) for event in closed.message.events] == [Close]  # type: ignore[attr-defined]


def test_a_drafter_is_told_what_it_missed_while_drafts_could_not_pay() -> None:
    def told(outgoing: list[Outgoing]) -> list[object]:
        return [event for subject, message in outgoing for event in message.events]  # type: ignore[attr-defined]

    prompt = digest(pack([5, 6, 7]))
    following = Following("w1", 1, "", "", 8, 2.0)
    scheduler = make_scheduler(mock_decoder())
    known, unknown, over, early = (scheduler.add(request(name), 0.0, DEADLINE) for name in "abcd")
    assert known and unknown and over and early
    scheduler.plan(0.0)
    following.hear(DrafterStatus("d1", 1), 0.0)
    following.follow([Started(known), Started(over)], [known, over])
    following.follow([], [known, over])
    for sequence in (known, unknown, over):
        sequence.tokens += [8, 9]
    news = [Started(unknown), *(Advanced(sequence, 0, [8, 9]) for sequence in (known, unknown, over))]
    assert told(following.follow(news, [known, unknown, over], pays=False)) == []
    ends = [Ended(sequence, Finished(sequence.key.request_id, 1, "stop")) for sequence in (over, early)]
    assert told(following.follow(ends, [known, unknown], pays=False)) == [Commit("c", 1, 3, pack([8, 9]), prompt),
                                                                         Close("c", 1)]
    known.tokens.append(10)
    commit, opened = told(following.follow([Advanced(known, 2, [10])], [known, unknown]))
    assert commit == Commit("a", 1, 3, pack([8, 9, 10]), prompt)
    assert isinstance(opened, Open) and unpack(opened.tokens) == [5, 6, 7, 8, 9]
    known.tokens.append(11)
    assert told(following.follow([Advanced(known, 3, [11])], [known, unknown])) == [
        Commit("a", 1, 6, pack([11]), digest(pack([5, 6, 7, 8, 9, 10])))]


def test_a_drafter_never_hears_of_a_stream_that_its_zone_may_not_see() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(mesh.drafter(zone="us"))
        await mesh.send(request("secret", deadline=DEADLINE, residency=Residency(("eu",))),
                        request("open", deadline=DEADLINE))
        await mesh.ended("secret")
        await mesh.ended("open")
        await mesh.send(mesh.drafter(zone="us", epoch=2))
        await mesh.send(request("more", deadline=DEADLINE, residency=Residency(("eu",))))
        await mesh.ended("more")
        await asyncio.sleep(0.1)

    mesh = play(scenario, zone="eu")
    assert {event.request_id for follow in mesh.follows for event in follow.events} == {"open"}


def test_a_bus_outage_loses_replies_and_leaves_a_gap_but_the_worker_goes_on() -> None:
    one = request(deadline=DEADLINE, max_tokens=60)

    async def scenario(mesh: Mesh) -> None:
        await mesh.send(one)
        await mesh.until(lambda: len(mesh.stream("r")) > 5)
        mesh.broker.stop()
        await asyncio.sleep(0.1)
        mesh.broker.start()
        assert isinstance(await mesh.ended("r"), Finished)

    mesh = play(scenario)
    numbers = [batch.seq for batch in mesh.batches]
    assert numbers == sorted(set(numbers)) and len(numbers) < numbers[-1]
    assert mesh.statuses[-1].replies_sent == {"g1": numbers[-1]}


def test_bytes_that_are_no_message_are_dropped() -> None:
    async def scenario(mesh: Mesh) -> None:
        for subject in (subjects.worker_generate("w1"), subjects.worker_cancel("w1"), subjects.worker_drafts("w1"),
                        subjects.worker_kv_request("w1"), subjects.status("drafter", "d1")):
            await mesh.bus.publish(subject, b"\xc1 no message")
        await mesh.send(request(deadline=DEADLINE))
        await mesh.ended("r")
        assert mesh.broker.handler_errors == 0

    play(scenario)


def test_an_idle_worker_does_nothing_but_beat() -> None:
    async def scenario(mesh: Mesh) -> None:
        await asyncio.sleep(10.0)
        before = mesh.broker.published
        await asyncio.sleep(10.0)
        assert mesh.broker.published - before == 20
        assert mesh.statuses[-1].steps_total == 0

    play(scenario)


def test_the_status_tells_what_steps_cost() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.send(*[request(f"r{number}", [number] * 30, deadline=DEADLINE, max_tokens=10 + 5 * number)
                          for number in range(8)])
        for number in range(8):
            await mesh.ended(f"r{number}")
        await mesh.until(lambda: mesh.statuses[-1].tokens_total == sum(10 + 5 * number for number in range(8)))
        status = mesh.statuses[-1]
        assert abs(status.step_base_s - 0.02) < 0.004
        assert abs(status.step_row_s - 0.001) < 0.0004
        assert status.prefill_tok_s > 0 and status.decode_tok_s > 0

    play(scenario, mock_step_s=0.02, mock_row_s=0.001, mock_token_s=0.0005)


def stream_with_drafter(answer_s: float | None, **settings: object) -> tuple[float, int]:
    """Seconds for a long stream whose drafter is right and answers after `answer_s` (None: never); and steps."""
    one = request(deadline=DEADLINE, max_tokens=1000)
    whole = plain(one, mock_decoder(300, 1200))
    result: list[tuple[float, int]] = []

    async def scenario(mesh: Mesh) -> None:
        answer = oracle(mesh, {"r": whole})
        loop = asyncio.get_running_loop()
        if answer_s is not None:
            mesh.on_follow = lambda follow: loop.call_later(answer_s, answer, follow) and None
        async def beat() -> None:
            while True:
                await mesh.send(mesh.drafter())
                await asyncio.sleep(0.5)
        beating = asyncio.ensure_future(beat())
        await mesh.send(one)
        end = await mesh.ended("r")
        beating.cancel()
        assert isinstance(end, Finished)
        assert mesh.stream("r") == whole
        await mesh.until(lambda: mesh.statuses[-1].tokens_total == 1000)
        result.append((end.decode_s, mesh.statuses[-1].steps_total))

    play(scenario, Mesh(mock_decoder(300, 1200), **settings))
    return result[0]


def test_a_step_waits_for_a_quick_drafter_and_not_for_a_slow_or_silent_one() -> None:
    alone_s, alone_steps = stream_with_drafter(None)
    quick_s, quick_steps = stream_with_drafter(0.001)
    slow_s, _ = stream_with_drafter(0.5)
    assert alone_steps == 1000
    assert quick_steps < 1000 / 6
    assert quick_s < alone_s / 5
    assert slow_s < 1.02 * alone_s


def test_a_drafter_that_falls_silent_in_mid_stream_holds_one_step_back_for_less_than_its_wait(
        monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Engine] = []
    waits: list[float] = []

    class Waiting(DraftWait):
        def seconds(self, streams: int, step_s: float) -> float:
            self.waiting = True
            waits.append(super().seconds(streams, step_s))
            return waits[-1]

    class Seen(Engine):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.draft_wait = Waiting()
            self.draft_wait.waiting = True
            engines.append(self)

    monkeypatch.setattr("worker.service.Engine", Seen)
    one = request(deadline=DEADLINE, max_tokens=200)
    seen: list[tuple[int, float, float]] = []

    async def scenario(mesh: Mesh) -> None:
        answer = oracle(mesh, {"r": plain(one)})
        loop = asyncio.get_running_loop()
        (engine,) = engines

        def while_it_lives(follow: Follow) -> None:
            if len(mesh.stream("r")) < 100:
                loop.call_later(0.004, answer, follow)
            elif not seen:
                seen.append((engine.holds, engine.held_s, waits[-1]))

        mesh.on_follow = while_it_lives
        await mesh.send(mesh.drafter())
        await mesh.send(one)
        await mesh.ended("r")

    play(scenario)
    (engine,) = engines
    (holds, held_s, wait_s), = seen
    assert holds > 5
    assert engine.holds == holds + 1
    assert 0.7 * wait_s < engine.held_s - held_s < wait_s


def stream_with_priced_drafter(usd_per_hour: float, seconds_each: float) -> tuple[Finished, Mesh]:
    """A long stream on a worker of a dollar an hour, with a drafter that is right and says what time it took."""
    one = request(deadline=DEADLINE, max_tokens=6000)
    whole = plain(one, mock_decoder(2000, 8000))
    ends: list[Finished] = []

    async def scenario(mesh: Mesh) -> None:
        def answer(follow: Follow) -> None:
            for event in follow.events:
                if isinstance(event, Commit | Open):
                    base = (event.base_length if isinstance(event, Commit) else 0) + len(event.tokens) // 4
                    tokens = whole[base - 3:base + 15]
                    drafts = Drafts("d1", 1, (Proposal("r", 1, base, pack(tokens)),), 0, seconds_each)
                    tasks.append(asyncio.ensure_future(mesh.send(drafts)))

        tasks: list[asyncio.Future[None]] = []
        mesh.on_follow = answer
        async def beat() -> None:
            while True:
                await mesh.send(mesh.drafter(price_usd_per_hour=usd_per_hour))
                await asyncio.sleep(0.5)
        beating = asyncio.ensure_future(beat())
        await mesh.send(one)
        end = await mesh.ended("r")
        beating.cancel()
        assert isinstance(end, Finished) and mesh.stream("r") == whole
        ends.append(end)
        await asyncio.sleep(1.0)

    mesh = play(scenario, Mesh(mock_decoder(2000, 8000), price_usd_per_hour=1.0))
    return ends[0], mesh


def test_a_drafter_that_costs_more_than_it_saves_is_left_alone_and_the_status_says_why() -> None:
    cheap, mesh = stream_with_priced_drafter(1.0, 0.001)
    assert {status.drafting for status in mesh.statuses if status.running} == {"on"}
    assert cheap.drafter == "d1" and cheap.drafter_s > 0.1
    assert cheap.drafter_usd == pytest.approx(cheap.drafter_s / 3600)
    assert cheap.draft_saved_s > 5 * cheap.decode_s
    dear, mesh = stream_with_priced_drafter(200.0, 0.001)
    assert "dear" in {status.drafting for status in mesh.statuses}
    assert dear.draft_tokens < 0.9 * cheap.draft_tokens


def test_a_worker_names_what_it_can_do_and_no_grammar_without_a_vocabulary() -> None:
    async def scenario(mesh: Mesh) -> None:
        await mesh.until(lambda: mesh.statuses[-1].state == "ready")
        assert mesh.statuses[-1].abilities == ("adjust", "logprobs", "embeddings")

    play(scenario)
    tokens = [bytes([byte]) for byte in range(97)] + [b"<|end|>"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("worker.service.vocabulary_file", lambda settings: Vocabulary("v", tokens, [97], [97]))

        async def with_words(mesh: Mesh) -> None:
            await mesh.until(lambda: mesh.statuses[-1].state == "ready")
            assert mesh.statuses[-1].abilities == ("adjust", "logprobs", "grammar", "embeddings")

        play(with_words)
