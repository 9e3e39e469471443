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

from kernels import tuned, tuning
from kernels.launch import Launch, launch, product_type
from kernels.triton_product import add_splits, row_pieces
from kernels.weight8 import BLOCK, KINDS, Rows8, Weight8

_BLOCK = tl.constexpr(BLOCK)


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
    reasoned, splits = tuning.linear8(outputs, inputs)
    choice = choice or tuned.choice("linear8", outputs, inputs, rows, reasoned)
    steps = -(-inputs // BLOCK)
    block_rows = tuning.product_rows(rows)
    output = x.codes.new_empty((rows, outputs), dtype=kind)
    for some, partial in row_pieces(output, splits):
        count = some.stop - some.start
        launch(
            _multiply8,
            (-(-outputs // choice.block), splits, -(-count // block_rows)),
            *(x.codes[some], x.scales[some], weight.codes, weight.scales, partial, count, outputs, inputs),
            *(x.codes.stride(0), steps),
            choice=choice,
            BLOCK_OUTPUTS=choice.block,
            BLOCK_ROWS=block_rows,
            STEPS=-(-steps // splits),
            WHOLE=weight.codes.dtype == torch.int8,
            BLOCKS=blocks,
            WIDE=product_type(kind),
        )
        if splits > 1:
            add_splits(partial, output[some], splits)
    return output


@triton.jit(do_not_specialize=["rows"])
def _multiply8(
    # pointers
    x_ptr,  # [R, C]
    x_scales_ptr,  # [R] or [R, J]
    weight_ptr,  # [N, C]
    weight_scales_ptr,  # [N] or [ceil(N / 128), J]
    partial_ptr,  # [splits, R, N] fp32, or the output [R, N] itself
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
):
    # 1. The outputs, the split and the rows of this program.
    output = (tl.program_id(0) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    split = tl.program_id(1)
    row = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    element = tl.arange(0, _BLOCK)
    real_output, real_row = output < outputs, row < rows
    sums = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.int32 if WHOLE and not BLOCKS else tl.float32)

    # 2. Blocks of 128 inputs in order; each block's sum is promoted.
    for step in tl.range(0, STEPS):
        block = split * STEPS + step
        at = block * _BLOCK + element
        real = at < inputs
        weight_at = weight_ptr + output[:, None] * inputs + at[None, :]
        weight = tl.load(weight_at, mask=real_output[:, None] & real[None, :], other=0.0)  # [N, 128]
        x_at = x_ptr + at[:, None] + row[None, :] * stride_x
        x = tl.load(x_at, mask=real[:, None] & real_row[None, :], other=0.0)  # [128, M]
        if WHOLE:
            part = tl.dot(weight, x, out_dtype=tl.int32)  # [N, M]
        elif WIDE is not None:
            widened = weight.to(tl.float32).to(WIDE), x.to(tl.float32).to(WIDE)
            part = tl.dot(widened[0], widened[1], input_precision="ieee", out_dtype=WIDE).to(tl.float32)
        else:
            part = tl.dot(weight, x)
        if BLOCKS:
            of_outputs_at = weight_scales_ptr + output // _BLOCK * blocks + block
            of_outputs = tl.load(of_outputs_at, mask=tl.where(real_output, block, blocks) < blocks, other=0.0)
            of_rows_at = x_scales_ptr + row * blocks + block
            of_rows = tl.load(of_rows_at, mask=tl.where(real_row, block, blocks) < blocks, other=0.0)
            sums += part.to(tl.float32) * (of_outputs[:, None] * of_rows[None, :])
        else:
            sums += part

    # 3. Scales per channel, and this split's sums.
    result = sums.to(tl.float32)
    if not BLOCKS:
        of_outputs = tl.load(weight_scales_ptr + output, mask=real_output, other=0.0)
        of_rows = tl.load(x_scales_ptr + row, mask=real_row, other=0.0)
        result = result * of_outputs[:, None] * of_rows[None, :]
    target = partial_ptr + (split.to(tl.int64) * rows + row)[None, :] * outputs + output[:, None]
    tl.store(target, result.to(partial_ptr.dtype.element_ty), mask=real_output[:, None] & real_row[None, :])
