"""GGML's blocks of quantised weights, taken apart: integers on a grid, and what they are multiplied by.

Rule: nothing is rounded. A scale that a block keeps as a product (an fp16 factor times six or eight bits) has at most
19 bits, which float32 holds; so has a minimum. Layouts are GGML's (ggml-common.h), little endian.

    weight = scale * code + minimum          per group of 32 inputs
    Q6_K   = factor * (scale * code)         with a scale for each half of a group, int8: an integer all the same
    MXFP4  = 2^(exponent - 128) * code       the code, a float of four bits, counted in halves: 0 to 12 with a sign
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GROUP = 32
SUPER = 256  # weights of a block of a K kind
GROUPS = SUPER // GROUP
# Bytes of a block; of 32 weights, of K kinds of 256.
BLOCK_BYTES = {
    "Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34, "MXFP4": 17, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210,
}  # fmt: skip
SUPER_KINDS = ("Q4_K", "Q5_K", "Q6_K")
# Bytes that 32 weights of one output take in the native step's panels (linear.hpp).
PANEL_BYTES = {
    "Q4_0": 20.0, "Q4_1": 20.0, "Q5_0": 36.0, "Q5_1": 36.0, "Q8_0": 34.0, "MXFP4": 17.0,
    "Q4_K": 18.5, "Q5_K": 34.5, "Q6_K": 34.5,
}  # fmt: skip
FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # by nibble, in halves
E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)  # by exponent, of weights in halves


class Grid(NamedTuple):
    """Weights [outputs, groups * 32]."""

    codes: NDArray[np.int8]  # [outputs, groups, 32]
    scales: Floats  # [outputs, groups]; of Q6_K its factors
    minima: Floats | None  # [outputs, groups]
    halves: NDArray[np.int8] | None = None  # [outputs, groups, 2] scales of each half of a group: Q6_K


def taken_apart(kind: str, rows: Bytes) -> Grid:
    """The stored rows [outputs, bytes] of a matrix. `kind` is one of BLOCK_BYTES."""
    blocks = np.ascontiguousarray(rows).reshape(len(rows), -1, BLOCK_BYTES[kind])
    match kind:
        case "Q4_0":
            scales = _halves(blocks[..., :2])[..., 0]
            return Grid(_nibbles(blocks[..., 2:]), scales, np.float32(-8) * scales)
        case "Q4_1":
            heads = _halves(blocks[..., :4])
            return Grid(_nibbles(blocks[..., 4:]), heads[..., 0], heads[..., 1])
        case "Q5_0":
            scales = _halves(blocks[..., :2])[..., 0]
            return Grid(_nibbles(blocks[..., 6:]) | _fifths(blocks[..., 2:6]), scales, np.float32(-16) * scales)
        case "Q5_1":
            heads = _halves(blocks[..., :4])
            return Grid(_nibbles(blocks[..., 8:]) | _fifths(blocks[..., 4:8]), heads[..., 0], heads[..., 1])
        case "Q8_0":
            return Grid(np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _halves(blocks[..., :2])[..., 0], None)
        case "MXFP4":
            nibbles, exponents = fours(rows)
            return Grid(FP4[nibbles], E8M0[exponents], None)
        case "Q4_K":
            return _with_factors(blocks, _paired(blocks[..., 16:]))
        case "Q5_K":
            fifths = blocks[..., None, 16:48] >> np.arange(GROUPS, dtype=np.uint8)[:, None] & 1
            return _with_factors(blocks, _paired(blocks[..., 48:]) | (fifths << 4).astype(np.int8))
        case "Q6_K":
            return _sixes(blocks)
    raise ValueError(f"{kind} is no kind of quantised weights that is known here: {', '.join(BLOCK_BYTES)}")


def fours(rows: Bytes) -> tuple[NDArray[np.int8], Bytes]:
    """Rows of MXFP4 [outputs, bytes]: nibbles [outputs, groups, 32], for FP4, and exponents [outputs, groups]."""
    blocks = np.ascontiguousarray(rows).reshape(len(rows), -1, BLOCK_BYTES["MXFP4"])
    return _nibbles(blocks[..., 1:]), blocks[..., 0]


def _halves(stored: Bytes) -> Floats:
    return np.ascontiguousarray(stored).view(np.float16).astype(np.float32)


def _nibbles(stored: Bytes) -> NDArray[np.int8]:
    """[..., 16] bytes as 32 codes: the low nibbles, then the high ones."""
    return np.concatenate((stored & 15, stored >> 4), -1).astype(np.int8)


def _fifths(stored: Bytes) -> NDArray[np.int8]:
    """[..., 4] bytes as 32 fifth bits, in their place."""
    return (np.unpackbits(np.ascontiguousarray(stored), axis=-1, bitorder="little") << 4).astype(np.int8)


def _paired(stored: Bytes) -> NDArray[np.int8]:
    """[..., 128] bytes as [..., 8, 32] codes: of each 32 bytes the low nibbles are a group, the high ones the next."""
    parts = stored.reshape(*stored.shape[:-1], GROUPS // 2, GROUP)
    return np.stack((parts & 15, parts >> 4), -2).reshape(*stored.shape[:-1], GROUPS, GROUP).astype(np.int8)


def _with_factors(blocks: Bytes, codes: NDArray[np.int8]) -> Grid:
    """Q4_K and Q5_K: two fp16 factors, then eight scales and eight minima of six bits in twelve bytes."""
    outputs = len(blocks)
    factors, packed = _halves(blocks[..., :4]), blocks[..., 4:16]
    low, minima, high = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6) << 4), -1)
    offsets = np.concatenate((minima & 63, (high >> 4) | (minima >> 6) << 4), -1)
    return Grid(
        codes.reshape(outputs, -1, GROUP),
        (factors[..., :1] * scales).astype(np.float32).reshape(outputs, -1),
        (-factors[..., 1:] * offsets).astype(np.float32).reshape(outputs, -1),
    )


def _sixes(blocks: Bytes) -> Grid:
    """Q6_K: per 128 weights 64 bytes of low nibbles and 32 of two high bits; then 16 scales and a factor."""
    outputs = len(blocks)
    lows = blocks[..., :128].reshape(*blocks.shape[:-1], 2, 2, GROUP)
    lows = np.stack((lows & 15, lows >> 4), -3).reshape(*blocks.shape[:-1], 2, 4, GROUP)
    highs = blocks[..., 128:192].reshape(*blocks.shape[:-1], 2, 1, GROUP)
    highs = highs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = (lows | highs << 4).astype(np.int8) - np.int8(32)
    factors = np.repeat(_halves(blocks[..., 208:210]), GROUPS, -1)
    halves = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8)
    return Grid(
        codes.reshape(outputs, -1, GROUP), factors.reshape(outputs, -1), None, halves.reshape(outputs, -1, 2)
    )
