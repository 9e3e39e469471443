"""Outcomes come likeliest first, and none that is likelier was left out."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafter.outcomes import Outcome, likely_outcomes, power_law

chances = st.floats(0.0, 1.0)


@st.composite
def descending(draw: st.DrawFn) -> list[float]:
    return sorted(draw(st.lists(st.floats(0.0, 0.5), max_size=4)), reverse=True)


def every_outcome(agreement: list[float], others: list[list[float]], cap: int) -> list[Outcome]:
    found = []
    reach = 1.0
    for place, (right, tokens) in enumerate(zip(agreement, others, strict=False)):
        found += [Outcome(place, rank, reach * (1.0 - right) * token) for rank, token in enumerate(tokens[:cap])]
        reach *= right
    return found


@given(st.lists(chances, max_size=6), st.lists(descending(), max_size=6), st.integers(0, 12), st.integers(0, 4),
       st.floats(0.0, 0.3))
def test_the_likeliest_outcomes_are_found(agreement: list[float], others: list[list[float]], most: int, cap: int,
                                          least: float) -> None:
    found = likely_outcomes(agreement, others, most, cap, least)
    every = [outcome for outcome in every_outcome(agreement, others, cap) if outcome.probability >= least]
    assert len(found) == min(most, len(every))
    assert all(before.probability >= after.probability for before, after in pairwise(found))
    best = sorted((outcome.probability for outcome in every), reverse=True)[:most]
    assert [outcome.probability for outcome in found] == pytest.approx(best)
    assert len({(outcome.agreed, outcome.rank) for outcome in found}) == len(found)
    for agreed, rank, _ in found:
        assert rank < cap
        # an alternative is never prepared for before a likelier one of its place
        assert all((agreed, lower) in {(outcome.agreed, outcome.rank) for outcome in found} for lower in range(rank))


def test_the_fan_out_falls_with_the_place_as_agreement_does_and_is_capped() -> None:
    unknown = power_law(8)
    for right in (0.5, 0.7, 0.9):
        found = likely_outcomes([right] * 8, [unknown] * 8, 24, 6)
        fan = [sum(1 for outcome in found if outcome.agreed == place) for place in range(8)]
        assert sum(fan) == 24 and max(fan) <= 6
        assert fan == sorted(fan, reverse=True)


def test_where_a_token_is_sure_nothing_else_is_prepared_for() -> None:
    assert likely_outcomes([1.0, 0.5], [[0.5], [0.5]], 4, 2, 0.01) == [Outcome(1, 0, 0.25)]


@given(st.integers(0, 50), st.floats(0.1, 3.0))
def test_unknown_alternatives_fall_by_a_power_and_are_no_more_than_all(count: int, decay: float) -> None:
    likely = power_law(count, decay)
    assert len(likely) == count
    assert likely == sorted(likely, reverse=True)
    assert sum(likely) <= 1.0
    assert sum(likely) == pytest.approx(1.0 - (count + 1) ** -decay)
