"""Whatever happens to a scheduler, in whatever order: its books balance, its rules hold, every request ends once.

Requests of several tenants, gateways and priorities come, come twice, come as later attempts, are cancelled before,
with and after their arrival; gateways fall silent, steps raise, deadlines pass, blocks are lost; all of it with few
blocks, so that streams keep giving way to each other.
"""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from shared.errors import WorkerFailed
from shared.messages import Cancel, Failed, Finished, Generate, Proposal, Sampling
from shared.tokens import pack, unpack
from tests.worker.builders import BLOCK, FAR, Bench, mock_decoder, plain, request
from tests.worker.test_scheduler import offer_drafts
from worker.kv_blocks import Ownership
from worker.scheduler import PREFILL_SHARE
from worker.sequence import Key, Sequence
from worker.step import Step

prompts = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.integers(1, 40).map(lambda length: list(range(length))),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(0, 10), st.integers(1, 3), st.integers(20, 60), st.sampled_from([0, 4]))
def test_no_step_exceeds_the_budget_when_long_prompts_come_to_streams_that_fill_it(
        streams: int, extra: int, late: int, length: int, drafts: int) -> None:
    bench = Bench(mock_decoder(256), max_running=streams + late, step_tokens=streams + late + extra,
                  max_draft_tokens=drafts)
    for number in range(streams):
        bench.add(request(f"stream{number}", [number], 40))
    while len(bench.streams) < streams:
        bench.step()
    for number in range(late):
        bench.add(request(f"late{number}", [100 + number] * length, 4))
    for number in range(streams):
        stream = plain(request(f"stream{number}", [number], 40))
        done = len(bench.streams.get((f"stream{number}", 1), []))
        bench.scheduler.speculation.drafts.offer(Proposal(f"stream{number}", 1, 1 + done, pack(stream[done:done + 4])))
    bench.finish()
    assert bench.largest_step <= streams + late + extra


def test_an_older_cancel_that_comes_late_takes_nothing_back() -> None:
    bench = Bench(mock_decoder())
    for attempt in (3, 1):
        bench.scheduler.cancel(Cancel("r", attempt), 0.0)
    for attempt in (2, 3, 4):
        bench.add(request(attempt=attempt))
        bench.step()
        bench.scheduler.cancel(Cancel("r", 1), bench.now)
        bench.finish()
    ends = [bench.ends["r", attempt][0] for attempt in (2, 3, 4)]
    assert [end.reason for end in ends if isinstance(end, Finished)] == ["cancelled", "cancelled", "length"]


class SchedulerMachine(RuleBasedStateMachine):
    """The scheduler, the decoder behind it, and what is known of each attempt from outside."""

    @initialize(running=st.integers(1, 6), extra=st.sampled_from([0, 1, 2, 4, 8, 16]), blocks=st.integers(17, 26),
                drafts=st.sampled_from([0, 4]), waiting=st.integers(2, 8), random=st.randoms(use_true_random=False))
    def start(self, running: int, extra: int, blocks: int, drafts: int, waiting: int, random: object) -> None:
        self.bench = Bench(mock_decoder(blocks), max_running=running, step_tokens=running + extra,
                           max_waiting=waiting, max_draft_tokens=drafts)
        self.random = random
        self.handed_out = 0
        allocate = self.bench.scheduler.pool.allocate

        def counted(count: int) -> list[int] | None:
            blocks = allocate(count)
            self.handed_out += len(blocks or ())
            return blocks

        self.bench.scheduler.pool.allocate = counted  # type: ignore[method-assign]
        self.requests: dict[Key, Generate] = {}
        self.unwanted: set[Key] = set()  # cancelled, replaced, or of a silent gateway
        self.broken: set[Key] = set()  # their step raised
        self.cancelled: dict[str, int] = {}
        self.streams: dict[Key, list[int]] = {}

    # --- what happens ------------------------------------------------------------------------------------------------

    @rule(prompt=prompts, max_tokens=st.integers(0, 24), tenant=st.sampled_from("abc"), priority=st.integers(0, 2),
          gateway=st.sampled_from(["g1", "g2"]), seed=st.integers(0, 2),
          patience=st.sampled_from([None, None, 0.1, 0.5]), stop=st.none() | st.integers(0, 12))
    def a_request_comes(self, prompt: list[int], max_tokens: int, tenant: str, priority: int, gateway: str, seed: int,
                        patience: float | None, stop: int | None) -> None:
        deadline = FAR if patience is None else self.bench.now + patience
        one = request(
            f"r{len(self.requests)}", prompt, max_tokens, tenant=tenant, priority=priority, gateway=gateway,
            cache_salt=tenant.encode(), deadline=deadline, sampling=Sampling(temperature=float(seed > 0), seed=seed))
        if stop is not None:
            # one of its own tokens, so that drafts may reach beyond the end
            one = replace(one, stop_token_ids=tuple(plain(replace(one, deadline=FAR))[stop:stop + 1]))
        self.add(one)

    @rule(count=st.integers(2, 6), prompt=st.integers(1, 20), tenant=st.sampled_from("abc"))
    def a_crowd_comes_that_will_need_more_than_there_is(self, count: int, prompt: int, tenant: str) -> None:
        for number in range(count):
            self.add(request(f"r{len(self.requests)}", [50 + number] * prompt, 40, tenant=tenant, priority=number % 3,
                             cache_salt=tenant.encode(), deadline=FAR if number % 2 else self.bench.now + 0.12))
        self.steps_run(prompt)
        # a long one goes before all of them and takes their blocks while they run
        self.add(request(f"r{len(self.requests)}", [70 + prompt] * 40, 8, tenant=tenant, priority=3,
                         cache_salt=tenant.encode()))
        self.steps_run(count)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def an_attempt_comes_again_or_a_later_one(self, data: st.DataObject) -> None:
        known = self.requests[data.draw(st.sampled_from(sorted(self.requests)))]
        later = data.draw(st.integers(-1, 2))
        said = unpack(known.generated) + self.bench.streams.get((known.request_id, known.attempt), [])
        self.add(request(
            known.request_id, unpack(known.tokens), known.max_tokens, attempt=known.attempt + later,
            tenant=known.tenant, priority=known.priority, gateway=known.gateway, cache_salt=known.cache_salt,
            deadline=known.deadline, sampling=known.sampling, stop_token_ids=known.stop_token_ids,
            generated=said if later > 0 else unpack(known.generated)))

    def add(self, one: Generate) -> None:
        key = Key(one.request_id, one.attempt)
        seen = max((other.attempt for other in self.requests if other.request_id == one.request_id), default=-1)
        before = self.bench.scheduler.length_of(one.request_id), len(self.bench.scheduler.waiting)
        self.bench.add(one)
        if one.attempt <= seen:
            assert (self.bench.scheduler.length_of(one.request_id), len(self.bench.scheduler.waiting)) == before
            return
        self.requests[key] = one
        self.unwanted |= {other for other in self.requests
                          if other.request_id == one.request_id and other.attempt < one.attempt}
        self.take()
        if one.attempt <= self.cancelled.get(one.request_id, -1):
            self.unwanted.add(key)
            assert key in self.bench.ends, "a cancel that came first must end its request on arrival"

    @rule(data=st.data(), ahead=st.integers(0, 2))
    def a_cancel_comes(self, data: st.DataObject, ahead: int) -> None:
        """Of one that lives or has ended, or that is still on its way here."""
        names = sorted({key.request_id for key in self.requests} | {f"r{len(self.requests)}"})
        name = data.draw(st.sampled_from(names))
        attempt = max((key.attempt for key in self.requests if key.request_id == name), default=0) + ahead - 1
        self.cancelled[name] = max(attempt, self.cancelled.get(name, -1))
        self.unwanted |= {key for key in self.requests if key.request_id == name and key.attempt <= attempt}
        self.bench.scheduler.cancel(Cancel(name, attempt), self.bench.now)
        self.take()
        assert all(key in self.bench.ends for key in self.requests
                   if key.request_id == name and key.attempt <= attempt)

    @rule()
    def a_gateway_falls_silent(self) -> None:
        self.unwanted |= {key for key, one in self.requests.items() if one.gateway == "g2"}
        self.bench.scheduler.drop_gateways({"g2"}, self.bench.now)
        self.take()
        assert not [one for one in self.bench.scheduler.live if one.request.gateway == "g2"]

    @rule(seconds=st.floats(0.01, 0.3))
    def time_passes(self, seconds: float) -> None:
        self.bench.now += seconds

    @rule(steps=st.integers(1, 12))
    def steps_run(self, steps: int) -> None:
        for _ in range(steps):
            self.offer()
            if (step := self.plan()) is None:
                return
            self.commit(step)

    @rule(data=st.data())
    def a_step_raises_and_runs_again_one_by_one(self, data: st.DataObject) -> None:
        if (step := self.plan()) is None:
            return
        broken = data.draw(st.sets(st.integers(0, len(step.works) - 1)))
        for number, work in enumerate(step.works):
            if number in broken:
                self.broken.add(work.sequence.key)
                self.bench.scheduler.fail(work.sequence, WorkerFailed("it was tried twice"), retryable=False)
            else:
                self.commit(Step([work]))
        self.take()

    @rule(count=st.integers(1, 40))
    def blocks_are_lost_and_an_audit_finds_them(self, count: int) -> None:
        pool = self.bench.scheduler.pool
        lost = pool.allocate(min(count, pool.available))
        found = self.bench.scheduler.audit()
        assert bool(found.repairs) == bool(lost)

    # --- a step, watched ---------------------------------------------------------------------------------------------

    def offer(self) -> None:
        for sequence in list(self.bench.scheduler.running):
            if self.random.random() < 0.5:  # type: ignore[attr-defined]
                offer_drafts(self.bench, sequence.key, self.stream(sequence.key), self.random)

    def plan(self) -> Step | None:
        scheduler, pool = self.bench.scheduler, self.bench.scheduler.pool
        before = list(scheduler.running)
        decoding = [one for one in before if one.missing == 1]
        hashes = {one.key: list(one.hashes) for one in before}
        names, handed_out = set(pool.names()), self.handed_out
        step = scheduler.plan(self.bench.now)
        self.take()
        assert all(one.deadline > self.bench.now for one in scheduler.live)
        gave_way = [one for one in before if one.slot < 0 and not one.ended]
        stayed = [one for one in before if one.slot >= 0]
        self.check_gave_way(gave_way, stayed, hashes)
        # a name is lost only with a block that was handed out: streams that give way or end keep theirs
        assert len(names - set(pool.names())) <= self.handed_out - handed_out
        if step is None:
            assert not scheduler.running
            return None
        self.check_step(step, [one for one in decoding if one in stayed])
        return step

    def check_gave_way(self, gave_way: list[Sequence], stayed: list[Sequence], hashes: dict[Key, list[bytes]]) -> None:
        """The lowest in rank, and they keep the names of their blocks."""
        for one in gave_way:
            assert one in self.bench.scheduler.waiting and one.blocks == [] and one.computed == 0
            assert all(other.rank < one.rank for other in stayed)
            assert one.hashes[:len(hashes[one.key])] == hashes[one.key]
        waiting = self.bench.scheduler.waiting
        if gave_way and gave_way[0].request.priority == max(one.request.priority for one in waiting):
            head = waiting.peek()
            assert head is not None and head.preemptions, "who gave way stands before all others of its priority"

    def check_step(self, step: Step, decoding: list[Sequence]) -> None:
        scheduler, limits = self.bench.scheduler, self.bench.scheduler.limits
        assert 0 < step.rows <= limits.step_tokens
        assert len({work.sequence.key for work in step.works}) == len(step.works) <= limits.max_running
        for work in step.works:
            assert work.sequence in scheduler.running and work.rows > len(work.drafts) >= 0
            assert work.start == work.sequence.computed
            assert work.start + work.rows <= len(work.sequence.blocks) * BLOCK
            assert len(work.drafts) <= limits.max_draft_tokens
        working = {work.sequence.key for work in step.works}
        assert all(one.key in working for one in decoding), "a stream that runs has a row of every step"
        assert scheduler.running[0].key in working, "the first in rank always advances"
        if decoding:
            prompts = sum(work.rows - len(work.drafts) for work in step.works if work.sequence not in decoding)
            assert prompts <= max(1, int(PREFILL_SHARE * limits.step_tokens)), "prompts hold running streams up"

    def commit(self, step: Step) -> None:
        self.bench.now += 0.01
        chosen = self.bench.decoder.step(self.bench.batch.build(step)).tolist()
        self.bench.take(self.bench.scheduler.commit(step, chosen, self.bench.now))

    def take(self) -> None:
        self.bench.take(self.bench.scheduler.take_events())

    def stream(self, key: Key) -> list[int]:
        """What this attempt must say, had it been alone and had it all the time it wants."""
        if key not in self.streams:
            patient = replace(self.requests[key], deadline=FAR)
            self.streams[key] = plain(patient, mock_decoder(self.bench.scheduler.pool.blocks))
        return self.streams[key]

    # --- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def every_block_has_one_place(self) -> None:
        scheduler, pool = self.bench.scheduler, self.bench.scheduler.pool
        assert scheduler.audit().repairs == 0
        states = [pool.ownership(block) for block in range(pool.blocks)]
        held = {block for one in scheduler.running for block in one.blocks}
        assert {block for block, state in enumerate(states) if state is Ownership.HELD} == held
        assert pool.available == pool.blocks - len(held)
        for one in scheduler.running:
            assert len(set(one.blocks)) == len(one.blocks) and one.computed <= len(one.blocks) * BLOCK

    @invariant()
    def every_sequence_has_one_place(self) -> None:
        scheduler = self.bench.scheduler
        live, waiting = list(scheduler.live), list(scheduler.waiting)
        assert len(waiting) == len(scheduler.waiting) == len({one.key for one in waiting})
        assert {one.key for one in scheduler.running}.isdisjoint(one.key for one in waiting)
        assert sorted(one.key for one in live) == sorted(one.key for one in [*scheduler.running, *waiting])
        assert all(not one.ended and one.slot < 0 and not one.blocks for one in waiting)
        assert all(before.rank < after.rank for before, after in pairwise(scheduler.running))
        slots = [one.slot for one in scheduler.running]
        assert len(set(slots)) == len(slots) <= scheduler.limits.max_running and all(slot >= 0 for slot in slots)

    @invariant()
    def every_attempt_ends_at_most_once_and_for_a_reason(self) -> None:
        for key, ends in self.bench.ends.items():
            (end,) = ends
            got = self.bench.streams.get(key, [])
            one = self.requests[Key(*key)]
            match end:
                case Finished(reason="cancelled"):
                    assert key in self.unwanted
                case Failed(code="deadline_exceeded"):
                    assert self.bench.now >= one.deadline
                case Failed(code="worker_failed"):
                    assert key in self.broken
                case Failed(code="overloaded"):
                    assert not got
                case _:
                    assert isinstance(end, Finished) and end.completion_tokens == len(unpack(one.generated)) + len(got)

    def teardown(self) -> None:
        """All that lives still ends, and every stream was the plain one."""
        if not hasattr(self, "bench"):
            return
        for _ in range(5000):
            if (step := self.plan()) is None:
                break
            self.commit(step)
        self.every_block_has_one_place()
        self.every_attempt_ends_at_most_once_and_for_a_reason()
        assert not list(self.bench.scheduler.live)
        assert self.bench.scheduler.pool.available == self.bench.scheduler.pool.blocks
        assert {Key(*key) for key in self.bench.ends} == set(self.requests)
        for key, one in self.requests.items():
            (end,) = self.bench.ends[key]
            got, expected = self.bench.streams.get(key, []), self.stream(key)
            assert got == (expected if isinstance(end, Finished) and end.reason != "cancelled"
                           else expected[:len(got)]), (key, one, pack(got))


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=20, stateful_step_count=30, deadline=None,
                                  suppress_health_check=[HealthCheck.too_slow])
TestScheduler.pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
