"""What steps of many rows cost, where rows come in blocks."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.row_cost import RowCost

# as measured: eight rows cost little more than one, sixteen twice as much
MEASURED = {1: 0.0043, 2: 0.0044, 4: 0.0049, 8: 0.0063, 16: 0.0112, 32: 0.021}


def table(costs: dict[int, float]) -> RowCost:
    cost = RowCost()
    for rows, seconds in costs.items():
        cost.measure(rows, seconds)
    return cost


def test_what_was_measured_is_said_and_between_and_beyond_the_way_is_straight() -> None:
    cost = table(MEASURED)
    for rows, seconds in MEASURED.items():
        assert cost.seconds(rows) == pytest.approx(seconds)
    assert cost.seconds(12) == pytest.approx((0.0063 + 0.0112) / 2)
    assert cost.seconds(64) == pytest.approx(0.021 + 2 * (0.021 - 0.0112))


def test_nothing_is_known_of_a_single_measurement() -> None:
    assert not table({}).known
    assert not table({4: 0.1}).known
    assert not table({4: 0.1, 8: 0.0}).known
    assert table({4: 0.1, 8: 0.2}).known


def test_a_machine_that_becomes_slower_is_slower_for_all_rows() -> None:
    cost = table(MEASURED)
    for _ in range(200):
        cost.observe(1, 0.0086)
    for rows, seconds in MEASURED.items():
        assert cost.seconds(rows) == pytest.approx(2 * seconds, rel=0.05)


def test_rows_that_cost_more_than_was_measured_are_learned_to() -> None:
    rng, cost = random.Random(1), table(MEASURED)
    for _ in range(1500):
        rows = rng.choice((1, 4, 8))
        cost.observe(rows, MEASURED[rows] * (1.5 if rows == 8 else 1.0) * rng.uniform(0.97, 1.03))
    assert cost.seconds(8) / cost.seconds(1) == pytest.approx(1.5 * 0.0063 / 0.0043, rel=0.08)
    assert cost.seconds(4) / cost.seconds(1) == pytest.approx(0.0049 / 0.0043, rel=0.08)


def test_a_pause_of_the_machine_is_no_cost() -> None:
    cost = table(MEASURED)
    cost.observe(4, 10.0)
    assert cost.seconds(4) < 1.1 * MEASURED[4]


@given(st.dictionaries(st.integers(1, 64), st.floats(0.0001, 1.0), min_size=2, max_size=6),
       st.lists(st.tuples(st.integers(1, 200), st.floats(0.0, 10.0)), max_size=60))
def test_whatever_was_seen_more_rows_never_cost_less(measured: dict[int, float], seen: list[tuple[int, float]]) -> None:
    cost = table(dict(sorted(measured.items())))
    for rows, seconds in seen:
        cost.observe(rows, seconds)
    costs = [cost.seconds(rows) for rows in range(1, 200)]
    assert all(0.0 < less <= more * (1 + 1e-9) for less, more in itertools.pairwise(costs))
