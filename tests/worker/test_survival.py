"""What drafts turn out to be worth, by drafter, place and what is said of them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.survival import MOST_DRAFTERS, UNSAID, Survival

stated_ = st.lists(st.one_of(st.just(UNSAID), st.integers(0, 255)), max_size=12)


@given(stated_, st.lists(st.tuples(stated_, st.integers(0, 12)), max_size=30), st.floats(0.01, 20))
def test_reach_falls_along_a_draft_and_is_a_probability_whatever_was_seen(
        stated: list[int], seen: list[tuple[list[int], int]], luck: float) -> None:
    survival = Survival()
    for draft, agreed in seen:
        survival.learn("d", draft, min(agreed, len(draft)))
        survival.pass_by("d", draft, min(agreed, len(draft)))
    reach = survival.reach("d", stated, luck)
    assert len(reach) == len(stated)
    assert all(0.0 <= late <= early <= 1.0 for early, late in zip([1.0, *reach], reach, strict=False))


@pytest.mark.parametrize("truth", [0.05, 0.3, 0.9])
def test_what_is_said_comes_to_mean_what_it_turned_out_to_be_worth(truth: float) -> None:
    rng, survival = random.Random(1), Survival()
    for _ in range(2000):
        survival.learn("d", [250], int(rng.random() < truth))
    assert survival.reach("d", [250])[0] == pytest.approx(truth, abs=0.1)
    # neither what is said otherwise, nor another place, nor another drafter has anything to do with it
    assert survival.reach("d", [100])[0] == Survival().reach("d", [100])[0]
    assert survival.reach("e", [250])[0] == Survival().reach("e", [250])[0]
    late = [reach / before for before, reach in zip(survival.reach("d", [0, 250]), survival.reach("d", [0, 250])[1:],
                                                   strict=False)]
    assert late[0] == pytest.approx(Survival().reach("d", [250])[0])


def test_what_stands_behind_the_first_difference_teaches_nothing() -> None:
    one, other = Survival(), Survival()
    one.learn("d", [200, 200, 200, 200], 1)
    other.learn("d", [200, 200], 1)
    assert one.reach("d", [200] * 8) == other.reach("d", [200] * 8)


def test_a_stream_that_does_worse_than_others_is_believed_less_and_forgiven_when_it_is_not_tried() -> None:
    survival, luck = Survival(), 1.0
    for _ in range(20):
        luck = survival.learn("d", [250, 250], 0, luck)
        survival.learn("d", [250, 250], 2)
    assert survival.reach("d", [250], luck)[0] < 0.5 < survival.reach("d", [250])[0]
    for _ in range(400):
        luck = survival.pass_by("d", [250], 0, luck)
    assert luck == pytest.approx(1.0, abs=0.01)


def test_what_is_never_tried_is_believed_again_one_day() -> None:
    survival = Survival()
    for _ in range(300):
        survival.learn("d", [250], 0)
    hopeless = survival.reach("d", [250])[0]
    for _ in range(500):
        survival.pass_by("d", [250], 0)
    assert hopeless < 0.05
    assert survival.reach("d", [250])[0] > 0.7


def test_drafters_are_bounded_by_number() -> None:
    survival = Survival()
    survival.learn("first", [250], 0)
    for number in range(MOST_DRAFTERS):
        survival.learn(f"d{number}", [250], 1)
    assert len(survival._records) == MOST_DRAFTERS
    assert survival.reach("first", [250]) == Survival().reach("d", [250])
