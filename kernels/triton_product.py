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
from kernels.triton_codes import group_offset, group_scale, numbers_of, operand_of
from kernels.triton_overlap import after_previous, bring_nearer, let_next_begin
from kernels.weight4 import QUARTERS, TILE_INPUTS, TILE_OUTPUTS, TILE_WORDS

_OUTPUTS = tl.constexpr(TILE_OUTPUTS)
_INPUTS = tl.constexpr(TILE_INPUTS)
_WORDS = tl.constexpr(TILE_WORDS)
_QUARTERS = tl.constexpr(QUARTERS)


ROWS = 16  # of a tile in the fused products of a layer


class Workspace:
    """Memory of the products' splits, and the counters of their tiles, which are zero between launches.

    One for all launches of a stream, which run one after the other.
    """

    def __init__(self, device: torch.device | str, rows: int, splits_times_outputs: int, tiles: int = 1 << 15) -> None:
        """For up to `rows` rows, and products whose splits times outputs are no more than that."""
        self.rows = -(-rows // ROWS) * ROWS
        self.partial = torch.empty(self.rows * splits_times_outputs, dtype=torch.float32, device=device)
        self.counters = torch.zeros(tiles, dtype=torch.int32, device=device)

    def check(self, rows: int, splits: int, outputs: int, tiles: int) -> None:
        if rows * splits * outputs > self.partial.numel() or tiles > self.counters.numel():
            raise ValueError(
                f"{rows} rows of {outputs} outputs in {splits} splits need more than this workspace of "
                f"{self.partial.numel()} sums and {self.counters.numel()} tiles"
            )


def row_pieces(
    output: torch.Tensor, splits: int, work: Workspace | None = None
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Pieces of the rows of output [R, N], and where each piece's products go: [splits, rows of the piece, N].

    With one split that is the output itself; with more it is float32, as many rows as the workspace holds, or `work`
    for all of them. Neither has been written yet.
    """
    rows, columns = output.shape
    piece = rows if splits == 1 else max(1, tuning.SPLIT_WORKSPACE_BYTES // (splits * columns * 4))
    if work is not None:
        yield slice(0, rows), work.partial
        return
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
    RAGGED: tl.constexpr,  # the last tile is not full
    WIDE: tl.constexpr,
):
    """Products of N outputs with M rows over one split of the inputs, TILES tiles of 128 in order: [N, M] fp32."""
    sums = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
    # Outputs that are not there stand for the first, and nobody stores what they get: loads of weights have no mask,
    # which would take as many instructions as unpacking a register of codes. Rows that are not there are not read.
    output = tl.where(real_output, output, 0)
    steps = tl.minimum(TILES, tiles - split * TILES)
    if KIND < 0:
        at = split * TILES * _INPUTS + tl.arange(0, _INPUTS)
        x_at = x_ptr + row[None, :] * stride_x + at[:, None]
        weight_at = weight_ptr + output.to(tl.int64)[:, None] * inputs + at[None, :]
        for _ in tl.range(0, steps):
            if RAGGED:
                x = tl.load(x_at, mask=(at < inputs)[:, None] & real_row[None, :], other=0.0)  # [128, M]
                weight = tl.load(weight_at, mask=(at < inputs)[None, :], other=0.0)  # [N, 128]
                at += _INPUTS
            else:
                x = tl.load(x_at, mask=real_row[None, :], other=0.0)
                weight = tl.load(weight_at)
            if KIND == -2:
                # Exact. The interpreter cannot go from FP8 to float64 at once.
                weight = weight.to(tl.float32).to(x.dtype)
            sums = product(weight, x, sums, WIDE)
            x_at += _INPUTS
            weight_at += _INPUTS
        if KIND == -2:
            sums = sums * tl.load(scales_ptr + output)[:, None]
    else:
        PER_TILE: tl.constexpr = _INPUTS // GROUP
        first = (output // _OUTPUTS).to(tl.int64) * tiles + split * TILES
        word = tl.arange(0, _WORDS)
        at = split * TILES * _INPUTS + word
        x_at = x_ptr + row[None, :] * stride_x + at[:, None]
        words_at = weight_ptr + (first * _OUTPUTS + output % _OUTPUTS)[:, None] * _WORDS + word[None, :]
        groups_at = first * (PER_TILE * _OUTPUTS) + output % _OUTPUTS
        for _ in tl.range(0, steps):
            words = tl.load(words_at)  # [N, 32]
            part = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
            x_part = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
            for quarter in tl.static_range(_QUARTERS):
                if quarter * _WORDS % GROUP == 0:  # the beginning of a group: its scale is long there at the end
                    group_at = groups_at + quarter * _WORDS // GROUP * _OUTPUTS
                    scale = group_scale(scales_ptr + group_at, KIND)  # [N]
                    offset, zero = group_offset(offsets_ptr + group_at, KIND)  # [N]
                if RAGGED:
                    known = (at + quarter * _WORDS < inputs)[:, None] & real_row[None, :]
                    x = tl.load(x_at + quarter * _WORDS, mask=known, other=0.0)  # [32, M]
                else:
                    x = tl.load(x_at + quarter * _WORDS, mask=real_row[None, :], other=0.0)
                if WIDE is None:
                    part = product(operand_of(words, zero, x, quarter, KIND), x, part, WIDE)
                else:
                    part = product(numbers_of(words, zero, quarter, KIND), x, part, WIDE)
                if KIND == 2:
                    # By the same instruction, so that their order does not depend on M.
                    x_part = product(tl.full((BLOCK, _WORDS), 1.0, x.dtype), x, x_part, WIDE)
                if (quarter + 1) * _WORDS % GROUP == 0:  # the end of a group
                    sums = tl.fma(part, tl.broadcast_to(scale[:, None], part.shape), sums)
                    part = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
                    if KIND == 2:
                        sums = tl.fma(x_part, tl.broadcast_to(offset[:, None], part.shape), sums)
                        x_part = tl.zeros((BLOCK, BLOCK_ROWS), tl.float32)
            at += _INPUTS
            x_at += _INPUTS
            words_at += _OUTPUTS * _WORDS
            groups_at += PER_TILE * _OUTPUTS
    return sums


@triton.jit
def prefetch_split(
    weight_ptr,
    output,  # [N]
    real_output,  # [N]
    split,
    inputs,
    tiles,
    TILES: tl.constexpr,
    KIND: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Bring the weights of the first PREFETCH tiles of a split nearer, before anything else is known."""
    if OVERLAP and PREFETCH > 0:
        first = split * TILES
        if KIND < 0:
            width: tl.constexpr = 64 if KIND == -1 else 128  # weights in 128 bytes
            at = first * _INPUTS + tl.arange(0, PREFETCH * (_INPUTS // width)) * width
            bring_nearer(
                weight_ptr + output.to(tl.int64)[:, None] * inputs + at[None, :],
                real_output[:, None] & (at < tl.minimum(inputs, (first + TILES) * _INPUTS))[None, :],
                OVERLAP,
            )
        else:
            tile = first + tl.arange(0, PREFETCH)
            start = (output // _OUTPUTS).to(tl.int64) * tiles
            at = ((start[:, None] + tile[None, :]) * _OUTPUTS + (output % _OUTPUTS)[:, None]) * _WORDS
            wanted = real_output[:, None] & (tile < tl.minimum(tiles, first + TILES))[None, :]
            bring_nearer(weight_ptr + at, wanted, OVERLAP)


@triton.jit
def product(a, b, sums, WIDE: tl.constexpr):
    """a [N, K] times b [K, M], added to sums in float32; WIDE as `kernels.launch.product_type` says."""
    if WIDE is not None:
        return sums + tl.dot(a.to(WIDE), b.to(WIDE), input_precision="ieee", out_dtype=WIDE).to(tl.float32)
    return tl.dot(a, b, sums)


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
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    let_next_begin(OVERLAP)
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
