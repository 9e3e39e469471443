"""Weight matrices of the torch decoder: dense, or in the four bits that a checkpoint stores them in.

Rule: nothing is rounded on the way. Scales and minima that a block keeps as a product stay float32, as
`kernels.native.grids` takes them apart; the others stay as stored. Scales of compressed-tensors are float16 where that
holds all of a matrix, as it mostly does of bfloat16, and float32 where not.

Matrices that read the same input lie below each other. Where they are stored in different kinds, neighbours of one kind
are one, and their products stand side by side.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.checkpoint import Raw
from kernels.compressed_tensors import FOUR_BIT_KINDS, grouped
from kernels.native.grids import GROUP, fours, taken_apart
from kernels.ops import Ops
from kernels.weight4 import Weight4, packed

# Kinds of GGML with codes of four bits, and a scale for 32 of them; those of compressed-tensors.
FOUR_BITS = ("Q4_0", "Q4_1", "Q4_K", "MXFP4", *FOUR_BIT_KINDS)


class Stacked(NamedTuple):
    """Matrices of different kinds that read the same input."""

    parts: tuple[Tensor | Weight4, ...]


Matrix = Tensor | Weight4 | Stacked


def multiply(ops: Ops, x: Tensor, matrix: Matrix) -> Tensor:
    """x [R, inputs] times the transpose of the matrix [outputs, inputs]: [R, outputs] in the type of x."""
    if isinstance(matrix, Stacked):
        return torch.cat([multiply(ops, x, part) for part in matrix.parts], 1)
    return ops.linear4(x, matrix) if isinstance(matrix, Weight4) else ops.linear(x, matrix)


def stacked(parts: Iterable[Tensor | Weight4]) -> Matrix:
    """One matrix of parts below each other: dense neighbours are joined, those of four bits where they fill tiles."""
    joined = [part for alike in _alike(parts) for part in _joined(alike)]
    return joined[0] if len(joined) == 1 else Stacked(tuple(joined))


def four_bits(raw: Raw, device: torch.device) -> Weight4:
    """A matrix of one of the kinds FOUR_BITS as it is stored."""
    if raw.kind == "MXFP4":
        nibbles, exponents = fours(raw.rows)
        return packed(*(_rows(part).to(device) for part in (nibbles, exponents)), GROUP)
    if raw.kind in FOUR_BIT_KINDS:
        return _grouped(raw, device)
    grid = taken_apart(raw.kind, raw.rows)
    codes, scales = _rows(grid.codes).to(device), torch.from_numpy(grid.scales).to(device)
    if raw.kind == "Q4_0":
        return packed(codes, scales.half(), GROUP)
    assert grid.minima is not None
    minima = torch.from_numpy(grid.minima).to(device)
    if raw.kind == "Q4_1":
        scales, minima = scales.half(), minima.half()
    return packed(codes, scales, GROUP, minima=minima)


def _grouped(raw: Raw, device: torch.device) -> Weight4:
    codes, scales, zeros, group = grouped(*raw)
    steps = torch.from_numpy(scales)
    half = steps.half()
    steps = half if torch.equal(half.float(), steps) else steps
    placed = None if zeros is None else torch.from_numpy(zeros).to(device)
    return packed(torch.from_numpy(codes).to(device), steps.to(device), group, zeros=placed)


def _rows(codes: np.ndarray) -> Tensor:
    """[outputs, ...] as uint8 [outputs, all else]."""
    return torch.from_numpy(np.ascontiguousarray(codes.astype(np.uint8).reshape(len(codes), -1)))


def _alike(parts: Iterable[Tensor | Weight4]) -> Iterator[list[Tensor | Weight4]]:
    for _, alike in groupby(parts, key=lambda part: (part.kind, part.group) if isinstance(part, Weight4) else None):
        yield list(alike)


def _joined(alike: list[Tensor | Weight4]) -> list[Tensor | Weight4]:
    """Parts of one kind as few as they can be; tiles of four bits are 64 outputs, and a part begins a tile."""
    dense = [part for part in alike if isinstance(part, Tensor)]
    if dense:
        return [dense[0] if len(dense) == 1 else torch.cat(dense)]
    fours_ = [part for part in alike if isinstance(part, Weight4)]
    if any(part.outputs % part.words.shape[2] for part in fours_[:-1]) or len({p.scales.dtype for p in fours_}) > 1:
        return list(fours_)
    first = fours_[0]
    return [
        Weight4(
            words=torch.cat([part.words for part in fours_]),
            scales=torch.cat([part.scales for part in fours_]),
            offsets=None if first.offsets is None else torch.cat([p.offsets for p in fours_ if p.offsets is not None]),
            outputs=sum(part.outputs for part in fours_),
            inputs=first.inputs,
            group=first.group,
        )
    ]
