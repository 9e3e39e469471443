"""What the isolation benchmark says of measurements: no effect where there is none, and one where there is."""

import random

import pytest

from deploy.bench import isolation, paired
from gateway.tokenizer import Tokenizer
from tests.models import default_folder


def test_a_difference_is_taken_pair_by_pair() -> None:
    assert paired.differences([3.0, 5.0] * 3, [1.0, 6.0] * 3) == [2.0, -1.0] * 3
    for first, second in (([1.0] * 6, [1.0] * 5), ([1.0] * 5, [1.0] * 5)):
        with pytest.raises(ValueError, match="equally many, 6 or more"):
            paired.differences(first, second)


def test_known_intervals() -> None:
    # order statistics 2 and 9 of 10, 6 and 15 of 20, as tables of the sign test have them
    assert paired.median([float(value) for value in range(10)]) == (4.5, 1.0, 8.0)
    assert paired.median([float(value) for value in range(20)]) == (9.5, 5.0, 14.0)
    assert paired.mean([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((3.5, 1.537, 5.463), abs=0.03)
    assert paired.share(30, 60) == pytest.approx((0.5, 0.377, 0.623), abs=0.001)
    assert paired.share(60, 60) == pytest.approx((1.0, 0.940, 1.0), abs=0.001)


@pytest.mark.parametrize("estimate", [paired.mean, paired.median])
def test_an_interval_holds_the_truth_about_as_often_as_it_says_also_with_pauses_in_it(estimate: object) -> None:
    chooser, held = random.Random(5), 0
    for _ in range(600):
        # pauses hit both sides of a pair alike
        values = [2.0 + chooser.gauss(0, 1) + chooser.choice((0, 0, 0, 0, 9, -9)) for _ in range(40)]
        held += estimate(values).holds(2.0)  # type: ignore[operator]
    assert 0.93 <= held / 600 <= 0.985


def measured(probe_ms: float, seed: int = 1, count: int = 60) -> dict[str, list[float]]:
    chooser = random.Random(seed)
    means = {"probe": probe_ms, "fresh": 50.0, "repeat": 10.0}
    return {kind: [(mean + chooser.gauss(0, 3)) / 1000 for _ in range(count)] for kind, mean in means.items()}


def test_a_row_tells_a_leak_from_none() -> None:
    cached = {"probe": 0, "fresh": 0, "repeat": 960}
    quiet = isolation.row("mock", measured(50.0), cached)
    low, high = quiet["effect_median_ms_95"]
    assert low <= 0 <= high and quiet["effect_guessed_95"][0] < 0.5 < quiet["effect_guessed_95"][1]
    assert quiet["control_median_ms_95"][1] < -35 and quiet["control_guessed"] == 1.0
    assert (quiet["probe_cached_tokens"], quiet["repeat_cached_tokens"]) == (0, 960)
    assert "0 tokens were cached" in "\n".join(isolation.lines(quiet))
    leaking = isolation.row("mock", measured(45.0), cached)
    assert leaking["effect_median_ms_95"][1] < 0 and leaking["effect_guessed_95"][0] > 0.5


def test_no_two_texts_begin_alike_and_each_has_as_many_tokens_as_asked_for() -> None:
    tokenizer = Tokenizer.load(default_folder())
    texts = isolation.Texts(tokenizer, 64)
    made = [texts.new() for _ in range(40)]
    ids = [tokenizer.encode(text, add_special=False) for text in made]
    assert len({tuple(each[:8]) for each in ids}) == 40
    assert all(60 <= len(each) <= 68 for each in ids)
    assert isolation.Texts(tokenizer, 64).new() == made[0]
