"""What the matrix products share: the step of a tensor core, and sums over splits of the inputs.

Rule: a sum's order is given by the shape of the matrix, never by the number of rows; nothing is added atomically.

A matrix with few outputs is too little work for all multiprocessors, so its inputs are divided into splits. Each
split's sums are written as float32, and one more pass adds them in order and rounds once.

R rows, N outputs.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch
from kernels.weight4 import TILE_INPUTS, TILE_OUTPUTS, WORDS

_OUTPUTS = tl.constexpr(TILE_OUTPUTS)
_INPUTS = tl.constexpr(TILE_INPUTS)
_WORDS = tl.constexpr(WORDS)
_MAGIC = tl.constexpr(0x4B000000)  # the bits of 2^23, whose mantissa counts whole numbers


def row_pieces(output: torch.Tensor, splits: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Pieces of the rows of output [R, N], and where each piece's products go: [splits, rows of the piece, N].

    With one split that is the output itself; with more it is float32, as many rows as the workspace holds. Neither has
    been written yet.
    """
    rows, columns = output.shape
    piece = rows if splits == 1 else max(1, tuning.SPLIT_WORKSPACE_BYTES // (splits * columns * 4))
    for first in range(0, rows, max(1, piece)):
        some = slice(first, min(first + piece, rows))
        if splits == 1:
            yield some, output[some]
        else:
            yield some, output.new_empty((splits, some.stop - some.start, columns), dtype=torch.float32)


def add_splits(partial: torch.Tensor, output: torch.Tensor, splits: int) -> None:
    """The sums of partial [splits, R, N], added in order and rounded once, as output [R, N]."""
    rows, columns = output.shape
    choice = tuning.elementwise(columns)
    launch(
        _add_splits,
        (-(-columns // choice.block), rows),
        *(partial, output, rows, columns),
        choice=choice,
        SPLITS=splits,
        BLOCK=choice.block,
    )


@triton.jit
def split_sums(
    # activations
    x_ptr,  # [R, C]
    norm_ptr,  # [C], read when NORM
    row_scale,  # [M], used when NORM
    row,  # [M] int64
    real_row,  # [M]
    stride_x,
    # weights: [N, C] of 16 bits, of 8 with scales [N], or the parts of a `kernels.weight4.Weight4`
    weight_ptr,
    scales_ptr,
    offsets_ptr,
    output,  # [N]
    real_output,  # [N]
    # the split
    split,
    inputs,
    tiles,
    # constants
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,  # -1: 16 bits; -2: 8 bits; as `kernels.weight4` otherwise
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Products of N outputs with M rows over one split of the inputs, TILES tiles of 128 in order: [N, M] fp32."""
    sums = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
    if KIND < 0:
        element = tl.arange(0, _INPUTS)
        for step in tl.range(0, TILES):
            at = (split * TILES + step) * _INPUTS + element
            x = _activations(x_ptr, norm_ptr, row_scale, row, real_row, stride_x, at, at < inputs, NORM)  # [128, M]
            weight_at = weight_ptr + output.to(tl.int64)[:, None] * inputs + at[None, :]
            weight = tl.load(weight_at, mask=real_output[:, None] & (at < inputs)[None, :], other=0.0)  # [N, 128]
            if KIND == -2:
                # Exact. The interpreter cannot go from FP8 to float64 at once.
                weight = weight.to(tl.float32).to(x.dtype)
            sums = product(weight, x, sums, WIDE)
        if KIND == -2:
            sums = sums * tl.load(scales_ptr + output, mask=real_output, other=0.0)[:, None]
    else:
        first_tile = (output // _OUTPUTS).to(tl.int64) * tiles
        inside = output % _OUTPUTS
        word = tl.arange(0, _WORDS)
        for step in tl.range(0, TILES):
            tile = split * TILES + step
            exists = tl.where(real_output, tile, tiles) < tiles
            words_at = (first_tile + tile) * (_OUTPUTS * _WORDS) + inside * _WORDS
            words = tl.load(weight_ptr + words_at[:, None] + word[None, :], mask=exists[:, None], other=0)  # [N, 16]
            for group in tl.static_range(_INPUTS // GROUP):
                group_at = ((first_tile + tile) * (_INPUTS // GROUP) + group) * _OUTPUTS + inside
                scale = group_scale(scales_ptr + group_at, exists, KIND)  # [N]
                offset, zero = group_offset(offsets_ptr + group_at, exists, KIND)  # [N]
                part = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
                x_sums = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
                for plane_step in tl.static_range(GROUP // _WORDS):
                    at = tile * _INPUTS + (group * GROUP + plane_step * _WORDS) + word  # [16]
                    x = _activations(
                        x_ptr, norm_ptr, row_scale, row, real_row, stride_x, at, at < inputs, NORM
                    )  # [16, M]
                    plane_code = plane_of(words, zero[:, None], group * (GROUP // _WORDS) + plane_step, KIND)  # [N, 16]
                    part = product(plane_code.to(x.dtype), x, part, WIDE)
                    if KIND == 2:
                        # By the same instruction, so that their order does not depend on M.
                        ones = tl.full((BLOCK, _WORDS), 1.0, x.dtype)
                        x_sums = product(ones, x, x_sums, WIDE)
                sums += part * scale[:, None]
                if KIND == 2:
                    sums += x_sums * offset[:, None]
    return sums


@triton.jit
def _activations(x_ptr, norm_ptr, row_scale, row, real_row, stride_x, at, real, NORM: tl.constexpr):
    """Inputs `at` of rows [K, M], normed as they are read and rounded once to their type."""
    x_at = x_ptr + at[:, None] + row[None, :] * stride_x
    x = tl.load(x_at, mask=real[:, None] & real_row[None, :], other=0.0)
    if NORM:
        weight = tl.load(norm_ptr + at, mask=real, other=0.0).to(tl.float32)
        return (x.to(tl.float32) * row_scale[None, :] * weight[:, None]).to(x.dtype)
    return x


@triton.jit
def product(a, b, sums, WIDE: tl.constexpr):
    """a [N, K] times b [K, M], added to sums in float32; WIDE as `kernels.launch.product_type` says."""
    if WIDE is not None:
        return sums + tl.dot(a.to(WIDE), b.to(WIDE), input_precision="ieee", out_dtype=WIDE).to(tl.float32)
    return tl.dot(a, b, sums)


@triton.jit
def plane_of(words, zero, PLANE: tl.constexpr, KIND: tl.constexpr):
    """(code - zero) of one plane in float32, or the value of MXFP4's code; exact.

    `zero` has the shape of words but for ones. A code is masked where it stands, in the mantissa of 2^23: no shift, but
    for one that the upper three planes share. Its place is a power of two, which the one multiplication and addition
    after that takes away with 2^23 and zero.
    """
    if KIND == 3:
        # The sign where float32 has it, two bits of exponent and one of mantissa at the lower end of its own: a number
        # 2^126 too small, a subnormal one for the code of 0.5.
        sign = (words << (28 - 4 * PLANE)) & -2147483648
        low = words << (22 - 4 * PLANE) if PLANE < 6 else words >> (4 * PLANE - 22)
        return (sign | (low & 0x01C00000)).to(tl.float32, bitcast=True) * 8.507059173023462e37
    place: tl.constexpr = 16 ** (PLANE % 5)
    words = words >> 20 if PLANE > 4 else words
    counted = ((words & (15 * place)) | _MAGIC).to(tl.float32, bitcast=True)
    one: tl.constexpr = 1.0 / place
    lowered = -8388608.0 * one - zero + tl.zeros_like(counted)
    return tl.fma(counted, tl.full(counted.shape, one, tl.float32), lowered)


@triton.jit
def group_scale(pointers, mask, KIND: tl.constexpr):
    """The scale of groups in float32."""
    if KIND == 3:
        exponent = tl.load(pointers, mask=mask, other=0).to(tl.int32)
        return tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def group_offset(pointers, mask, KIND: tl.constexpr):
    """The minimum of groups, or nothing; and the code that stands for zero. Both shaped like `pointers`."""
    nothing = tl.zeros(pointers.shape, tl.float32)
    if KIND == 0:
        return nothing, nothing + 8.0
    if KIND == 3:
        return nothing, nothing
    if KIND == 1:
        return nothing, tl.load(pointers, mask=mask, other=0).to(tl.float32)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32), nothing


@triton.jit(do_not_specialize=["rows"])
def _add_splits(
    # pointers
    partial_ptr,  # [splits, R, N] fp32
    output_ptr,  # [R, N]
    # sizes
    rows,
    columns,
    # constants
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    mask = column < columns
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        at = (split * rows + row) * columns + column
        total += tl.load(partial_ptr + at, mask=mask, other=0.0)  # [N]
    tl.store(output_ptr + row * columns + column, total.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit
def last_to_arrive(counter_ptr, expected):
    """Whether this program is the last of `expected` to come here; then all that the others stored is there to read.

    Only who comes last depends on time, not what it reads nor in which order, so no sum does. The counter is zero
    before the first arrival and again after the last.
    """
    # All threads of the program have stored before its one arrival is counted and released to the others.
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = before == expected - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def sum_of_splits(partial_ptr, at, mask, stride_split, SPLITS: tl.constexpr):
    """The partial sums at `at` of all splits, added in order. Past the L1 cache, which does not see other programs."""
    total = tl.zeros(at.shape, tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial_ptr + split * stride_split + at, mask=mask, other=0.0, cache_modifier=".cg")
    return total
