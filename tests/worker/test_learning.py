"""What a worker learns from its own steps: their cost, and whether waiting pays."""

import asyncio
import random

import pytest

from kernels.step import StepInputs
from shared.clock import LoopClock
from tests.virtual_time import run_virtual
from tests.worker.builders import mock_decoder
from worker.calibrate import calibrate
from worker.draft_wait import LONGEST_PATIENCE, MOST_STREAMS, DraftWait
from worker.runner import TimedRunner
from worker.step_cost import StepCost


def test_the_cost_of_a_step_is_learned_from_steps_of_many_sizes() -> None:
    rng = random.Random(1)
    cost = StepCost()
    for _ in range(300):
        rows, prefill = rng.randint(1, 64), rng.choice([0, 0, 100, 200])
        cost.observe(rows, prefill, (0.006 + 0.0012 * rows + 0.0004 * prefill) * rng.uniform(0.95, 1.05))
    assert cost.base_s == pytest.approx(0.006, rel=0.25)
    assert cost.row_s == pytest.approx(0.0012, rel=0.1)
    assert cost.token_s == pytest.approx(0.0004, rel=0.1)
    assert cost.prefill_tok_s(256) == pytest.approx(256 / (0.006 + 256 * 0.0004), rel=0.1)


def test_steps_that_are_all_alike_leave_the_prior_ratio() -> None:
    cost = StepCost()
    for _ in range(1000):
        cost.observe(1, 0, 0.011)
    assert cost.expected_s(1) == pytest.approx(0.011, rel=0.01)
    assert 0.0 < cost.row_s < 0.3 * cost.base_s


def test_one_pause_of_the_machine_does_not_upset_the_cost() -> None:
    cost = StepCost()
    for number in range(200):
        cost.observe(1 + number % 8, 0, 0.01 + 0.001 * (1 + number % 8))
    before = cost.expected_s(4)
    cost.observe(4, 0, 10.0)
    assert cost.expected_s(4) < 1.2 * before


def test_the_pauses_of_a_disturbed_machine_are_not_taken_for_the_base_of_a_step() -> None:
    rng = random.Random(2)
    cost = StepCost()
    for rows in (1, 8, 32) * 3:
        cost.observe(rows, 0, 0.0025 + 0.001 * rows)
    for _ in range(300):
        cost.observe(rng.randint(28, 36), 0, 0.036 + rng.choice([0.0, 0.0, 0.1]))
    assert cost.base_s <= 0.005
    assert 0.03 < cost.expected_s(32) < 0.12


def test_no_cost_is_ever_negative_or_known_without_a_step() -> None:
    cost = StepCost()
    assert cost.expected_s(5, 5) == cost.prefill_tok_s(256) == 0.0
    for rows in (64, 1, 64, 1):
        cost.observe(rows, 0, 1.0 / rows)
        assert min(cost.base_s, cost.row_s, cost.token_s) >= 0.0
    cost = StepCost()
    cost.observe(1, 0, 0.0)
    assert cost.expected_s(1) == 0.0


def run(wait: DraftWait, steps: int, tokens_waiting: float, tokens_plain: float, latency_s: float,
        streams: int = 1) -> float:
    """Tokens a second over `steps` of 10 ms."""
    tokens = seconds = 0.0
    for _ in range(steps):
        held = wait.seconds(streams, 0.010)
        hit = held >= latency_s
        got = tokens_waiting if held and hit else tokens_plain
        took = 0.010 + (min(held, latency_s) if held else 0.0)
        wait.answered(latency_s)
        wait.observe(streams, round(got * 1000), took)
        tokens, seconds = tokens + got, seconds + took
    return tokens / seconds


def test_waiting_is_kept_where_it_pays() -> None:
    wait = DraftWait()
    assert run(wait, 2000, 5.0, 3.0, 0.001) > 0.97 * 5.0 / 0.011
    assert wait.waiting


def test_waiting_that_does_not_pay_costs_less_than_two_percent() -> None:
    wait = DraftWait()
    assert run(wait, 2000, 1.0, 1.0, 0.008) > 0.98 * 1.0 / 0.010
    assert not wait.waiting


def test_waiting_is_given_up_when_it_stops_paying() -> None:
    wait = DraftWait()
    run(wait, 500, 5.0, 3.0, 0.001)
    assert wait.waiting
    run(wait, 3000, 3.0, 3.0, 0.005)
    assert not wait.waiting


def test_nobody_waits_without_a_drafter_or_with_many_streams() -> None:
    wait = DraftWait()
    for _ in range(100):
        assert wait.seconds(1, 0.01) == 0.0
        wait.observe(1, 1, 0.01)
    wait.waiting = True
    wait.answered(0.001)
    assert wait.seconds(1, 0.01) == 0.002
    assert wait.seconds(MOST_STREAMS + 1, 0.01) == wait.seconds(0, 0.01) == 0.0


def test_a_drafter_that_says_no_more_is_not_waited_for_once_waiting_had_won_for_long() -> None:
    wait = DraftWait()
    run(wait, 2000, 5.0, 3.0, 0.001)
    wait.waiting, wait._patience = True, LONGEST_PATIENCE
    held_s = 0.0
    for _ in range(1000):
        if seconds := wait.seconds(1, 0.010):
            held_s += seconds
            wait.missed()
        wait.observe(1, 1, 0.010 + seconds)
    assert 0.0 < held_s <= 0.002  # one wait: twice what its drafts took
    run(wait, 500, 5.0, 3.0, 0.001)
    assert wait.waiting and wait.seconds(1, 0.010)


def test_proportions_that_were_found_once_hold_while_steps_are_alike() -> None:
    cost = StepCost()
    for _ in range(3):
        for rows in (1, 8, 32):
            cost.observe(rows, 0, 0.01 + 0.0001 * rows)
    for _ in range(2000):
        cost.observe(32, 0, 0.01 + 0.0001 * 32)
    assert cost.row_s == pytest.approx(0.0001, rel=0.05)
    assert cost.base_s == pytest.approx(0.01, rel=0.05)


def test_calibration_finds_what_steps_cost_before_the_first_request() -> None:
    async def scenario() -> StepCost:
        cost = StepCost()
        runner = TimedRunner(mock_decoder(blocks=40), LoopClock(), step_s=0.02, row_s=0.001, token_s=0.0005)
        await calibrate(runner, cost, LoopClock(), max_running=64, step_tokens=256)
        return cost

    cost = run_virtual(scenario())
    assert (cost.base_s, cost.row_s, cost.token_s) == pytest.approx((0.02, 0.001, 0.0005), rel=0.05)


def test_calibration_takes_a_pause_of_the_machine_for_no_cost() -> None:
    class Pausing(TimedRunner):
        steps = 0

        async def execute(self, inputs: StepInputs) -> list[int]:
            self.steps += 1
            if self.steps in (3, 5, 9):
                await asyncio.sleep(0.2)
            return await super().execute(inputs)

    async def scenario() -> StepCost:
        cost = StepCost()
        runner = Pausing(mock_decoder(blocks=40), LoopClock(), step_s=0.01, row_s=0.0005, token_s=0.0005)
        await calibrate(runner, cost, LoopClock(), max_running=64, step_tokens=256)
        return cost

    cost = run_virtual(scenario())
    assert (cost.base_s, cost.row_s, cost.token_s) == pytest.approx((0.01, 0.0005, 0.0005), rel=0.05)


def test_calibration_fits_the_smallest_worker() -> None:
    async def scenario() -> None:
        runner = TimedRunner(mock_decoder(blocks=1, context_length=4), LoopClock(), step_s=0.0, row_s=0.0, token_s=0.0)
        await calibrate(runner, StepCost(), LoopClock(), max_running=1, step_tokens=1)

    run_virtual(scenario())
