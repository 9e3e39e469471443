"""A device that decodes several tokens of a stream by itself: no stream differs, and nobody waits for it long."""

import functools

import numpy as np
import pytest

from kernels.step import StepInputs
from shared.messages import Adjust, Cancel, Finished, Generate, Sampling
from tests.virtual_time import run_virtual
from tests.worker import builders
from tests.worker.builders import BLOCK, VOCABULARY, Bench, make_scheduler, mock_decoder, plain
from tests.worker.mesh import WALL_S, Mesh
from tests.worker.test_ahead import queueing
from worker.engine import STREAK_S, STREAK_TOKENS
from worker.kv_tier import HostTier
from worker.mock_decoder import MockDecoder
from worker.scheduler import Scheduler
from worker.step import Step

request = functools.partial(builders.request, deadline=WALL_S + 1000.0)


class Noting(MockDecoder):
    """A mock that notes how long its streaks are."""

    def __init__(self, blocks: int = 64) -> None:
        super().__init__(blocks=blocks, block_size_tokens=BLOCK, vocabulary_size=VOCABULARY, context_length=512)
        self.lengths: list[int] = []

    def streak(self, inputs: StepInputs, lengths: list[int]) -> list[list[int]]:
        self.lengths += lengths
        return super().streak(inputs, lengths)


class GoingOn(Bench):
    """Every step goes on for as long as it may."""

    tokens_each = 5
    streaks = 0

    def step(self) -> bool:
        scheduler = self.scheduler
        step = scheduler.plan(self.now)
        self.take(scheduler.take_events())
        if step is None:
            return False
        step = scheduler.go_on(step, self.tokens_each)
        inputs = self.batch.build(step)
        chosen = self.decoder.step(inputs).tolist() if step.longest == 1 else [
            token for stream in mock(self.decoder).streak(inputs, step.lengths) for token in stream]
        self.streaks += step.longest > 1
        self.now += 0.01
        self.take(scheduler.commit(step, chosen, self.now, logprobs=inputs.logprobs))
        assert scheduler.audit().repairs == 0
        return True


def mock(decoder: object) -> MockDecoder:
    assert isinstance(decoder, MockDecoder)
    return decoder


def requests(count: int) -> list[Generate]:
    """Of many lengths, some with stop tokens that come and some with noise."""
    random = np.random.default_rng(11)
    made = []
    for number in range(count):
        prompt = random.integers(0, VOCABULARY, int(random.integers(1, 30))).tolist()
        one = request(f"r{number}", prompt, int(random.integers(1, 40)),
                      sampling=Sampling(temperature=number % 3 * 0.5, seed=number))
        if number % 4 == 0 and len(tokens := plain(one)) > 6:
            one = request(f"r{number}", prompt, one.max_tokens, sampling=one.sampling, stop_token_ids=(tokens[5],))
        made.append(one)
    return made


@pytest.mark.parametrize("blocks", [24, 200])
@pytest.mark.parametrize("tokens_each", [2, 5, 100])
def test_streams_that_go_on_are_those_that_take_step_after_step(blocks: int, tokens_each: int) -> None:
    bench = GoingOn(mock_decoder(blocks=blocks), max_draft_tokens=0)
    bench.scheduler.meet_drafter("")
    bench.tokens_each = tokens_each
    made = requests(24)
    for each in made:
        bench.add(each)
        bench.step()
    bench.finish()
    for each in made:
        assert bench.streams[(each.request_id, 1)] == plain(each)
        (end,) = bench.ends[(each.request_id, 1)]
        assert isinstance(end, Finished)
        assert end.completion_tokens == len(plain(each))
    assert bench.streaks
    assert bench.scheduler.pool.available == blocks


def planned(*asked: Generate, **limits: int) -> tuple[Scheduler, Step]:
    """A step that decodes: prompts are computed, and one token of each stream is known."""
    scheduler = make_scheduler(mock_decoder(), **{"max_draft_tokens": 0} | limits)
    for each in asked:
        scheduler.add(each, 0.0, 1e9)
    step = scheduler.plan(0.0)
    assert step is not None
    assert scheduler.go_on(step, 8).longest == 1  # it computes prompts
    scheduler.commit(step, [9] * len(asked), 0.0)
    step = scheduler.plan(0.0)
    assert step is not None
    return scheduler, step


def test_rows_go_on_to_their_own_ends_and_no_further() -> None:
    scheduler, step = planned(request("a", max_tokens=3), request("b", [4, 4], max_tokens=40))
    step = scheduler.go_on(step, 8)
    assert (step.longest, step.lengths) == (8, [2, 8])


@pytest.mark.parametrize("asked", [
    request("a", max_tokens=9, logprobs=0), request("a", max_tokens=9, adjust=Adjust(repetition_penalty=2.0))])
def test_what_depends_on_more_than_the_tokens_before_it_is_chosen_step_by_step(asked: Generate) -> None:
    scheduler, step = planned(asked, request("b", [4, 4], max_tokens=40))
    assert scheduler.go_on(step, 8) == step
    assert step.lengths == [1, 1]


def test_nobody_who_waits_and_no_drafter_is_kept_waiting_by_a_streak() -> None:
    scheduler, step = planned(request("a", max_tokens=40), max_running=1)
    scheduler.add(request("b", max_tokens=9), 0.0, 1e9)
    assert scheduler.go_on(step, 8).longest == 1
    scheduler, step = planned(request("a", max_tokens=40))
    scheduler.meet_drafter("d1")
    assert scheduler.go_on(step, 8).longest == 1


def test_a_streak_takes_no_block_that_somebody_holds() -> None:
    scheduler, step = planned(request("a", [1, 2, 3], max_tokens=40))
    held = scheduler.pool.allocate(scheduler.pool.available - 1) or []
    step = scheduler.go_on(step, 100)
    # of 4 tokens one is still to be computed; one block more holds 4
    assert step.lengths == [1 + BLOCK]
    scheduler.commit(step, list(range(10, 15)), 0.0)
    scheduler.pool.release(held)


def test_no_streak_takes_a_block_whose_contents_a_tier_keeps() -> None:
    """They are copied out before a step; what a streak takes is known only when the copies are."""
    scheduler, step = planned(request("a", [1, 2, 3], max_tokens=40))
    scheduler.pool.tier = HostTier(8)
    assert scheduler.go_on(step, 8).longest == 1


def test_a_device_that_queues_steps_takes_no_streaks() -> None:
    async def scenario() -> None:
        decoder = queueing(blocks=96)
        mesh = Mesh(decoder, mock_step_s=0.0, mock_row_s=0.0, mock_token_s=0.0, speculation=False, max_running=8)
        async with mesh:
            for each in requests(12):
                await mesh.send(each)
            for each in requests(12):
                assert isinstance(await mesh.ended(each.request_id), Finished)
                assert mesh.stream(each.request_id) == plain(each)
        assert decoder.calls.count("ahead") > 10

    run_virtual(scenario(), timeout_s=60)


def test_short_steps_go_on_and_say_the_same_in_fewer_calls() -> None:
    async def scenario() -> tuple[Mesh, Noting]:
        decoder = Noting()
        mesh = Mesh(decoder, mock_step_s=0.0, mock_row_s=0.0, mock_token_s=0.0, speculation=False, max_running=8)
        async with mesh:
            for each in requests(24):
                await mesh.send(each)
            for each in requests(24):
                assert isinstance(await mesh.ended(each.request_id), Finished)
                assert mesh.stream(each.request_id) == plain(each)
        return mesh, decoder

    mesh, decoder = run_virtual(scenario(), timeout_s=60)
    assert max(decoder.lengths) == STREAK_TOKENS
    assert mesh.statuses[-1].tokens_total == sum(len(plain(each)) for each in requests(24))


@pytest.mark.parametrize("step_s", [0.9 * STREAK_S, 0.02])
def test_steps_that_take_their_time_do_not_go_on(step_s: float) -> None:
    async def scenario() -> Noting:
        decoder = Noting()
        async with Mesh(decoder, mock_step_s=step_s, mock_row_s=0.0, mock_token_s=0.0, speculation=False) as mesh:
            decoder.lengths.clear()
            await mesh.send(request("a", max_tokens=40))
            await mesh.ended("a")
        return decoder

    assert run_virtual(scenario(), timeout_s=60).lengths == []


def test_a_stream_is_cancelled_between_two_streaks() -> None:
    async def scenario() -> Mesh:
        mesh = Mesh(Noting(), mock_step_s=STREAK_S / 4, mock_row_s=0.0, mock_token_s=0.0, speculation=False)
        async with mesh:
            await mesh.send(request("a", max_tokens=200))
            await mesh.until(lambda: len(mesh.stream("a")) > 10)
            await mesh.send(Cancel("a", 1))
            end = await mesh.ended("a")
            assert isinstance(end, Finished)
            assert end.reason == "cancelled"
        return mesh

    mesh = run_virtual(scenario(), timeout_s=60)
    assert 10 < len(mesh.stream("a")) < 200
    assert mesh.stream("a") == plain(request("a", max_tokens=200))[:len(mesh.stream("a"))]
