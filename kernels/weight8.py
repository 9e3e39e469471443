"""Matrices and activations of eight bits: codes, and the scales they are multiplied by.

Rule: a value is its code times its scale, in FP8 (E4M3, up to 448) or in whole numbers (-127..127).

    per channel   one scale for each output of a matrix, one for each row of activations
    in blocks     one scale for 128 x 128 of a matrix, one for 128 neighbouring elements of a row
"""

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 128
KINDS = (torch.float8_e4m3fn, torch.int8)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


class Weight8(NamedTuple):
    """A matrix [N, C]."""

    codes: Tensor  # [N, C] float8_e4m3fn or int8
    scales: Tensor  # float32: [N], or [ceil(N / 128), ceil(C / 128)]


class Rows8(NamedTuple):
    """Activations [R, C]."""

    codes: Tensor  # [R, C] as the weights'
    scales: Tensor  # float32: [R], or [R, ceil(C / 128)]


def dequantised8(values: Weight8 | Rows8) -> Tensor:
    """The matrix, or the rows, in float64, where nothing of it is rounded."""
    wide, scales = values.codes.double(), values.scales.double()
    if scales.dim() == 1:
        return wide * scales[:, None]
    if isinstance(values, Weight8):
        scales = scales.repeat_interleave(BLOCK, dim=0)[: wide.shape[0]]
    return wide * scales.repeat_interleave(BLOCK, dim=1)[:, : wide.shape[1]]


def quantised_weight8(weight: Tensor, kind: torch.dtype, blocks: bool) -> Weight8:
    """A matrix [N, C] rounded to the nearest code of each value; the largest of a scale's share gets the largest."""
    outputs, inputs = weight.shape
    wide = weight.float()
    if not blocks:
        scales = _scale(wide.abs().amax(1), kind)
        return Weight8(nearest(wide / scales[:, None], kind), scales)
    down, right = -(-outputs // BLOCK), -(-inputs // BLOCK)
    padded = torch.nn.functional.pad(wide, (0, right * BLOCK - inputs, 0, down * BLOCK - outputs))
    scales = _scale(padded.view(down, BLOCK, right, BLOCK).abs().amax((1, 3)), kind)
    steps = scales.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :inputs]
    return Weight8(nearest(wide / steps, kind), scales)


def quantised_rows8(x: Tensor, kind: torch.dtype, blocks: bool) -> Rows8:
    """Rows [R, C] rounded to the nearest code of each value, in float32."""
    rows, columns = x.shape
    wide = x.float()
    if not blocks:
        scales = _scale(wide.abs().amax(1), kind)
        return Rows8(nearest(wide / scales[:, None], kind), scales)
    count = -(-columns // BLOCK)
    padded = torch.nn.functional.pad(wide, (0, count * BLOCK - columns))
    scales = _scale(padded.view(rows, count, BLOCK).abs().amax(2), kind)
    return Rows8(nearest(wide / scales.repeat_interleave(BLOCK, 1)[:, :columns], kind), scales)


def nearest(scaled: Tensor, kind: torch.dtype) -> Tensor:
    """The nearest code, an even one where two are equally near; the largest for what lies beyond it."""
    bounded = scaled.clamp(-LARGEST[kind], LARGEST[kind])
    return (bounded.round() if kind == torch.int8 else bounded).to(kind)


def _scale(largest: Tensor, kind: torch.dtype) -> Tensor:
    # Zeros alone have no scale of their own: any will do, but for zero. The divisor is a tensor, because torch on a GPU
    # multiplies with the inverse of a number instead, and rounds otherwise.
    return torch.where(largest > 0, largest / torch.full_like(largest, LARGEST[kind]), 1.0)
