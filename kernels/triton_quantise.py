"""Rows as eight-bit codes with scales, after nothing, after a norm, or after a residual addition and a norm.

Rule: elementwise in float32; one program has one row, so a row's codes depend on nothing but the row.
Reference: `reference.quantise8`, `reference.add_rms_norm_quantise8`.
Called by `deploy.bench.gpu`, `kernels.verify` and tests; no decoder takes it yet.

A norm that writes codes saves writing the hidden state in sixteen bits and reading it twice, for the largest magnitude
and for the codes. A code is computed as a float32 that already lies on the code's grid, so that the cast at the end
rounds nothing, on any device: to whole numbers by adding and taking away 1.5 * 2^23, to FP8 by the same with a constant
that follows the value's exponent.

R rows, C columns, J blocks of 128 columns.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch
from kernels.weight8 import BLOCK, LARGEST, Rows8

_BLOCK = tl.constexpr(BLOCK)
_ROUND_WHOLE = tl.constexpr(1.5 * 2.0**23)
_ROUND_FP8 = tl.constexpr(1.5 * 2.0**20)  # three bits of a mantissa stay
_SMALLEST_FP8 = tl.constexpr(2.0**-6)  # below it the grid of E4M3 gets no finer


def quantise8(x: torch.Tensor, kind: torch.dtype, blocks: bool) -> Rows8:
    """Rows of x [R, C] in codes of `kind`, with one scale for each row, or one for 128 columns of it."""
    return _launch(x, None, None, 0.0, kind, blocks)[0]


def rms_norm_quantise8(x: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: torch.dtype, blocks: bool) -> Rows8:
    """The norm of x [R, C], not rounded before it is quantised."""
    return _launch(x, None, weight, epsilon, kind, blocks)[0]


def add_rms_norm_quantise8(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: torch.dtype, blocks: bool
) -> tuple[Rows8, torch.Tensor]:
    """The norm of x + residual, quantised, and x + residual itself, rounded to the type of `residual` before."""
    rows, total = _launch(x, residual, weight, epsilon, kind, blocks)
    assert total is not None
    return rows, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    epsilon: float,
    kind: torch.dtype,
    blocks: bool,
) -> tuple[Rows8, torch.Tensor | None]:
    rows, columns = x.shape
    if x.stride(1) != 1 or (weight is not None and weight.shape != (columns,)):
        raise ValueError(f"rows of {columns} dense elements need a weight of that size")
    choice = tuning.row_sum(max(BLOCK, columns))
    codes = x.new_empty((rows, columns), dtype=kind)
    scales = x.new_empty((rows, -(-columns // BLOCK)) if blocks else (rows,), dtype=torch.float32)
    total = None if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    # What is not asked for is not touched; its pointer is any.
    before = x if residual is None else residual
    after = x if total is None else total
    launch(
        _quantise,
        (rows,),
        *(x, before, x if weight is None else weight, after, codes, scales, columns, epsilon, LARGEST[kind]),
        *(x.stride(0), before.stride(0), after.stride(0), -(-columns // BLOCK)),
        choice=choice,
        BLOCK_COLUMNS=choice.block,
        NORM=weight is not None,
        RESIDUAL=residual is not None,
        WHOLE=kind == torch.int8,
        BLOCKS=blocks,
    )
    return Rows8(codes, scales), total


@triton.jit
def on_grid(scaled, WHOLE: tl.constexpr):
    """The nearest value that a code can have, in float32; an even one of two. |scaled| is at most the largest code."""
    if WHOLE:
        return (scaled + _ROUND_WHOLE) - _ROUND_WHOLE
    binade = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(binade, _SMALLEST_FP8) * _ROUND_FP8
    return (scaled + shift) - shift


@triton.jit
def scale_of(largest, largest_code):
    """The scale of values up to `largest`; of zeros alone, one."""
    return tl.where(largest > 0.0, tl.div_rn(largest, largest_code + tl.zeros_like(largest)), 1.0)


@triton.jit
def _quantise(
    # pointers
    x_ptr,  # [R, C]
    residual_ptr,  # [R, C], read when RESIDUAL
    weight_ptr,  # [C], read when NORM
    sum_ptr,  # [R, C], written when RESIDUAL
    codes_ptr,  # [R, C]
    scales_ptr,  # [R], or [R, J] when BLOCKS
    # sizes
    columns,
    epsilon,
    largest_code,
    # strides
    stride_x,
    stride_residual,
    stride_sum,
    blocks,  # J
    # constants
    BLOCK_COLUMNS: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_COLUMNS)
    mask = column < columns

    # 1. The row, with the residual added and rounded to what is stored.
    x = tl.load(x_ptr + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)  # [C]
    if RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + column, mask=mask, other=0.0).to(tl.float32)  # [C]
        stored = (x + residual).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * stride_sum + column, stored, mask=mask)
        x = stored.to(tl.float32)

    # 2. Its norm, as `kernels.triton_norm` computes it.
    if NORM:
        mean_square = tl.div_rn(tl.sum(x * x, axis=0), columns.to(tl.float32))
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean_square + epsilon))
        x = x * scale * tl.load(weight_ptr + column, mask=mask, other=0.0).to(tl.float32)  # [C]

    # 3. Scales by the largest magnitude of the row or of each block, and codes.
    if BLOCKS:
        tiles = tl.reshape(x, (BLOCK_COLUMNS // _BLOCK, _BLOCK))  # [J, 128]
        largest = tl.max(tl.abs(tiles), axis=1)  # [J]
        scales = scale_of(largest, largest_code)
        block = tl.arange(0, BLOCK_COLUMNS // _BLOCK)
        tl.store(scales_ptr + row * blocks + block, scales, mask=block < blocks)
        steps = tl.reshape(tl.broadcast_to(scales[:, None], (BLOCK_COLUMNS // _BLOCK, _BLOCK)), (BLOCK_COLUMNS,))  # [C]
    else:
        largest = tl.max(tl.abs(x), axis=0)
        scales = scale_of(largest, largest_code)
        tl.store(scales_ptr + row, scales)
        steps = scales + tl.zeros_like(x)  # [C]
    scaled = tl.clamp(tl.div_rn(x, steps), -largest_code, largest_code)
    tl.store(codes_ptr + row * columns + column, on_grid(scaled, WHOLE).to(codes_ptr.dtype.element_ty), mask=mask)
