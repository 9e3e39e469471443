"""Chains of fused multiply-adds round each sum once, however it lies."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.native import fused, specification

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in cast")

Floats = NDArray[np.float32]

LARGEST = float(np.finfo(np.float32).max)
LEAST = 2.0**-149


def rounded(exact: Fraction) -> np.float32:
    """The nearest float32, ties to even."""
    size = abs(exact)
    if size == 0:
        return np.float32(0)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - 23, -149)
    nearest = round(exact / unit) * unit
    if abs(nearest) >= 2**128:
        return np.float32(np.inf if exact > 0 else -np.inf)
    return np.float32(float(nearest))


def exact_chain(factors: Floats, others: Floats, start: np.float32) -> np.float32:
    total = start
    for x, y in zip(factors.tolist(), others.tolist(), strict=True):
        if np.isinf(total):
            return total
        total = rounded(Fraction(x) * Fraction(y) + Fraction(float(total)))
    return total


def fma(x: float, y: float, z: float, *, coarse: bool = False) -> np.float32:
    terms = np.multiply(np.array([[x]], np.float32), np.float32(y), dtype=np.float64)
    return np.float32(fused.chain(terms, np.array([z], np.float32), coarse=coarse)[0])


anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
whole_or_half = st.one_of(
    st.integers(-61000, 61000).map(float), st.floats(width=16, allow_nan=False, allow_infinity=False)
)


@settings(deadline=None, max_examples=200)
@given(anything, anything, anything)
def test_any_three_numbers_round_once(x: float, y: float, z: float) -> None:
    assert fma(x, y, z) == exact_chain(np.float32([x]), np.float32([y]), np.float32(z))


@settings(deadline=None, max_examples=200)
@given(anything, whole_or_half, anything)
def test_coarse_terms_round_once_too(x: float, y: float, z: float) -> None:
    assert fma(x, y, z, coarse=True) == exact_chain(np.float32([x]), np.float32([y]), np.float32(z))


@settings(deadline=None, max_examples=200)
@given(
    st.integers(2**23, 2**24 - 1),
    st.integers(-149, 100),
    st.integers(-(2**12), 2**12),
    st.sampled_from([1, -1]),
    st.booleans(),
)
def test_sums_beside_a_tie_round_once(fraction: int, exponent: int, off: int, sign: int, coarse: bool) -> None:
    """Half a unit of z, times (1 + off / 2^23)(1 - off / 2^23): less than half, often by what float64 cannot hold."""
    z = float(np.ldexp(float(fraction), exponent))
    half = sign * np.ldexp(1.0, exponent - 1)
    x, y = half * (1 + off * 2.0**-23), 1 - off * 2.0**-23
    if abs(x) < LEAST or z > LARGEST:
        return
    x, y = float(np.float32(x)), float(np.float32(y))
    coarse = coarse and x * y % 2.0**-178 == 0
    assert fma(x, y, z, coarse=coarse) == exact_chain(np.float32([x]), np.float32([y]), np.float32(z))


def test_a_sum_that_rounding_twice_gets_wrong_is_mended() -> None:
    x, y, z = np.float32(2.0**-24 * (1 + 2.0**-15)), np.float32(1 - 2.0**-15), np.float32(1 + 2.0**-23)
    twice = np.float32(float(x) * float(y) + float(z))
    assert twice != rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
    assert fma(x, y, z) == fma(x, y, z, coarse=True) == z


@pytest.mark.parametrize("sign", [1, -1])
def test_the_edges_of_the_range_round_once(sign: int) -> None:
    half_unit = 2.0**103  # of the largest number
    assert fma(sign, half_unit, sign * LARGEST) == sign * np.inf
    assert fma(sign * half_unit, 1 - 2.0**-24, sign * LARGEST) == np.float32(sign * LARGEST)
    assert fma(sign * LARGEST, LARGEST, 0) == sign * np.inf
    assert fma(sign * LEAST, 0.5, 0) == 0
    assert fma(sign * LEAST, 0.5 + 2.0**-24, 0) == np.float32(sign * LEAST)
    assert fma(sign * 2.0**-75, 2.0**-75, sign * LEAST) == np.float32(sign * 2 * LEAST)
    assert fma(sign * 2.0**-75, 2.0**-76, sign * LEAST) == np.float32(sign * LEAST)
    # 2^-127 and a tie below it, nudged by less than float64 can hold
    assert fma(sign * 2.0**-100 * (1 + 2.0**-23), 2.0**-50 * (1 - 2.0**-24), sign * 2.0**-127) == rounded(
        sign * (Fraction(2) ** -127 + Fraction(2) ** -150 * (1 + Fraction(1, 2**23)) * (1 - Fraction(1, 2**24)))
    )


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from([0, 4, 12, 20]), st.booleans())
def test_a_chain_is_its_sums_one_after_the_other(state: int, terms: int, dropped_bits: int, starts: bool) -> None:
    """Fewer bits in a number make more ties."""
    random = np.random.default_rng(state)

    def numbers(*shape: int) -> Floats:
        return (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> dropped_bits << dropped_bits).view(
            np.float32
        )

    x, y = numbers(terms, 40), numbers(terms, 40)
    start = numbers(40) if starts else np.zeros(40, np.float32)
    before = start.copy()
    found = fused.chain(np.multiply(x, y, dtype=np.float64), start if starts else None)
    expected = [exact_chain(x[:, at], y[:, at], start[at]) for at in range(40)]
    assert found.tolist() == expected
    assert (start == before).all()


def test_a_chain_goes_on_where_one_ended() -> None:
    terms = np.random.default_rng(1).standard_normal((30, 500)).astype(np.float32).astype(np.float64)
    assert (fused.chain(terms[10:], fused.chain(terms[:10])) == fused.chain(terms)).all()


def test_the_exponential_is_the_specification_s() -> None:
    random = np.random.default_rng(2)
    x = np.concatenate(
        [random.uniform(-100, 100, 60000), random.standard_normal(60000), np.linspace(-1, 1, 60001), [-np.inf, 1e-42]]
    ).astype(np.float32)
    found, expected = fused.exponential(x), specification.exponential(x)
    assert (found.view(np.uint32) == expected.view(np.uint32)).all()
    few = np.round(x * 64) / np.float32(64)
    assert (fused.exponential(few) == specification.exponential(few)).all()


def test_lanes_are_added_as_the_specification_says() -> None:
    x = np.random.default_rng(3).standard_normal((3, 96)).astype(np.float32)
    found = fused.tree_sum(fused.chain(fused.in_lanes(np.multiply(x, x, dtype=np.float64))))
    assert found.tolist() == [specification.lane_sums(row, row) for row in x]
