"""A mixture of experts: which experts each row goes to, the rows of each expert, and products grouped by expert.

Rule: a row's result depends on nothing but the row. It meets each of its experts alone or beside others in tiles of
ROWS rows, by one compiled kernel, and its experts' outputs are added in the order of their numbers.
Reference: `reference_experts`, operator by operator.
Called by `kernels.verify` and tests; no decoder takes it yet.

    route      the best experts of each row and their weights               a program for each row
    group      the pairs (row, place) of each expert, in order              a program for each expert
    product    the pairs of an expert with its matrix                       programs by outputs, expert and 16 pairs
    merge      weights times the outputs of a row's experts, added          programs by row and columns

The grouping needs no sort and no host: an expert reads all choices and keeps its own. A program whose expert has no
pairs for it ends at once. The matrices of all experts stand below each other as one matrix; with four bits, each has a
multiple of 64 outputs.

R rows, E experts, T experts of a row, C inputs, N outputs of an expert, pair r * T + t is row r with its expert of rank
t.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import Launch, launch
from kernels.triton_layer import Matrix, matrix_constants, matrix_shape, parts
from kernels.triton_product import ROWS, split_sums
from kernels.triton_swiglu import swiglu
from kernels.weight4 import TILE_INPUTS, TILE_OUTPUTS, Weight4

_CHOICES_AT_ONCE = tl.constexpr(256)


class Routes(NamedTuple):
    experts: torch.Tensor  # [R, T] int32, ascending
    weights: torch.Tensor  # [R, T] fp32


class Groups(NamedTuple):
    pairs: torch.Tensor  # [E, R] int32, the first `counts` of each expert
    counts: torch.Tensor  # [E] int32


def mixture(
    x: torch.Tensor, logits: torch.Tensor, gate_up: Matrix, down: Matrix, most: int, normalised: bool = True
) -> torch.Tensor:
    """x [R, C] through its `most` best experts of E: [R, C]. logits [R, E], gate_up [E * 2 I, C], down [E * C, I].

    `normalised`: the weights of a row's experts add up to one; otherwise they are shares of the softmax over all.
    """
    routes = route(logits, most, normalised)
    groups = group(routes.experts, logits.shape[1])
    gate, up = multiply_experts(x, gate_up, groups, most, shared=True).chunk(2, dim=1)
    return merge(multiply_experts(swiglu(gate, up), down, groups, most, shared=False), routes.weights)


def route(logits: torch.Tensor, most: int, normalised: bool) -> Routes:
    """The experts with the `most` largest logits [R, E] of each row, of equal ones the lowest, and their softmax."""
    rows, experts = logits.shape
    if not 1 <= most <= experts:
        raise ValueError(f"a row goes to 1 to {experts} experts, not {most}")
    routes = Routes(
        logits.new_empty((rows, most), dtype=torch.int32), logits.new_empty((rows, most), dtype=torch.float32)
    )
    launch(
        _route,
        (rows,),
        *(logits, *routes, experts, logits.stride(0)),
        choice=Launch(tuning.padded(experts), num_warps=1),
        EXPERTS_PADDED=tuning.padded(experts),
        MOST=most,
        NORMALISED=normalised,
    )
    return routes


def group(chosen: torch.Tensor, experts: int) -> Groups:
    """The pairs of each expert, from the experts [R, T] that rows have chosen, each once."""
    rows, most = chosen.shape
    groups = Groups(chosen.new_empty((experts, max(1, rows))), chosen.new_empty((experts,)))
    launch(
        _group,
        (experts,),
        *(chosen, *groups, rows * most, groups.pairs.stride(0)),
        choice=Launch(256, num_warps=4),
    )
    return groups


def multiply_experts(x: torch.Tensor, matrices: Matrix, groups: Groups, most: int, shared: bool) -> torch.Tensor:
    """The product of every pair with its expert's matrix: [R * T, N] in the type of x.

    x is [R, C], `shared` by the pairs of a row, or has a row for each pair. matrices [E * N, C].
    """
    experts = groups.counts.shape[0]
    all_outputs, inputs = matrix_shape(matrices)
    outputs = all_outputs // experts
    if isinstance(matrices, Weight4) and outputs % TILE_OUTPUTS:
        raise ValueError(f"experts of {outputs} outputs do not fill tiles of {TILE_OUTPUTS}")
    pairs = x.shape[0] * (most if shared else 1)
    rows = pairs // most
    product = x.new_empty((pairs, outputs))
    tiles = -(-inputs // TILE_INPUTS)
    launch(
        _multiply_experts,
        (-(-outputs // 64), experts, -(-rows // ROWS)),
        *(x, *parts(matrices), *groups, product, outputs, inputs, tiles),
        *(x.stride(0), groups.pairs.stride(0)),
        choice=Launch(64, num_warps=4, num_stages=4),
        BLOCK=64,
        BLOCK_ROWS=ROWS,
        TILES=tiles,
        PAIRS=most if shared else 1,
        **matrix_constants(matrices, x),
    )
    return product


def merge(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The outputs [R * T, C] of each row's experts times their weights [R, T], added in order: [R, C]."""
    rows, most = weights.shape
    columns = outputs.shape[1]
    choice = tuning.elementwise(columns)
    merged = outputs.new_empty((rows, columns))
    launch(
        _merge,
        (rows, -(-columns // choice.block)),
        *(outputs, weights, merged, columns),
        choice=choice,
        BLOCK=choice.block,
        MOST=most,
    )
    return merged


@triton.jit
def _route(
    # pointers
    logits_ptr,  # [R, E]
    experts_ptr,  # [R, T] int32
    weights_ptr,  # [R, T] fp32
    # sizes
    experts,
    # strides
    stride_logits,
    # constants
    EXPERTS_PADDED: tl.constexpr,
    MOST: tl.constexpr,
    NORMALISED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, EXPERTS_PADDED)
    at = logits_ptr + row * stride_logits + expert
    logits = tl.load(at, mask=expert < experts, other=float("-inf")).to(tl.float32)  # [E]

    # 1. The largest, one after the other.
    largest = tl.max(logits, axis=0)
    left = logits
    chosen = expert < 0
    for _ in tl.static_range(MOST):
        _, index = tl.max(left, axis=0, return_indices=True, return_indices_tie_break_left=True)
        left = tl.where(expert == index, float("-inf"), left)
        chosen = chosen | (expert == index)

    # 2. What they share, lowest expert first: of the chosen, or of all.
    shares = tl.exp(logits - largest)
    total = tl.sum(tl.where(chosen, shares, 0.0), axis=0) if NORMALISED else tl.sum(shares, axis=0)
    for place in tl.static_range(MOST):
        lowest = tl.min(tl.where(chosen, expert, EXPERTS_PADDED), axis=0)
        share = tl.sum(tl.where(expert == lowest, shares, 0.0), axis=0)  # its own, and zeros
        tl.store(experts_ptr + row * MOST + place, lowest)
        tl.store(weights_ptr + row * MOST + place, tl.div_rn(share, total))
        chosen = chosen & (expert != lowest)


@triton.jit(do_not_specialize=["pairs", "stride_pairs"])
def _group(
    # pointers
    chosen_ptr,  # [R * T]
    pairs_ptr,  # [E, R]
    counts_ptr,  # [E]
    # sizes
    pairs,
    # strides
    stride_pairs,
):
    expert = tl.program_id(0)
    count = tl.zeros((), tl.int32)
    for first in range(0, pairs, _CHOICES_AT_ONCE):
        pair = first + tl.arange(0, _CHOICES_AT_ONCE)
        mine = (tl.load(chosen_ptr + pair, mask=pair < pairs, other=-1) == expert).to(tl.int32)  # [256]
        place = count + tl.cumsum(mine, axis=0) - 1
        tl.store(pairs_ptr + expert.to(tl.int64) * stride_pairs + place, pair, mask=mine > 0)
        count += tl.sum(mine, axis=0)
    tl.store(counts_ptr + expert, count)


@triton.jit(do_not_specialize=["stride_pairs"])
def _multiply_experts(
    # pointers
    x_ptr,  # [R, C] or [R * T, C]
    weight_ptr,  # [E * N, C] or parts of a Weight4
    scales_ptr,
    offsets_ptr,
    pairs_ptr,  # [E, R]
    counts_ptr,  # [E]
    product_ptr,  # [R * T, N]
    # sizes
    outputs,  # N
    inputs,
    tiles,
    # strides
    stride_x,
    stride_pairs,
    # constants
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TILES: tl.constexpr,
    PAIRS: tl.constexpr,  # pairs that share a row of x
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
):
    # 1. Up to M pairs of one expert.
    expert = tl.program_id(1)
    count = tl.load(counts_ptr + expert)
    place = tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    if tl.program_id(2) * BLOCK_ROWS >= count:
        return
    real = place < count
    pair = tl.load(pairs_ptr + expert.to(tl.int64) * stride_pairs + place, mask=real, other=0).to(tl.int64)  # [M]

    # 2. N of its outputs.
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real_output = output < outputs
    sums = split_sums(
        *(x_ptr, pair // PAIRS, real, stride_x),
        *(weight_ptr, scales_ptr, offsets_ptr, expert * outputs + output, real_output, 0, inputs, tiles),
        *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, RAGGED, WIDE),
    )  # [N, M]
    target = product_ptr + pair[None, :] * outputs + output[:, None]
    tl.store(target, sums.to(product_ptr.dtype.element_ty), mask=real[None, :] & real_output[:, None])


@triton.jit
def _merge(
    # pointers
    outputs_ptr,  # [R * T, C]
    weights_ptr,  # [R, T]
    merged_ptr,  # [R, C]
    # sizes
    columns,
    # constants
    BLOCK: tl.constexpr,
    MOST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for place in tl.static_range(MOST):
        pair = row * MOST + place
        output = tl.load(outputs_ptr + pair * columns + column, mask=column < columns, other=0.0).to(tl.float32)
        total += output * tl.load(weights_ptr + pair)
    tl.store(merged_ptr + row * columns + column, total.to(merged_ptr.dtype.element_ty), mask=column < columns)
