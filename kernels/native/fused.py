"""Chains of fused multiply-adds on whole arrays, to the bit, for the native step's numbers without its compiler.

A product of two float32 numbers is exact in float64. Adding it to a float32 number there, and rounding the sum to
float32, rounds twice. That equals rounding once unless the first rounding moved a number onto a tie of the second. So
sums are taken the quick way and looked through for ties. Nearly all of those were exact sums, as the error of the
addition, itself exact, tells. If one was not, the chain is taken again with `specification.fma`.

Below the smallest normal float32 number ties lie elsewhere, and every inexact sum counts as one.
"""

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kernels.native import specification
from kernels.native.specification import LANES, fma

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_BELOW = 0x1FFFFFFF  # the bits of a float64 fraction that float32 has no room for
_TIE = 0x10000000
_LEAST_NORMAL = np.finfo(np.float32).tiny
_ONE = np.float32(1)
_COEFFICIENTS = [float(np.float32(c)) for c in (1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)]


def chain(terms: Doubles, start: Floats | None = None, *, coarse: bool = False) -> Floats:
    """start + terms[0] + terms[1] + ... with each sum rounded to float32; a chain of fma where terms are products.

    `terms` [T, ...] are products of two float32 numbers each. `coarse`: all are multiples of 2^-178, as products are
    in which one number is an integer or came from fp16. Their sums below 2^-126 are exact, and not looked at.
    """
    first = np.zeros(terms.shape[1:], np.float32) if start is None else start
    sums = np.empty_like(terms)
    total = first.copy()
    for term, exact in zip(terms, sums, strict=True):
        np.add(term, total, out=exact)
        total[...] = exact
    suspects = np.flatnonzero(_suspects(sums, coarse))
    if not suspects.size:
        return total
    before = suspects - first.size
    previous = np.where(before < 0, first.reshape(-1)[before % first.size], sums.reshape(-1)[before].astype(np.float32))
    if not _inexact(terms.reshape(-1)[suspects], previous.astype(np.float64), sums.reshape(-1)[suspects]).any():
        return total
    total = first
    for term in terms:
        total = fma(term, _ONE, total)
    return total


def exponential(x: Floats) -> Floats:
    """As `specification.exponential`, which is asked again where a sum is suspect."""
    clamped = np.maximum(np.minimum(x, np.float32(88)), np.float32(-87))
    n = np.rint(clamped * np.float32(1.44269504))
    # both sums fit float64: n is 0, or all are multiples of 2^-36 below 2^7
    r = _rounded(np.multiply(n, np.float32(-0.693359375), dtype=np.float64) + clamped)
    r = _rounded(np.multiply(n, np.float32(2.12194440e-4), dtype=np.float64) + r)
    sums = np.empty((len(_COEFFICIENTS), *x.shape))  # none is below 2^-126
    total: Doubles = np.full_like(r, np.float32(1 / 720))
    for exact, coefficient in zip(sums, _COEFFICIENTS, strict=True):
        np.multiply(total, r, out=exact)
        exact += coefficient
        total = _rounded(exact)
    powers = np.left_shift(n.astype(np.int32) + 127, 23).view(np.float32)
    result: Floats = total.astype(np.float32) * powers
    suspects = _suspects(sums, coarse=True).any(0)
    if suspects.any():
        result[suspects] = specification.exponential(x[suspects])
    return result


_Numbers = TypeVar("_Numbers", Floats, Doubles)


def in_lanes(x: _Numbers) -> _Numbers:
    """[..., n * 16] as [n, ..., 16]."""
    return np.moveaxis(x.reshape(*x.shape[:-1], -1, LANES), -2, 0)


def tree_sum(lanes: Floats) -> Floats:
    """Sixteen lanes [..., 16] added as the recipe says: i and i + 8, then i + 4, i + 2, i + 1."""
    while (half := lanes.shape[-1] // 2) > 0:
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _rounded(x: Doubles) -> Doubles:
    """To float32, and back."""
    return x.astype(np.float32).astype(np.float64)


def _suspects(sums: Doubles, coarse: bool) -> NDArray[np.bool_]:
    """Where the float32 nearest to a sum may not be the one nearest to what was added."""
    suspects: NDArray[np.bool_] = (sums.view(np.int64) & _BELOW) == _TIE
    if not coarse:
        small = np.abs(sums) < _LEAST_NORMAL
        if small.any():
            suspects |= small & (sums != 0)
    return suspects


def _inexact(x: Doubles, y: Doubles, total: Doubles) -> NDArray[np.bool_]:
    """Where x + y is not `total`, its rounded sum (Knuth's two-sum)."""
    back = total - x
    found: NDArray[np.bool_] = (x - (total - back)) + (y - back) != 0
    return found
