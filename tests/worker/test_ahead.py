"""A device that queues steps: the next one is planned while one runs, and no stream differs by a token."""

import asyncio
import functools
from collections import deque
from collections.abc import Callable, Coroutine
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from kernels.step import Ahead, StepInputs
from shared.clock import LoopClock
from shared.messages import Cancel, Finished, Generate, Sampling
from tests.virtual_time import run_virtual
from tests.worker import builders
from tests.worker.builders import BLOCK, VOCABULARY, make_batch, make_scheduler, mock_decoder, plain
from tests.worker.mesh import WALL_S, Mesh
from worker.engine import Arrival, Engine
from worker.events import Event
from worker.mock_decoder import MockDecoder
from worker.runner import TimedRunner
from worker.scheduler import Scheduler
from worker.step import Step
from worker.step_cost import StepCost

request = functools.partial(builders.request, deadline=WALL_S + 1000.0)


def virtual(scenario: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    """A test on a clock that jumps."""
    def run() -> None:
        run_virtual(scenario(), timeout_s=600)
    run.__name__ = scenario.__name__
    return run


class Queueing(MockDecoder):
    """A mock that queues: a step is computed when it is submitted, and its tokens are told when it is collected."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.queue: deque[NDArray[np.int32]] = deque()
        self.chosen = np.zeros(0, np.int32)
        self.calls: list[str] = []
        self.breaks_at = -1
        self.refuses_at = -1  # a look ahead of this number

    def submit(self, inputs: StepInputs, carried: NDArray[np.int32] | None = None) -> int:
        assert len(self.queue) < 2
        if carried is not None and self.calls.count("ahead") == self.refuses_at - 1:
            self.refuses_at = -1
            raise RuntimeError("the device has had enough")
        if carried is not None:
            assert (inputs.tokens[carried >= 0] == 0).all()
            inputs.tokens = np.where(carried >= 0, self.chosen[carried], inputs.tokens).astype(np.int32)
        self.chosen = self.step(inputs)
        self.queue.append(self.chosen)
        self.calls.append("submit" if carried is None else "ahead")
        return len(self.calls)

    def collect(self, step: int) -> NDArray[np.int32]:
        self.calls.append("collect")
        tokens = self.queue.popleft()
        if self.calls.count("collect") == self.breaks_at:
            raise RuntimeError("the device has had enough")
        return tokens


def queueing(blocks: int = 64) -> Queueing:
    return Queueing(blocks=blocks, block_size_tokens=BLOCK, vocabulary_size=VOCABULARY, context_length=512)


def requests(count: int) -> list[Generate]:
    """Of many lengths, some with stop tokens that come and some with noise."""
    random = np.random.default_rng(6)
    made = []
    for number in range(count):
        prompt = random.integers(0, VOCABULARY, int(random.integers(1, 30))).tolist()
        one = request(f"r{number}", prompt, int(random.integers(1, 40)),
                      sampling=Sampling(temperature=number % 3 * 0.5, seed=number))
        if number % 4 == 0 and len(tokens := plain(one)) > 6:
            one = request(f"r{number}", prompt, one.max_tokens, sampling=one.sampling, stop_token_ids=(tokens[5],))
        made.append(one)
    return made


@virtual
async def test_streams_are_those_of_a_device_that_does_not_queue() -> None:
    decoder = queueing(blocks=96)
    assert isinstance(decoder, Ahead)
    async with Mesh(decoder, speculation=False, max_running=8) as mesh:
        decoder.calls.clear()
        made = requests(24)
        for each in made:
            await mesh.send(each)
            await asyncio.sleep(0.07)
        for each in made:
            end = await mesh.ended(each.request_id)
            assert isinstance(end, Finished)
            assert mesh.stream(each.request_id) == plain(each)
        assert decoder.calls.count("ahead") > 50
        assert not decoder.queue


@virtual
async def test_the_next_step_is_submitted_before_the_one_under_way_is_collected() -> None:
    decoder = queueing()
    async with Mesh(decoder, speculation=False) as mesh:
        decoder.calls.clear()
        await mesh.send(request(max_tokens=5))
        await mesh.ended("r")
        # a prompt, whose first token is waited for; then decodes, the last of which is known to be one
        assert decoder.calls == ["submit", "collect", "submit", "ahead", "collect", "ahead", "collect", "ahead",
                                 "collect", "collect"]
        assert mesh.stream("r") == plain(request(max_tokens=5))


@virtual
async def test_a_stream_that_is_cancelled_while_its_next_row_runs_harms_nobody() -> None:
    decoder = queueing()
    async with Mesh(decoder, speculation=False) as mesh:
        await mesh.send(request("a", max_tokens=60), request("b", [9, 8, 7], max_tokens=60))
        await mesh.until(lambda: len(mesh.stream("a")) > 10)
        await mesh.send(Cancel("a", 1))
        assert (await mesh.ended("a")).reason == "cancelled"
        await mesh.send(request("c", [1, 1, 2, 3, 5, 8], max_tokens=60))
        for name, prompt in (("b", [9, 8, 7]), ("c", [1, 1, 2, 3, 5, 8])):
            assert isinstance(await mesh.ended(name), Finished)
            assert mesh.stream(name) == plain(request(name, prompt, max_tokens=60))
        assert mesh.statuses[-1].blocks_total == 64


@virtual
async def test_a_step_that_fails_takes_the_one_behind_it_along_and_streams_go_on() -> None:
    decoder = queueing()
    async with Mesh(decoder, speculation=False) as mesh:
        decoder.breaks_at = decoder.calls.count("collect") + 8
        await mesh.send(request("a", max_tokens=30), request("b", [4, 4], max_tokens=30))
        for name, prompt in (("a", [5, 6, 7]), ("b", [4, 4])):
            assert isinstance(await mesh.ended(name), Finished)
            assert mesh.stream(name) == plain(request(name, prompt, max_tokens=30))
        assert not decoder.queue


@virtual
async def test_a_look_ahead_that_fails_costs_no_stream_anything() -> None:
    """Its error left the step under way uncollected, and after a second one the device refused every step."""
    decoder = queueing()
    async with Mesh(decoder, speculation=False) as mesh:
        for turn in range(3):
            decoder.refuses_at = decoder.calls.count("ahead") + 3
            names = f"a{turn}", f"b{turn}"
            await mesh.send(request(names[0], max_tokens=30), request(names[1], [4, 4], max_tokens=30))
            for name, prompt in zip(names, ([5, 6, 7], [4, 4]), strict=True):
                assert isinstance(await mesh.ended(name), Finished)
                assert mesh.stream(name) == plain(request(name, prompt, max_tokens=30))
            assert decoder.refuses_at == -1 and not decoder.queue


@virtual
async def test_a_step_under_way_is_collected_when_what_comes_behind_it_cannot_be_planned() -> None:
    decoder = queueing()
    foresee = Scheduler.foresee

    def foresees(scheduler: Scheduler, step: Step, now: float) -> Step | None:
        if not decoder.queue or decoder.calls.count("ahead") % 5 != 3:
            return foresee(scheduler, step, now)
        decoder.calls.append("ahead")
        raise RuntimeError("nobody knows")

    with mock.patch.object(Scheduler, "foresee", foresees):
        async with Mesh(decoder, speculation=False) as mesh:
            await mesh.send(request("a", max_tokens=30), request("b", [4, 4], max_tokens=30))
            for name, prompt in (("a", [5, 6, 7]), ("b", [4, 4])):
                assert isinstance(await mesh.ended(name), Finished)
                assert mesh.stream(name) == plain(request(name, prompt, max_tokens=30))
            assert not decoder.queue


@virtual
async def test_steps_are_planned_ahead_until_a_drafter_comes_whose_drafts_pay() -> None:
    """A worker that nobody drafted for took itself for one that speculates, and planned nothing ahead."""
    decoder = queueing()
    async with Mesh(decoder) as mesh:
        decoder.calls.clear()
        await mesh.send(request(max_tokens=20))
        await mesh.ended("r")
        assert decoder.calls.count("ahead") == 18
        await mesh.send(mesh.drafter())
        await mesh.until(lambda: mesh.statuses[-1].drafter == "d1")
        decoder.calls.clear()
        await mesh.send(request("s", max_tokens=20))
        await mesh.ended("s")
        assert "ahead" not in decoder.calls


def test_whether_drafts_can_pay_is_asked_again_before_each_step_that_is_foreseen() -> None:
    """With many streams they could not; when most had ended, nobody noticed while steps were planned ahead."""
    scheduler = make_scheduler(mock_decoder(blocks=256), max_running=32)
    for _ in range(200):
        for rows in (1, 8, 32):
            scheduler.cost.observe(rows, 0, 0.003 + rows * 0.001)
    scheduler.meet_drafter("d1")
    for number in range(31):
        scheduler.add(request(f"r{number}", [number], max_tokens=3 if number else 30), 0.0, 1e9)
    for _ in range(2):
        step = scheduler.plan(0.0)
        assert step is not None
        scheduler.commit(step, [9] * step.sampled, 0.0)
    step = scheduler.plan(0.0)
    assert step is not None and step.streams == 31
    ahead = scheduler.foresee(step, 0.0)
    assert ahead is not None and ahead.streams == 1 and not scheduler.speculation.wanted
    scheduler.commit(step, [9] * 31, 0.0)
    assert scheduler.foresee(ahead, 0.0) is None and scheduler.speculation.wanted


@virtual
async def test_a_step_that_was_queued_takes_from_the_end_of_the_one_before_it_to_its_own() -> None:
    """The time in which it ran while what the one before had said was still being published was missing."""
    clock, decoder = LoopClock(WALL_S), queueing()
    scheduler = make_scheduler(decoder, max_draft_tokens=0)
    observed: list[float] = []
    published = 0

    async def publish(events: list[Event]) -> bool:
        nonlocal published
        published += 1
        await asyncio.sleep(0.005 if published % 3 == 0 else 0.001)
        return True

    runner = TimedRunner(decoder, clock, step_s=0.004, row_s=0.0, token_s=0.0)
    engine = Engine(scheduler, make_batch(scheduler), runner, clock, publish)
    with mock.patch.object(StepCost, "observe", lambda cost, rows, prompt, seconds: observed.append(seconds)):
        running = asyncio.ensure_future(engine.run())
        engine.submit(Arrival(request(max_tokens=12), 1e9))
        await asyncio.sleep(0.001)
        await engine.idle.wait()
        running.cancel()
    assert decoder.calls.count("ahead") == 10
    assert observed == [pytest.approx(0.004)] * 12


@virtual
async def test_what_depends_on_the_tokens_is_waited_for() -> None:
    decoder = queueing()
    async with Mesh(decoder, speculation=False) as mesh:
        decoder.calls.clear()
        await mesh.send(request(max_tokens=6, logprobs=2))
        assert isinstance(await mesh.ended("r"), Finished)
        assert "ahead" not in decoder.calls


def test_nothing_is_foreseen_that_needs_a_block_somebody_holds() -> None:
    scheduler = make_scheduler(mock_decoder(blocks=3), max_draft_tokens=0)
    # the longest that three blocks hold, so that nothing is over: beside it somebody holds the third
    scheduler.add(request("a", [1, 2, 3, 4, 5, 6, 7], max_tokens=5), 0.0, 1e9)
    (held,) = scheduler.pool.allocate(1) or [-1]
    step = scheduler.plan(0.0)
    assert step is not None
    scheduler.commit(step, [9], 0.0)
    step = scheduler.plan(0.0)
    assert step is not None
    assert [(work.start, work.rows) for work in step.works] == [(7, 1)]
    assert scheduler.foresee(step, 0.0) is None
    scheduler.pool.release([held])
    ahead = scheduler.foresee(step, 0.0)
    assert ahead is not None
    assert len(ahead.works[0].sequence.blocks) == 3


def test_nothing_is_foreseen_while_somebody_waits_or_a_deadline_passes() -> None:
    scheduler = make_scheduler(mock_decoder(), max_draft_tokens=0, max_running=1)
    scheduler.add(request("a", max_tokens=9), 0.0, 5.0)
    for chosen in ([9], [8]):
        step = scheduler.plan(0.0)
        assert step is not None
        if len(chosen) and step.rows == 1:
            assert scheduler.foresee(step, 5.0) is None
            assert scheduler.foresee(step, 1.0) is not None
            scheduler.add(request("b", max_tokens=9), 0.0, 1e9)
            assert scheduler.foresee(step, 1.0) is None
        scheduler.commit(step, chosen, 0.0)


@pytest.mark.parametrize("broken", [True, False])
def test_a_foreseen_row_of_a_stream_that_has_ended_is_passed_over(broken: bool) -> None:
    scheduler = make_scheduler(mock_decoder(), max_draft_tokens=0)
    for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
        scheduler.add(request(name, prompt, max_tokens=9, stop_token_ids=(77,)), 0.0, 1e9)
    step = scheduler.plan(0.0)
    assert step is not None
    scheduler.commit(step, [10, 20], 0.0)
    step = scheduler.plan(0.0)
    assert step is not None
    ahead = scheduler.foresee(step, 0.0)
    assert ahead is not None
    assert [(work.start, work.carries) for work in ahead.works] == [(4, 0), (4, 1)]
    scheduler.commit(step, [77 if broken else 11, 21], 0.0)
    scheduler.commit(ahead, [12, 22], 0.0)
    (left,) = [sequence.tokens for sequence in scheduler.live if sequence.request.request_id == "b"]
    assert left == [4, 5, 6, 20, 21, 22]
    assert scheduler.length_of("a") == (None if broken else 6)
    assert scheduler.audit().repairs == 0
