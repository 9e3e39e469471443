"""Only as much is prepared as there is time for."""

from hypothesis import given
from hypothesis import strategies as st

from drafter.budget import LEAST_ROUND_S, SHARE, Budget


def measured(interval_s: float, proposal_s: float, streams: int = 1) -> Budget:
    budget = Budget()
    for number in range(200):
        budget.begin(number * interval_s)
        budget.end(number * interval_s + streams * proposal_s, streams)
    return budget


@given(st.floats(0.001, 0.5), st.floats(1e-6, 0.05), st.integers(1, 64), st.integers(0, 16))
def test_what_is_prepared_fits_into_the_share_of_the_time(interval_s: float, proposal_s: float, streams: int,
                                                          most: int) -> None:
    budget = measured(interval_s, proposal_s)
    branches = budget.branches(streams, most, backlog=False)
    assert 0 <= branches <= most
    assert not branches or streams * (1 + branches) * proposal_s <= SHARE * interval_s * 1.001
    if branches < most:
        assert streams * (2 + branches) * proposal_s > SHARE * interval_s * 0.999
    assert budget.branches(streams, most, backlog=True) == 0


def test_a_little_is_prepared_while_nothing_is_measured() -> None:
    budget = Budget()
    budget.begin(0.0)
    assert budget.branches(8, 4, backlog=False) == 1
    assert budget.branches(8, 0, backlog=False) == 0
    assert budget.seconds == float("inf")


def test_a_pause_says_nothing_about_how_often_rounds_come() -> None:
    budget = measured(0.01, 0.001)
    budget.begin(1000.0)
    assert abs((budget.interval_s or 0.0) - 0.01) < 1e-6


def test_a_round_to_catch_up_says_nothing_about_how_often_rounds_come() -> None:
    budget = measured(0.01, 0.001)
    last = 199 * 0.01
    for number in range(9):
        budget.begin(last + 0.001 * number, asked=False)
        assert abs(budget.end(last + 0.001 * number + 0.0005, 1) - 0.0005) < 1e-9
    budget.begin(last + 0.01)
    assert abs((budget.interval_s or 0.0) - 0.01) < 1e-6


def test_a_round_has_some_time_however_close_rounds_are() -> None:
    assert measured(0.0001, 0.00001).seconds == LEAST_ROUND_S


def test_the_share_of_the_time_that_is_worked_is_told_since_the_last_time() -> None:
    budget = Budget()
    assert budget.busy(0.0) == 0.0
    budget.begin(0.125)
    assert budget.end(0.375, 3) == 0.25
    assert budget.busy(1.0) == 0.25
    assert budget.busy(2.0) == 0.0
    budget.begin(2.0)
    budget.end(9.0, 1)
    assert budget.busy(3.0) == 1.0
