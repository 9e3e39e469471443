"""A drafter that does not pay for itself is left alone for a while; one that does is hardly disturbed."""

import random
from collections.abc import Callable

import pytest

from worker.payback import FIRST_PATIENCE, NEWS_STEPS, SETTLE_STEPS, TRIAL_STEPS, WINDOW_STEPS, Payback

PLAIN_S = 0.005

Gain = Callable[[int], float]


def play(payback: Payback, steps: int, gain: Gain, noise: float = 0.0, seed: int = 1, price: float = 0.0,
         drafter_usd: float = 0.0) -> tuple[float, int, int]:
    """`gain(step)`: speed with drafts over that without. Speed over that of plain steps; changes; steps followed."""
    rng = random.Random(seed)
    worth = passed = 0.0
    changes = followed = 0
    for step in range(steps):
        seconds = PLAIN_S * rng.uniform(1 - noise, 1 + noise)
        # each step of a followed stream gives as many tokens as its gain, on average
        tokens = gain(step) if payback.following else 1.0
        if payback.following:
            followed += 1
            payback.spend(drafter_usd)
        worth, passed = worth + tokens * PLAIN_S, passed + seconds
        changes += payback.observe(1, tokens, seconds, PLAIN_S, price)  # type: ignore[arg-type]
    return worth / passed, changes, followed


def test_a_drafter_that_gains_much_is_never_put_on_trial() -> None:
    speed, changes, _ = play(Payback(), 5000, lambda step: 2.0)
    assert (speed, changes) == (pytest.approx(2.0), 0)


def test_a_drafter_that_gains_little_keeps_nearly_all_of_it() -> None:
    speed, _, followed = play(Payback(), 20_000, lambda step: 1.1, noise=0.05)
    assert speed > 1.095
    assert followed > 0.97 * 20_000


@pytest.mark.parametrize("seed", range(8))
def test_a_drafter_that_loses_is_left_and_costs_next_to_nothing_from_then_on(seed: int) -> None:
    payback = Payback()
    play(payback, 3 * (WINDOW_STEPS + TRIAL_STEPS + 20), lambda step: 0.85, noise=0.05, seed=seed)
    assert (payback.state, payback.why, payback.times_left) == ("left", "slower", 1)
    speed, _, _ = play(payback, 20_000, lambda step: 0.85, noise=0.05, seed=seed + 100)
    assert speed > 0.99


def test_one_bad_window_is_forgiven() -> None:
    payback = Payback()
    bad = range(WINDOW_STEPS, 2 * WINDOW_STEPS)
    play(payback, 4000, lambda step: 0.8 if step in bad else 1.2)
    assert payback.times_left == 0


def test_what_is_neither_gain_nor_loss_does_not_flap() -> None:
    changes = [play(Payback(), 20_000, lambda step: 1.0, noise=0.08, seed=seed)[1] for seed in range(6)]
    # a change each for the beginning and the end of a trial, which come seldom
    assert max(changes) < 100


def test_a_drafter_that_was_left_is_taken_back_when_it_pays_again() -> None:
    payback = Payback()
    play(payback, 1500, lambda step: 0.8)
    assert payback.state == "left"
    speed, _, _ = play(payback, 8000, lambda step: 1.6)
    assert payback.following
    assert speed > 1.5


def test_a_new_stream_is_reason_to_try_again_but_not_every_one() -> None:
    payback = Payback()
    while payback.state != "left":
        play(payback, 1, lambda step: 0.8)
    play(payback, NEWS_STEPS + SETTLE_STEPS, lambda step: 0.8)
    assert payback.state == "left" and NEWS_STEPS + SETTLE_STEPS < FIRST_PATIENCE
    payback.new_stream()
    play(payback, 1, lambda step: 0.8)
    assert payback.state == "trial with"
    trials = 0
    for _ in range(2000):
        before = payback.state
        payback.new_stream()
        play(payback, 1, lambda step: 0.8)
        trials += before != payback.state == "trial with"
    assert trials < 2000 / NEWS_STEPS


def test_a_drafter_whose_time_costs_more_than_it_saves_is_left_however_fast_it_makes_the_worker() -> None:
    def left(usd_per_step: float, price: float = 3.6) -> str:
        payback = Payback()
        play(payback, 3 * WINDOW_STEPS, lambda step: 2.0, price=price, drafter_usd=usd_per_step)
        return payback.why if payback.state == "left" else ""

    saved_usd = 0.001 * PLAIN_S  # a step that gives two tokens saves another
    assert left(1.2 * saved_usd) == "dear"
    assert left(0.8 * saved_usd) == ""
    assert left(1.2 * saved_usd, price=0.0) == ""  # what a worker's time is worth is not known


def test_of_another_drafter_nothing_is_held_against_it() -> None:
    payback = Payback()
    play(payback, 1500, lambda step: 0.8)
    assert not payback.following
    payback.new_drafter()
    assert payback.following and payback.gain == 0.0 and payback.times_left == 1


def test_where_plain_steps_take_no_time_that_could_be_measured_nobody_loses_and_nothing_breaks() -> None:
    payback = Payback()
    for _ in range(20 * (WINDOW_STEPS + TRIAL_STEPS)):
        payback.observe(1, 1, PLAIN_S, 0.0)
    assert (payback.times_left, payback.gain) == (0, 1.0)
