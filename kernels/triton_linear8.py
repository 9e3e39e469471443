"""Products of eight-bit activations with eight-bit weights, in FP8 or in whole numbers.

Rule: the order of a sum is given by the shape of the matrix, so a row has the same bits alone and among any others.
Reference: `reference.linear8`. What scales mean: `kernels.weight8`.
Called by `deploy.bench.gpu`, `kernels.verify` and tests; no decoder takes it yet.

FP8 on Hopper: the tensor cores add into fewer bits than float32 has, about 14 behind the leading one, and the error
grows with the length of the sum. So they add 128 inputs at most; each such sum is then promoted, that is added to the
others in float32 by the ordinary units. Scales in blocks of 128 are applied in the same moment. Whole numbers are added
exactly, in int32, in any order: 127 * 127 * 133,000 inputs fit.

As in `kernels.triton_linear4`, outputs stand where an instruction has its 64 rows. R rows, N outputs of a program, M
rows of a program, C inputs, J blocks of 128 inputs.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import tuned, tuning
from kernels.launch import Launch, launch, product_type
from kernels.triton_overlap import after_previous, let_next_begin
from kernels.weight8 import BLOCK, KINDS, Rows8, Weight8

_BLOCK = tl.constexpr(BLOCK)
_TOGETHER = tl.constexpr(8)  # tiles of outputs whose programs run together


def linear8(x: Rows8, weight: Weight8, kind: torch.dtype, choice: Launch | None = None) -> torch.Tensor:
    """x [R, C] times the transpose of weight [N, C]: [R, N] in the 16-bit type `kind`.

    `choice` instead of the measured or reasoned one changes no bit. Rows and weights are both per channel or both in
    blocks, and of one type. Raises ValueError where they do not fit.
    """
    rows, inputs = x.codes.shape
    outputs = weight.codes.shape[0]
    if x.codes.dtype != weight.codes.dtype or weight.codes.dtype not in KINDS:
        raise ValueError(f"rows are {x.codes.dtype} and weights {weight.codes.dtype}; both must be one of {KINDS}")
    if inputs != weight.codes.shape[1] or x.codes.stride(1) != 1 or not weight.codes.is_contiguous():
        raise ValueError(f"rows {tuple(x.codes.shape)} do not fit a dense matrix {tuple(weight.codes.shape)}")
    blocks = weight.scales.dim() == 2
    if x.scales.dim() != weight.scales.dim():
        raise ValueError("rows and weights must both have scales per channel, or both in blocks of 128")
    output = x.codes.new_empty((rows, outputs), dtype=kind)
    scales = x.scales, weight.scales
    constants = {"WHOLE": weight.codes.dtype == torch.int8, "BLOCKS": blocks, "WIDE": product_type(kind)}
    steps = -(-inputs // BLOCK)
    if rows > tuning.FEW_ROWS and _describable(x.codes, weight.codes):
        block_rows, reasoned = tuning.linear8_many(outputs, inputs)
        choice = choice or tuned.choice("linear8 many", outputs, inputs, rows, reasoned)
        launch(
            _multiply8_many,
            (-(-outputs // choice.block) * -(-rows // block_rows),),
            *(_described(x.codes, block_rows), _described(weight.codes, choice.block), *scales, output),
            *(rows, outputs, steps),
            choice=choice,
            BLOCK_OUTPUTS=choice.block,
            BLOCK_ROWS=block_rows,
            STEPS=steps,
            **constants,
        )
        return output
    choice = choice or tuned.choice("linear8", outputs, inputs, rows, tuning.linear8(outputs, inputs))
    block_rows = tuning.product_rows(rows)
    launch(
        _multiply8,
        (-(-outputs // choice.block), -(-rows // block_rows)),
        *(x.codes, weight.codes, *scales, output, rows, outputs, inputs, x.codes.stride(0), steps),
        choice=choice,
        BLOCK_OUTPUTS=choice.block,
        BLOCK_ROWS=block_rows,
        STEPS=steps,
        **constants,
    )
    return output


def _describable(*matrices: torch.Tensor) -> bool:
    """Whether the copy engine can read them: addresses and rows are multiples of 16 bytes."""
    return all(matrix.stride(0) % 16 == 0 and matrix.data_ptr() % 16 == 0 for matrix in matrices)


def _described(matrix: torch.Tensor, rows: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, BLOCK])


@triton.jit(do_not_specialize=["rows"])
def _multiply8(
    # pointers
    x_ptr,  # [R, C]
    weight_ptr,  # [N, C]
    x_scales_ptr,  # [R] or [R, J]
    weight_scales_ptr,  # [N] or [ceil(N / 128), J]
    output_ptr,  # [R, N]
    # sizes
    rows,
    outputs,
    inputs,
    # strides
    stride_x,
    blocks,  # J: of both scales in blocks
    # constants
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # 1. The outputs and rows of this program. Outputs that are not there stand for the first: their loads have no mask.
    output = (tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    real_output, real_row = output < outputs, row < rows
    sums = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.int32 if WHOLE and not BLOCKS else tl.float32)
    after_previous(OVERLAP)

    # 2. Blocks of 128 inputs in order; each block's sum is promoted.
    at = tl.arange(0, _BLOCK)
    weight_at = weight_ptr + tl.where(real_output, output, 0)[:, None] * inputs + at[None, :]
    x_at = x_ptr + at[:, None] + row[None, :] * stride_x
    for block in tl.range(0, STEPS):
        weight = tl.load(weight_at, mask=(at < inputs)[None, :], other=0.0)  # [N, 128]
        x = tl.load(x_at, mask=(at < inputs)[:, None] & real_row[None, :], other=0.0)  # [128, M]
        part = _product8(weight, x, WHOLE, WIDE)
        if BLOCKS:
            scale = _block_scales(x_scales_ptr, weight_scales_ptr, output, real_output, row, real_row, block, blocks)
            sums += part.to(tl.float32) * scale
        else:
            sums += part
        at += _BLOCK
        weight_at += _BLOCK
        x_at += _BLOCK
    let_next_begin(OVERLAP)

    # 3. Scales per channel.
    result = sums.to(tl.float32)
    if not BLOCKS:
        result = result * _channel_scales(x_scales_ptr, weight_scales_ptr, output, real_output, row, real_row)
    target = output_ptr + row[None, :] * outputs + output[:, None]
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=real_output[:, None] & real_row[None, :])


@triton.jit(do_not_specialize=["rows"])
def _multiply8_many(
    # descriptors and pointers
    x_tiles,  # [R, C] by tiles of [M, 128]
    weight_tiles,  # [N, C] by tiles of [N, 128]
    x_scales_ptr,  # [R] or [R, J]
    weight_scales_ptr,  # [N] or [ceil(N / 128), J]
    output_ptr,  # [R, N]
    # sizes
    rows,
    outputs,
    # strides
    blocks,  # J: of both scales in blocks
    # constants
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    # 1. The outputs and rows of this program. Programs that run together share a few tiles of either.
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    output_tiles = tl.cdiv(outputs, BLOCK_OUTPUTS)
    in_group = _TOGETHER * row_tiles
    first_tile = tl.program_id(0) // in_group * _TOGETHER
    together = tl.minimum(output_tiles - first_tile, _TOGETHER)
    output_start = (first_tile + tl.program_id(0) % in_group % together) * BLOCK_OUTPUTS
    row_start = tl.program_id(0) % in_group // together * BLOCK_ROWS
    output = (output_start + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    row = (row_start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    real_output, real_row = output < outputs, row < rows

    # 2. Blocks of 128 inputs in order; each block's sum is promoted.
    sums = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.int32 if WHOLE and not BLOCKS else tl.float32)
    for block in tl.range(0, STEPS):
        weight = weight_tiles.load([output_start, block * _BLOCK])  # [N, 128]
        x = x_tiles.load([row_start, block * _BLOCK])  # [M, 128]
        part = _product8(weight, x.T, WHOLE, WIDE)
        if BLOCKS:
            scale = _block_scales(x_scales_ptr, weight_scales_ptr, output, real_output, row, real_row, block, blocks)
            sums += part.to(tl.float32) * scale
        else:
            sums += part

    # 3. Scales per channel.
    result = sums.to(tl.float32)
    if not BLOCKS:
        result = result * _channel_scales(x_scales_ptr, weight_scales_ptr, output, real_output, row, real_row)
    target = output_ptr + row[None, :] * outputs + output[:, None]
    tl.store(target, result.to(output_ptr.dtype.element_ty), mask=real_output[:, None] & real_row[None, :])


@triton.jit
def _product8(weight, x, WHOLE: tl.constexpr, WIDE: tl.constexpr):
    """weight [N, 128] times x [128, M], in int32 or float32."""
    if WHOLE:
        return tl.dot(weight, x, out_dtype=tl.int32)
    if WIDE is not None:
        # The interpreter cannot go from FP8 to float64 at once.
        widened = weight.to(tl.float32).to(WIDE), x.to(tl.float32).to(WIDE)
        return tl.dot(widened[0], widened[1], input_precision="ieee", out_dtype=WIDE).to(tl.float32)
    return tl.dot(weight, x)


@triton.jit
def _block_scales(x_scales_ptr, weight_scales_ptr, output, real_output, row, real_row, block, blocks):
    of_outputs_at = weight_scales_ptr + output // _BLOCK * blocks + block
    of_outputs = tl.load(of_outputs_at, mask=tl.where(real_output, block, blocks) < blocks, other=0.0)
    of_rows_at = x_scales_ptr + row * blocks + block
    of_rows = tl.load(of_rows_at, mask=tl.where(real_row, block, blocks) < blocks, other=0.0)
    return of_outputs[:, None] * of_rows[None, :]


@triton.jit
def _channel_scales(x_scales_ptr, weight_scales_ptr, output, real_output, row, real_row):
    of_outputs = tl.load(weight_scales_ptr + output, mask=real_output, other=0.0)
    of_rows = tl.load(x_scales_ptr + row, mask=real_row, other=0.0)
    return of_outputs[:, None] * of_rows[None, :]
