"""The statistics of `deploy.bench.departure`, against figures that can be worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.bench.departure import Departure, kl_divergence, log_softmax, perplexity_ratio, standard_error, wilson


def logits(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)


def chances(*rows: list[float]) -> np.ndarray:
    """Logits that have these probabilities."""
    return np.log(np.array(rows)).astype(np.float32)


def test_log_softmax_adds_up_to_one_and_does_not_overflow() -> None:
    found = log_softmax(logits([1000.0, 1000.0], [-1e30, 0.0]))
    assert np.exp(found).sum(axis=1) == pytest.approx([1, 1])
    assert found[0] == pytest.approx([-math.log(2)] * 2)


def test_kl_of_two_coins_is_what_the_formula_says() -> None:
    p, q = log_softmax(chances([0.5, 0.5])), log_softmax(chances([0.25, 0.75]))
    assert kl_divergence(p, q) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-6)
    assert kl_divergence(q, p) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), rel=1e-6)


@given(st.lists(st.floats(-30, 30, width=32), min_size=3, max_size=3), st.floats(-50, 50, width=32))
def test_kl_does_not_see_a_constant_added_to_all_logits(row: list[float], more: float) -> None:
    moved = logits(row) + np.float32(more)
    assert kl_divergence(log_softmax(logits(row)), log_softmax(moved))[0] < 1e-6


def test_wilsons_interval_has_the_textbook_values() -> None:
    assert wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_share_itself(case: tuple[int, int]) -> None:
    low, high = wilson(*case)
    assert 0 <= low <= case[0] / case[1] + 1e-12 and case[0] / case[1] - 1e-12 <= high <= 1


def test_a_perplexity_ratio_is_taken_pair_by_pair() -> None:
    ratio, error = perplexity_ratio([1.0, 5.0, 9.0], [1.1, 5.1, 9.1])
    assert ratio == pytest.approx(math.exp(0.1))
    assert error == pytest.approx(0, abs=1e-12)  # far apart as the positions are, each moved by the same


def test_the_standard_error_of_one_value_is_unknown() -> None:
    assert standard_error([3.0]) == math.inf
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)


def test_a_model_does_not_depart_from_itself() -> None:
    found = Departure()
    same = np.random.default_rng(1).normal(size=(150, 40)).astype(np.float32)
    found.add(same, same.copy(), np.arange(150, dtype=np.int32) % 40)
    figures = found.figures()
    assert figures["positions"] == 150
    assert figures["top1_agreement"] == 1 and figures["kl_max"] == 0
    assert figures["perplexity_ratio"] == 1 and figures["perplexity"] == figures["reference_perplexity"]


def test_figures_count_over_all_that_was_added() -> None:
    found = Departure()
    found.add(chances([0.6, 0.4]), chances([0.4, 0.6]), np.array([0], np.int32))
    found.add(chances([0.6, 0.4]), chances([0.6, 0.4]), np.array([1], np.int32))
    figures = found.figures()
    assert figures["top1_agreement"] == 0.5
    assert figures["kl_mean"] == pytest.approx(0.1 * math.log(1.5) * 2 / 2, rel=1e-5) == figures["kl_max"] / 2
    assert figures["reference_perplexity"] == pytest.approx((0.6 * 0.4) ** -0.5, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(0.4**-1, rel=1e-5)


def test_logits_that_do_not_belong_together_are_refused_and_not_counted() -> None:
    found = Departure()
    with pytest.raises(ValueError, match="do not belong"):
        found.add(logits([1, 2]), logits([1, 2, 3]), np.array([0], np.int32))
    with pytest.raises(ValueError, match="do not belong"):
        found.add(logits([1, 2]), logits([1, 2]), np.array([0, 1], np.int32))
    with pytest.raises(ValueError, match="no position"):
        found.figures()
