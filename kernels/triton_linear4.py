"""Products with weights of four bits and activations of sixteen.

Rule: codes meet the activations as the whole numbers they are, and scales meet float32 sums; no weight is rounded. The
order of every sum is given by the shape of the matrix.
Reference: `reference.linear4`. The layout of the weights: `kernels.weight4`.
Called by `deploy.bench.gpu`, `kernels.verify` and tests; no decoder takes it yet.

    output[r, n] = sum over groups g of  scale[n, g] * sum (code - zero) x  +  minimum[n, g] * sum x

Three ways through it:

- `_multiply`, the tensor cores, for any number of rows. Outputs stand where an instruction has its 64 rows and rows of
  activations where it has its 8 to 256 columns, so that one row wastes little and 1 to 4,096 rows meet the same
  instruction, sixteen inputs at a time, in the same order. Inputs are divided into splits by the shape of the matrix;
  a split's sums go to memory and `_add_splits` adds them in order. No atomics.
- `_multiply_few`, no tensor cores, one pass over the weights for up to four rows. Each thread has a fixed share of the
  inputs and keeps its sums to the end.
- `_dequantise`, once, and the library's product: for prefill.

With `exact` only the first is taken, and a row has the same bits alone and among any others. Without it the fastest for
the number of rows is: a row's bits change between 4 and 5 rows, where float32 sums are no longer added by single
threads but by tensor cores, and between 64 and 65, where weights are rounded to sixteen bits before they are
multiplied.

R rows, N outputs of a program, M rows of a program, C inputs, T tiles of inputs in flight, P groups of a tile.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import tuned, tuning
from kernels.launch import Launch, launch, product_type
from kernels.triton_product import add_splits, group_offset, group_scale, plane_of, row_pieces, split_sums
from kernels.weight4 import TILE_INPUTS, TILE_OUTPUTS, WORDS, Weight4

# Rows up to which single threads do it, and from which dequantising once pays: where the arithmetic of 64 rows on a
# tile takes as long as reading it (`python -m kernels.verify` shows both sides of either on a GPU; not measured yet).
FEW_ROWS = 4
MANY_ROWS = 64

_OUTPUTS = tl.constexpr(TILE_OUTPUTS)
_INPUTS = tl.constexpr(TILE_INPUTS)
_WORDS = tl.constexpr(WORDS)


def linear4(x: torch.Tensor, weight: Weight4, exact: bool = True, choice: Launch | None = None) -> torch.Tensor:
    """x [R, C] of a 16-bit type times the transpose of weight [N, C]: [R, N] in the type of x.

    `exact`: a row's bits do not depend on the number of rows. `choice` instead of the measured or reasoned one changes
    none of them. Raises ValueError where the two do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.inputs or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} must be dense rows of the weight's {weight.inputs} inputs")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations are float16 or bfloat16 here, not {x.dtype}")
    if exact or FEW_ROWS < x.shape[0] <= MANY_ROWS:
        return _by_tensor_cores(x, weight, choice)
    if x.shape[0] <= FEW_ROWS:
        return _by_threads(x, weight)
    return F.linear(x, dequantise(weight, x.dtype))


def dequantise(weight: Weight4, kind: torch.dtype) -> torch.Tensor:
    """The matrix [N, C] in a 16-bit type, each weight computed in float32 and rounded once."""
    dense = weight.scales.new_empty((weight.outputs, weight.inputs), dtype=kind)
    launch(
        _dequantise,
        weight.words.shape[:2],
        *(*weight.pointers, dense, weight.outputs, weight.inputs, weight.words.shape[1]),
        choice=Launch(TILE_OUTPUTS, num_warps=4),
        GROUP=weight.group,
        KIND=weight.kind,
    )
    return dense


def _by_threads(x: torch.Tensor, weight: Weight4) -> torch.Tensor:
    rows = x.shape[0]
    choice, tiles_at_once = tuning.linear4_few(weight.outputs)
    output = x.new_empty((rows, weight.outputs))
    launch(
        _multiply_few,
        (-(-weight.outputs // choice.block) if rows else 0,),
        *(x, *weight.pointers, output, weight.outputs, weight.inputs, weight.words.shape[1], x.stride(0)),
        choice=choice,
        ROWS=rows,
        BLOCK=choice.block,
        TILES=tiles_at_once,
        GROUP=weight.group,
        KIND=weight.kind,
    )
    return output


def _by_tensor_cores(x: torch.Tensor, weight: Weight4, choice: Launch | None) -> torch.Tensor:
    rows, tiles = x.shape[0], weight.words.shape[1]
    reasoned, splits = tuning.linear4_split(weight.outputs, weight.inputs)
    choice = choice or tuned.choice("linear4", weight.outputs, weight.inputs, rows, reasoned)
    block_rows = tuning.product_rows(rows)
    output = x.new_empty((rows, weight.outputs))
    for some, partial in row_pieces(output, splits):
        count = some.stop - some.start
        launch(
            _multiply,
            (-(-weight.outputs // choice.block), splits, -(-count // block_rows)),
            *(x[some], *weight.pointers, partial, count, weight.outputs, weight.inputs, tiles, x.stride(0)),
            choice=choice,
            BLOCK=choice.block,
            BLOCK_ROWS=block_rows,
            TILES=-(-tiles // splits),
            GROUP=weight.group,
            KIND=weight.kind,
            WIDE=product_type(x.dtype),
        )
        if splits > 1:
            add_splits(partial, output[some], splits)
    return output


@triton.jit
def _multiply_few(
    # pointers
    x_ptr,  # [R, C]
    words_ptr,  # [U, I, 64, 16]
    scales_ptr,  # [U, I, P, 64]
    offsets_ptr,  # [U, I, P, 64], read unless symmetric
    output_ptr,  # [R, N]
    # sizes
    outputs,
    inputs,
    tiles,
    # strides
    stride_x,
    # constants
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
):
    # 1. The outputs of this program, inside one tile of outputs, and a thread's share of the inputs.
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (output % _OUTPUTS)[:, None, None]
    first_tile = (tl.program_id(0) * BLOCK // _OUTPUTS).to(tl.int64) * tiles
    word = tl.arange(0, _WORDS)[None, None, :]
    sums_0 = tl.zeros((BLOCK, TILES, _WORDS), tl.float32)
    sums_1 = tl.zeros((BLOCK, TILES, _WORDS), tl.float32)
    sums_2 = tl.zeros((BLOCK, TILES, _WORDS), tl.float32)
    sums_3 = tl.zeros((BLOCK, TILES, _WORDS), tl.float32)

    # 2. T tiles at a time: their words once, then plane by plane with all rows; a scale for each group's sum.
    for start in range(0, tiles, TILES):
        tile = (start + tl.arange(0, TILES))[None, :, None]
        exists = tile < tiles
        words_at = (first_tile + tile) * (_OUTPUTS * _WORDS) + inside * _WORDS + word
        words = tl.load(words_ptr + words_at, mask=exists, other=0)  # [N, T, 16]
        for group in tl.static_range(_INPUTS // GROUP):
            group_at = ((first_tile + tile) * (_INPUTS // GROUP) + group) * _OUTPUTS + inside
            scale = group_scale(scales_ptr + group_at, exists, KIND)  # [N, T, 1]
            offset, zero = group_offset(offsets_ptr + group_at, exists, KIND)
            part_0 = tl.zeros((BLOCK, TILES, _WORDS), tl.float32)
            part_1 = part_0
            part_2 = part_0
            part_3 = part_0
            inputs_0 = tl.zeros((1, TILES, _WORDS), tl.float32)
            inputs_1 = inputs_0
            inputs_2 = inputs_0
            inputs_3 = inputs_0
            for step in tl.static_range(GROUP // _WORDS):
                code = plane_of(words, zero, group * (GROUP // _WORDS) + step, KIND)  # [N, T, 16]
                at = tile * _INPUTS + (group * GROUP + step * _WORDS) + word
                known = at < inputs
                x = tl.load(x_ptr + at, mask=known, other=0.0).to(tl.float32)  # [1, T, 16]
                part_0 += code * x
                inputs_0 += x
                if ROWS > 1:
                    x = tl.load(x_ptr + stride_x + at, mask=known, other=0.0).to(tl.float32)
                    part_1 += code * x
                    inputs_1 += x
                if ROWS > 2:
                    x = tl.load(x_ptr + 2 * stride_x + at, mask=known, other=0.0).to(tl.float32)
                    part_2 += code * x
                    inputs_2 += x
                if ROWS > 3:
                    x = tl.load(x_ptr + 3 * stride_x + at, mask=known, other=0.0).to(tl.float32)
                    part_3 += code * x
                    inputs_3 += x
            sums_0 += part_0 * scale
            sums_1 += part_1 * scale
            sums_2 += part_2 * scale
            sums_3 += part_3 * scale
            if KIND == 2:
                sums_0 += inputs_0 * offset
                sums_1 += inputs_1 * offset
                sums_2 += inputs_2 * offset
                sums_3 += inputs_3 * offset

    # 3. The threads' sums, added in an order that only N and T decide.
    target = output_ptr + output
    mask = output < outputs
    kind = output_ptr.dtype.element_ty
    tl.store(target, tl.sum(tl.sum(sums_0, axis=2), axis=1).to(kind), mask=mask)
    if ROWS > 1:
        tl.store(target + outputs, tl.sum(tl.sum(sums_1, axis=2), axis=1).to(kind), mask=mask)
    if ROWS > 2:
        tl.store(target + 2 * outputs, tl.sum(tl.sum(sums_2, axis=2), axis=1).to(kind), mask=mask)
    if ROWS > 3:
        tl.store(target + 3 * outputs, tl.sum(tl.sum(sums_3, axis=2), axis=1).to(kind), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    # pointers
    x_ptr,  # [R, C]
    words_ptr,  # [U, I, 64, 16]
    scales_ptr,  # [U, I, P, 64]
    offsets_ptr,  # [U, I, P, 64], read unless symmetric
    partial_ptr,  # [splits, R, N] fp32, or the output [R, N] itself
    # sizes
    rows,
    outputs,
    inputs,
    tiles,
    # strides
    stride_x,
    # constants
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
):
    # 1. The outputs, the split and the rows of this program.
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    row = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)

    # 2. Tile by tile of this split.
    sums = split_sums(
        *(x_ptr, x_ptr, tl.zeros((BLOCK_ROWS,), tl.float32), row, row < rows, stride_x),
        *(words_ptr, scales_ptr, offsets_ptr, output, output < outputs, split, inputs, tiles),
        *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, False, WIDE),
    )  # [N, M]

    # 3. This split's sums.
    target = partial_ptr + (split.to(tl.int64) * rows + row)[None, :] * outputs + output[:, None]
    mask = (output < outputs)[:, None] & (row < rows)[None, :]
    tl.store(target, sums.to(partial_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantise(
    # pointers
    words_ptr,  # [U, I, 64, 16]
    scales_ptr,  # [U, I, P, 64]
    offsets_ptr,  # [U, I, P, 64], read unless symmetric
    dense_ptr,  # [N, C]
    # sizes
    outputs,
    inputs,
    tiles,
    # constants
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64) * tiles + tl.program_id(1)
    inside = tl.arange(0, _OUTPUTS)
    output = tl.program_id(0).to(tl.int64) * _OUTPUTS + inside
    word = tl.arange(0, _WORDS)
    words = tl.load(words_ptr + tile * (_OUTPUTS * _WORDS) + inside[:, None] * _WORDS + word[None, :])  # [64, 16]
    for plane in tl.static_range(_INPUTS // _WORDS):
        group_at = (tile * (_INPUTS // GROUP) + plane * _WORDS // GROUP) * _OUTPUTS + inside
        scale = group_scale(scales_ptr + group_at, inside >= 0, KIND)  # [64]
        offset, zero = group_offset(offsets_ptr + group_at, inside >= 0, KIND)  # [64]
        dense = plane_of(words, zero[:, None], plane, KIND) * scale[:, None] + offset[:, None]  # [64, 16]
        at = tl.program_id(1) * _INPUTS + plane * _WORDS + word
        mask = (output < outputs)[:, None] & (at < inputs)[None, :]
        target = dense_ptr + output[:, None] * inputs + at[None, :]
        tl.store(target, dense.to(dense_ptr.dtype.element_ty), mask=mask)
