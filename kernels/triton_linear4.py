"""Products with weights of four bits and activations of sixteen.

Rule: codes meet the activations as the whole numbers they are, and scales meet float32 sums; no weight is rounded. The
order of every sum is given by the shape of the matrix.
Reference: `reference.linear4`. The layout of the weights: `kernels.weight4`.

    output[r, n] = sum over groups g of  scale[n, g] * sum (code - zero) x  +  minimum[n, g] * sum x

Two ways through it:

- `_multiply`, the tensor cores, for any number of rows. Outputs stand where an instruction has its 64 rows and rows of
  activations where it has its 8 to 256 columns, so that one row wastes little and 1 to 4,096 rows meet the same
  instruction, sixteen inputs at a time, in the same order. Inputs are divided into splits by the shape of the matrix.
  The splits of few rows are worked on by programs of their own and added in order, by the one that comes last or by
  another launch; those of many rows by one program, one after the other. No atomics.
- `_dequantise`, once, and the library's product: for prefill.

With `exact` only the first is taken, and a row has the same bits alone and among any others. Without it a row's bits
change between 64 and 65 rows, where weights are rounded to sixteen bits before they are multiplied.

R rows, N outputs of a program, M rows of a program, C inputs, U and I tiles of outputs and inputs, P groups of a tile.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from kernels import tuned, tuning
from kernels.launch import Launch, launch, product_type
from kernels.triton_codes import group_offset, group_scale, numbers_of
from kernels.triton_overlap import after_previous, let_next_begin
from kernels.triton_product import (
    Workspace,
    add_splits,
    last_to_arrive,
    prefetch_split,
    row_pieces,
    split_sums,
    sum_of_splits,
)
from kernels.weight4 import QUARTERS, TILE_INPUTS, TILE_OUTPUTS, TILE_WORDS, Weight4

# Rows from which dequantising once pays.
MANY_ROWS = 64

_OUTPUTS = tl.constexpr(TILE_OUTPUTS)
_INPUTS = tl.constexpr(TILE_INPUTS)
_WORDS = tl.constexpr(TILE_WORDS)
_QUARTERS = tl.constexpr(QUARTERS)


def linear4(
    x: torch.Tensor,
    weight: Weight4,
    exact: bool = True,
    choice: Launch | None = None,
    work: Workspace | None = None,
) -> torch.Tensor:
    """x [R, C] of a 16-bit type times the transpose of weight [N, C]: [R, N] in the type of x.

    `exact`: a row's bits do not depend on the number of rows. `choice` instead of the measured or reasoned one changes
    none of them, nor does `work`, with which the splits of few rows are added in the same launch. Raises ValueError
    where the two do not fit.
    """
    if x.dim() != 2 or x.shape[1] != weight.inputs or x.stride(1) != 1:
        raise ValueError(f"x {tuple(x.shape)} must be dense rows of the weight's {weight.inputs} inputs")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"activations are float16 or bfloat16 here, not {x.dtype}")
    if exact or x.shape[0] <= MANY_ROWS:
        return _by_tensor_cores(x, weight, choice, work)
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


def _by_tensor_cores(x: torch.Tensor, weight: Weight4, choice: Launch | None, work: Workspace | None) -> torch.Tensor:
    rows, tiles = x.shape[0], weight.words.shape[1]
    reasoned, splits = tuning.linear4_split(weight.outputs, weight.inputs)
    choice = choice or tuned.choice("linear4", weight.outputs, weight.inputs, rows, reasoned)
    block_rows = tuning.product_rows(rows)
    output = x.new_empty((rows, weight.outputs))
    in_order = rows > tuning.FEW_ROWS or splits == 1
    at_once = work is not None and not in_order
    programs = -(-weight.outputs // choice.block)
    if at_once:
        work.check(rows, splits, weight.outputs, programs * -(-rows // block_rows))
    for some, partial in row_pieces(output, 1 if in_order else splits, work if at_once else None):
        count = some.stop - some.start
        launch(
            _multiply,
            (programs, 1 if in_order else splits, -(-count // block_rows)),
            *(x[some], *weight.pointers, partial, output[some], work.counters if at_once else weight.words),
            *(count, weight.outputs, weight.inputs, tiles, x.stride(0)),
            choice=choice,
            BLOCK=choice.block,
            BLOCK_ROWS=block_rows,
            SPLITS=splits,
            TILES=-(-tiles // splits),
            GROUP=weight.group,
            KIND=weight.kind,
            RAGGED=weight.inputs % TILE_INPUTS > 0,
            WIDE=product_type(x.dtype),
            IN_ORDER=in_order,
            AT_ONCE=at_once,
            PREFETCH=tuning.PREFETCH,
        )
        if not in_order and not at_once:
            add_splits(partial, output[some], splits)
    return output


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    # pointers
    x_ptr,  # [R, C]
    weight_ptr,  # words [U, I, 64, 32] int16
    scales_ptr,  # [U, I, P, 64]
    offsets_ptr,  # [U, I, P, 64], read unless symmetric
    partial_ptr,  # [splits, R, N] fp32, written unless IN_ORDER
    output_ptr,  # [R, N], written when IN_ORDER or AT_ONCE
    counters_ptr,  # [tiles], used when AT_ONCE
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
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    IN_ORDER: tl.constexpr,  # a program works on all splits, one after the other
    AT_ONCE: tl.constexpr,  # the program that comes last adds the splits
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # 1. The outputs, the split and the rows of this program.
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    row = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    prefetch_split(weight_ptr, output, output < outputs, split, inputs, tiles, TILES, KIND, PREFETCH, OVERLAP)
    after_previous(OVERLAP)

    # 2. Tile by tile of this split, or of one split after the other.
    sums = split_sums(
        *(x_ptr, row, row < rows, stride_x),
        *(weight_ptr, scales_ptr, offsets_ptr, output, output < outputs, split, inputs, tiles),
        *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, RAGGED, WIDE),
    )  # [N, M]
    if IN_ORDER:
        for later in tl.range(1, SPLITS):
            sums += split_sums(
                *(x_ptr, row, row < rows, stride_x),
                *(weight_ptr, scales_ptr, offsets_ptr, output, output < outputs, later, inputs, tiles),
                *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, RAGGED, WIDE),
            )

    let_next_begin(OVERLAP)

    # 3. Their sums: this split's for another launch or the last program to add, or all of them.
    at = row[None, :] * outputs + output[:, None]
    mask = (output < outputs)[:, None] & (row < rows)[None, :]
    if IN_ORDER:
        tl.store(output_ptr + at, sums.to(output_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(partial_ptr + split.to(tl.int64) * rows * outputs + at, sums, mask=mask)
    if AT_ONCE:  # noqa: SIM102 (a constant and a number of the device do not go into one condition)
        if last_to_arrive(counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), SPLITS):
            sums = sum_of_splits(partial_ptr, at, mask, rows.to(tl.int64) * outputs, SPLITS)
            tl.store(output_ptr + at, sums.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dequantise(
    # pointers
    words_ptr,  # [U, I, 64, 32] int16
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
    words = tl.load(words_ptr + (tile * _OUTPUTS + inside[:, None]) * _WORDS + word[None, :])  # [64, 32]
    for quarter in tl.static_range(_QUARTERS):
        group_at = (tile * (_INPUTS // GROUP) + quarter * _WORDS // GROUP) * _OUTPUTS + inside
        scale = group_scale(scales_ptr + group_at, KIND)  # [64]
        offset, zero = group_offset(offsets_ptr + group_at, KIND)  # [64]
        dense = numbers_of(words, zero, quarter, KIND) * scale[:, None] + offset[:, None]  # [64, 32]
        at = tl.program_id(1) * _INPUTS + quarter * _WORDS + word
        mask = (output < outputs)[:, None] & (at < inputs)[None, :]
        target = dense_ptr + output[:, None] * inputs + at[None, :]
        tl.store(target, dense.to(dense_ptr.dtype.element_ty), mask=mask)
