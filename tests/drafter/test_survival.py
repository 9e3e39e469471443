"""What happened is what is believed."""

import random

import pytest

from drafter.survival import LENGTHS, Calibration, Luck, Source, Survival, cell


def test_longer_and_more_frequent_phrases_are_believed_more_before_anything_was_seen() -> None:
    first = Survival().probability
    for source in Source:
        by_length = [first[cell(source, length, 1, 1)] for length in LENGTHS]
        assert by_length == sorted(by_length)
    assert first[cell(Source.OWN, 4, 9, 9)] > first[cell(Source.OWN, 4, 1, 1)] > first[cell(Source.OWN, 4, 1, 9)]


def test_every_guess_has_a_cell_and_only_like_ones_share_it() -> None:
    known = range(len(Survival().probability))
    cells = {(source, length, times, total): cell(source, length, times, total)
             for source in Source for length in range(1, 200) for total in range(1, 8) for times in range(1, total + 1)}
    assert set(cells.values()) <= set(known)
    assert cells[Source.OWN, 100, 1, 1] == cells[Source.OWN, 199, 1, 1]
    assert len({cells[source, 5, 1, 1] for source in Source}) == len(Source)


@pytest.mark.parametrize("truth", [0.1, 0.6, 0.95])
def test_a_cell_comes_to_what_is_true_of_it_and_leaves_others_alone(truth: float) -> None:
    rng = random.Random(1)
    survival = Survival()
    taught, other = cell(Source.OWN, 3, 1, 1), cell(Source.OWN, 3, 2, 2)
    before = survival.probability[other]
    for _ in range(3000):
        survival.learn(taught, rng.random() < truth)
    assert abs(survival.probability[taught] - truth) < 0.06
    assert survival.probability[other] == before


def test_luck_shifts_the_odds_of_a_stream_and_stays_bounded() -> None:
    lucky, unlucky = Luck(), Luck()
    assert lucky.of(0.3) == pytest.approx(0.3)
    for _ in range(500):
        lucky.learn(lucky.of(0.5), True)
        unlucky.learn(unlucky.of(0.5), False)
    assert 0.8 < lucky.of(0.5) < 0.95
    assert 0.05 < unlucky.of(0.5) < 0.2
    assert lucky.of(1.0) == 1.0 and unlucky.of(0.0) == 0.0


@pytest.mark.parametrize("truth", [0.2, 0.5, 0.9])
def test_a_stream_that_is_as_usual_has_no_luck(truth: float) -> None:
    rng = random.Random(2)
    luck = Luck()
    shown = []
    for _ in range(4000):
        shown.append(luck.of(truth))
        luck.learn(shown[-1], rng.random() < truth)
    assert abs(sum(shown) / len(shown) - truth) < 0.07


def test_a_stated_probability_is_taken_for_what_it_turned_out_to_mean() -> None:
    rng = random.Random(3)
    meaning = Calibration()
    assert abs(meaning.of(0.95) - 0.95) < 1e-9
    for _ in range(2000):
        meaning.learn(0.95, rng.random() < 0.4)
    assert abs(meaning.of(0.95) - 0.4) < 0.06
    assert abs(meaning.of(0.55) - 0.55) < 1e-9
    assert meaning.of(1.0) == meaning.of(0.95) and meaning.of(-1.0) == meaning.of(0.0)
