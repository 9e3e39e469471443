"""The slope that decides whether a process grows."""

import math
import random

import pytest

from deploy.bench.slope import correlation, fit, student_975


def noisy(slope: float, noise: float, seed: int, count: int = 240, memory: float = 0.0) -> tuple[list[float], ...]:
    chooser = random.Random(seed)
    times = [float(number) for number in range(count)]
    values, wander = [], 0.0
    for time in times:
        wander = memory * wander + chooser.gauss(0.0, noise)
        values.append(100.0 + slope * time + wander)
    return times, values


def test_a_straight_line_gives_its_own_slope_and_no_doubt() -> None:
    found = fit([1.0, 2.0, 3.0, 4.0], [5.0, 7.0, 9.0, 11.0])
    assert found == pytest.approx((2.0, 2.0, 2.0))
    assert found.grows(1.9) and not found.grows(2.1)


def test_a_constant_does_not_grow() -> None:
    found = fit([0.0, 1.0, 2.0, 3.0], [7.0] * 4)
    assert found == (0.0, 0.0, 0.0)
    assert not found.grows()


def test_the_interval_holds_the_true_slope_about_as_often_as_it_says() -> None:
    held = sum(low <= 0.01 <= high for seed in range(400)
               for _, low, high in [fit(*noisy(0.01, 1.0, seed))])
    assert 0.92 <= held / 400 <= 0.985


def test_samples_that_resemble_their_neighbours_widen_the_interval() -> None:
    held = sum(low <= 0.0 <= high for seed in range(400)
               for _, low, high in [fit(*noisy(0.0, 1.0, seed, memory=0.8))])
    assert held / 400 >= 0.9


def test_a_leak_above_the_noise_is_found_and_one_step_up_is_not_taken_for_one() -> None:
    times, values = noisy(0.02, 0.5, 1)
    assert fit(times, values).grows()
    step = [100.0 + (time > 120) for time in times]
    assert not fit(times, step).grows()


@pytest.mark.parametrize("times", [[], [1.0], [1.0, 2.0], [3.0, 3.0, 3.0]])
def test_too_few_samples_decide_nothing(times: list[float]) -> None:
    found = fit(times, [5.0 + number for number in range(len(times))])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert not found.grows()


def test_times_and_values_must_be_of_one_number() -> None:
    with pytest.raises(ValueError, match="2 times and 1 values"):
        fit([1.0, 2.0], [1.0])


def test_residuals_without_order_have_no_correlation_and_alternating_ones_count_as_such() -> None:
    assert correlation([1.0, -1.0] * 20) == 0.0
    assert correlation([0.0] * 5) == 0.0
    assert correlation([1.0] * 20 + [-1.0] * 20) > 0.9


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228),
                                                  (30, 2.042), (1000, 1.962)])
def test_students_quantile_is_that_of_the_tables(freedom: float, quantile: float) -> None:
    assert student_975(freedom) == pytest.approx(quantile, rel=0.012)
