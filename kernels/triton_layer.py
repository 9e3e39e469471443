"""A decoder layer in five launches, for steps of few rows.

    heads      norm, qkv product, bias, norm of heads, rotary embedding, write to the KV cache
    attention  `kernels.triton_attention`
    added      o product, residual
    gated      norm, gate and up products, silu(gate) * up
    added      down product, residual

Rule: the order of every sum is given by the shape of the weights; a tile always has ROWS rows, one compiled kernel
serves every number of them, and a row's bits depend on nothing but the row.
Reference: `reference_layer`, operator by operator.
Called by `deploy.bench.gpu`, `kernels.verify` and tests; no decoder takes it yet.

A norm needs the mean square of its whole row before its first column is known. So whoever writes a row of the hidden
state writes it a second time, times the weights of the norm that comes next, and leaves the sum of squares of each 64
columns. Products read the second; its one factor for the whole row, from those few sums, meets their own at the end,
when it has long been there. It is rounded once, as a normed state would be.

Weights have 16 bits, or 8 with a scale for each output, or 4. Activations have 16: codes of eight bits are widened as
they are read, exactly, since few rows wait for memory and not for the tensor cores.

Products are divided into splits of the inputs as in `kernels.triton_product`. The program that comes last at a tile
adds the splits, in order, and finishes the tile: an atomic counter says who that is, and no value goes through it.
Unlike a launch of its own, that costs neither a start nor a wait for the slowest tile.

R rows, C columns of the hidden state, Q its tiles of 64, H query heads, K KV heads, D head size, I gated width,
N outputs of a program, M = ROWS.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch, product_type
from kernels.triton_attention import paged_attention
from kernels.triton_overlap import after_previous, let_next_begin
from kernels.triton_product import (
    ROWS,
    Workspace,
    last_to_arrive,
    prefetch_split,
    split_sums,
    sum_of_splits,
)
from kernels.triton_quantise import on_grid, scale_of
from kernels.weight4 import TILE_INPUTS, Weight4
from kernels.weight8 import KINDS, LARGEST, Weight8

SQUARES = 64  # columns whose squares are summed together

_SQUARES = tl.constexpr(SQUARES)

# of 16 bits, of 8 per channel, of 4
Matrix = torch.Tensor | Weight8 | Weight4


class Hidden(NamedTuple):
    """The hidden state between two operators."""

    values: torch.Tensor  # [R, C] of 16 bits
    weighted: torch.Tensor  # [R, C]: values times the weights of the next norm
    squares: torch.Tensor  # [R, Q] fp32, of values


class Norm(NamedTuple):
    weight: torch.Tensor  # [C]
    epsilon: float


class HeadWeights(NamedTuple):
    """What is done to the product of qkv before it is queries, keys and values."""

    bias: torch.Tensor | None  # [(H + 2 K) D]
    query_norm: torch.Tensor | None  # [D], as key_norm
    key_norm: torch.Tensor | None
    epsilon: float
    cosines: torch.Tensor  # [positions, D / 2] fp32
    sines: torch.Tensor
    interleaved: bool


class Cache(NamedTuple):
    """Where the rows of a step belong in one layer's cache."""

    keys: torch.Tensor  # [blocks, block size, K, D]
    values: torch.Tensor
    tables: torch.Tensor  # [S, B] int32
    sequences: torch.Tensor  # [R]
    positions: torch.Tensor  # [R]
    scales: tuple[torch.Tensor, torch.Tensor] | None = None  # [blocks, block size, K] fp32 each, of codes of eight bits


class LayerWeights(NamedTuple):
    """Weights of one layer; matrices that read the same input are one, rows below each other."""

    attention_norm: Norm
    qkv: Matrix  # [(H + 2 K) D, C]
    heads: HeadWeights
    o: Matrix  # [C, H D]
    mlp_norm: Norm
    gate_up: Matrix  # [2 I, C]
    down: Matrix  # [C, I]
    sinks: torch.Tensor | None = None  # [H] fp32


def splits_times_outputs(matrices: list[tuple[int, int]]) -> int:
    """What a `Workspace` needs for products with matrices of these outputs and inputs."""
    shapes = [(shape, four) for shape in matrices for four in (False, True)]
    return max(shape[0] * tuning.layer_product(*shape, four)[1] for shape, four in shapes)


def decode_layer(
    hidden: Hidden,
    layer: LayerWeights,
    next_norm: Norm,
    cache: Cache,
    work: Workspace,
    longest: int | None = None,
    window: int = 0,
) -> Hidden:
    """One layer, five launches; `next_norm` follows it. `longest` and `window` as in `kernels.triton_attention`."""
    queries = project_heads(hidden, layer.attention_norm.epsilon, layer.qkv, layer.heads, cache, work)
    scale = queries.shape[2] ** -0.5
    attended = paged_attention(
        queries, *cache[:5], scale, longest, window, layer.sinks, scales=cache.scales, counters=work.counters
    )
    hidden = project_added(attended.flatten(1), layer.o, hidden, layer.mlp_norm, work)
    gated = project_gated(hidden, layer.mlp_norm.epsilon, layer.gate_up, work)
    return project_added(gated, layer.down, hidden, next_norm, work)


def embed(tokens: torch.Tensor, embedding: torch.Tensor, next_norm: Norm) -> Hidden:
    """The rows of embedding [V, C] that tokens [R] name."""
    rows, columns = tokens.shape[0], embedding.shape[1]
    hidden = _blank(embedding, rows, columns)
    launch(
        _embed,
        (rows, hidden.squares.shape[1]),
        *(tokens, embedding, next_norm.weight, *hidden, columns, embedding.stride(0)),
        choice=tuning.Launch(SQUARES, num_warps=1),
    )
    return hidden


def project_heads(
    hidden: Hidden, epsilon: float, qkv: Matrix, heads: HeadWeights, cache: Cache, work: Workspace
) -> torch.Tensor:
    """Queries [R, H, D] of each row of the normed hidden state.

    Its keys and values are in the cache, unless its position is -1 (padding).
    The head size is a power of two, 16 at least, and all of it turns. Raises ValueError where it is not so.
    """
    rows = hidden.values.shape[0]
    _, block_size, kv_heads, head_dim = cache.keys.shape
    outputs, inputs = matrix_shape(qkv)
    query_heads = outputs // head_dim - 2 * kv_heads
    if cache.keys.dtype == torch.int8 and cache.scales is None:
        raise ValueError("caches of int8 need scales")
    if head_dim != tuning.padded(head_dim) or head_dim < 16 or 2 * heads.cosines.shape[1] != head_dim:
        raise ValueError(f"heads of {head_dim} that turn in {heads.cosines.shape[1]} pairs have no fused product here")
    choice, splits = tuning.layer_heads(head_dim, outputs, inputs, isinstance(qkv, Weight4))
    grid = (outputs // choice.block, splits, -(-rows // ROWS))
    work.check(rows, splits, outputs, grid[0] * grid[2])
    queries = hidden.values.new_empty((rows, query_heads, head_dim))
    normed = heads.query_norm is not None
    any_ = hidden.values  # for pointers that are not touched
    launch(
        _project_heads,
        grid,
        *(hidden.weighted, hidden.squares, *parts(qkv), any_ if heads.bias is None else heads.bias),
        *(heads.query_norm if normed else any_, heads.key_norm if normed else any_, heads.cosines, heads.sines),
        *(queries, *cache[:5], *(cache.scales or (work.partial, work.partial)), work.partial, work.counters),
        *(rows, inputs, _tiles(inputs), epsilon, heads.epsilon, query_heads, kv_heads),
        LARGEST.get(cache.keys.dtype, 0.0),
        *(*cache.keys.stride()[:3], *cache.values.stride()[:3], cache.tables.stride(0), heads.cosines.stride(0)),
        choice=choice,
        BLOCK=choice.block,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=ROWS,
        SPLITS=splits,
        TILES=-(-_tiles(inputs) // splits),
        SQUARES_PADDED=tuning.padded(hidden.squares.shape[1]),
        BIAS=heads.bias is not None,
        HEAD_NORM=normed,
        INTERLEAVED=heads.interleaved,
        BLOCK_SIZE=block_size,
        EIGHT=cache.keys.dtype in KINDS,
        WHOLE=cache.keys.dtype == torch.int8,
        SCALED=cache.scales is not None,
        PREFETCH=tuning.PREFETCH,
        **matrix_constants(qkv, hidden.values),
    )
    return queries


def project_gated(hidden: Hidden, epsilon: float, gate_up: Matrix, work: Workspace) -> torch.Tensor:
    """silu(gate) * up of the normed hidden state, [R, I]; gate_up [2 I, C] has the gate's outputs first.

    I is a multiple of 64 where the weights have four bits.
    """
    rows = hidden.values.shape[0]
    outputs, inputs = matrix_shape(gate_up)
    width = outputs // 2
    if isinstance(gate_up, Weight4) and width % 64:
        raise ValueError(f"a gate of {width} outputs does not fill tiles of 64, so gate and up cannot share a matrix")
    choice, splits = tuning.layer_product(outputs, inputs, isinstance(gate_up, Weight4))
    grid = (-(-width // (choice.block // 2)), splits, -(-rows // ROWS))
    work.check(rows, splits, outputs, grid[0] * grid[2])
    gated = hidden.values.new_empty((rows, width))
    launch(
        _project_gated,
        grid,
        *(hidden.weighted, hidden.squares, *parts(gate_up), gated, work.partial, work.counters),
        *(rows, width, inputs, _tiles(inputs), epsilon),
        choice=choice,
        BLOCK=choice.block,
        BLOCK_ROWS=ROWS,
        SPLITS=splits,
        TILES=-(-_tiles(inputs) // splits),
        SQUARES_PADDED=tuning.padded(hidden.squares.shape[1]),
        PREFETCH=tuning.PREFETCH,
        **matrix_constants(gate_up, hidden.values),
    )
    return gated


def project_added(x: torch.Tensor, weight: Matrix, residual: Hidden, next_norm: Norm, work: Workspace) -> Hidden:
    """residual + the product of x [R, inputs] with weight [C, inputs], rounded once."""
    rows = x.shape[0]
    outputs, inputs = matrix_shape(weight)
    choice, splits = tuning.layer_product(outputs, inputs, isinstance(weight, Weight4))
    grid = (-(-outputs // SQUARES), splits, -(-rows // ROWS))
    work.check(rows, splits, outputs, grid[0] * grid[2])
    total = _blank(residual.values, rows, outputs)
    launch(
        _project_added,
        grid,
        *(x, *parts(weight), residual.values, next_norm.weight, *total, work.partial, work.counters),
        *(rows, outputs, inputs, _tiles(inputs), x.stride(0)),
        choice=choice,
        BLOCK=SQUARES,
        BLOCK_ROWS=ROWS,
        SPLITS=splits,
        TILES=-(-_tiles(inputs) // splits),
        PREFETCH=tuning.PREFETCH,
        **matrix_constants(weight, x),
    )
    return total


def matrix_shape(matrix: Matrix) -> tuple[int, int]:
    """Outputs and inputs."""
    if isinstance(matrix, Weight4):
        return matrix.outputs, matrix.inputs
    outputs, inputs = (matrix.codes if isinstance(matrix, Weight8) else matrix).shape
    return outputs, inputs


def matrix_bytes(matrix: Matrix) -> int:
    return matrix.codes.nbytes + matrix.scales.nbytes if isinstance(matrix, Weight8) else matrix.nbytes


def _tiles(inputs: int) -> int:
    return -(-inputs // TILE_INPUTS)


def parts(matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `split_sums` gets of it."""
    if isinstance(matrix, Weight4):
        return matrix.pointers
    if isinstance(matrix, Weight8):
        if matrix.scales.dim() != 1:
            raise ValueError("weights of 8 bits meet activations of 16 with scales per channel, not in blocks")
        return matrix.codes, matrix.scales, matrix.scales
    return matrix, matrix, matrix


def matrix_constants(matrix: Matrix, x: torch.Tensor) -> dict[str, object]:
    """The constants of `split_sums` for this kind of matrix and activations like x."""
    four = isinstance(matrix, Weight4)
    return {
        "GROUP": matrix.group if four else TILE_INPUTS,
        "KIND": matrix.kind if four else -2 if isinstance(matrix, Weight8) else -1,
        "RAGGED": matrix_shape(matrix)[1] % TILE_INPUTS > 0,
        "WIDE": product_type(x.dtype),
    }


def _blank(like: torch.Tensor, rows: int, columns: int) -> Hidden:
    squares = like.new_empty((rows, -(-columns // SQUARES)), dtype=torch.float32)
    return Hidden(like.new_empty((rows, columns)), like.new_empty((rows, columns)), squares)


@triton.jit
def _embed(
    # pointers
    tokens_ptr,  # [R]
    embedding_ptr,  # [V, C]
    norm_ptr,  # [C]
    values_ptr,  # [R, C]
    weighted_ptr,  # [R, C]
    squares_ptr,  # [R, Q]
    # sizes
    columns,
    # strides
    stride_embedding,
    # constants
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * _SQUARES + tl.arange(0, _SQUARES)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    values = tl.load(embedding_ptr + token * stride_embedding + column, mask=column < columns, other=0.0)  # [64]
    tl.store(values_ptr + row * columns + column, values, mask=column < columns)
    wide = values.to(tl.float32)
    norm = tl.load(norm_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    weighted = (wide * norm).to(values.dtype)
    tl.store(weighted_ptr + row * columns + column, weighted, mask=column < columns)
    tl.store(squares_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.sum(wide * wide, axis=0))


@triton.jit
def row_scales(squares_ptr, row, real_row, columns, epsilon, SQUARES_PADDED: tl.constexpr):
    """One over the root mean square of each row [M], from the sums of squares of its tiles."""
    tiles = (columns + _SQUARES - 1) // _SQUARES
    tile = tl.arange(0, SQUARES_PADDED)
    mask = real_row[:, None] & (tile < tiles)[None, :]
    squares = tl.load(squares_ptr + row[:, None] * tiles + tile[None, :], mask=mask, other=0.0)  # [M, Q]
    mean = tl.div_rn(tl.sum(squares, axis=1), columns.to(tl.float32) + tl.zeros(row.shape, tl.float32))
    return tl.div_rn(tl.full(row.shape, 1.0, tl.float32), tl.sqrt_rn(mean + epsilon))


@triton.jit
def halves(sums, ALTERNATE: tl.constexpr):
    """The first half of sums [N, M] and the second, or with ALTERNATE the even and the odd: [N / 2, M] each."""
    HALF: tl.constexpr = sums.shape[0] // 2
    if ALTERNATE:
        return tl.split(tl.permute(tl.reshape(sums, (HALF, 2, sums.shape[1])), (0, 2, 1)))
    return tl.split(tl.permute(tl.reshape(sums, (2, HALF, sums.shape[1])), (1, 2, 0)))


@triton.jit(do_not_specialize=["rows", "stride_table"])
def _project_heads(
    # pointers
    weighted_ptr,  # [R, C]
    squares_ptr,  # [R, Q]
    weight_ptr,  # [(H + 2 K) D, C] or parts of a Weight4
    scales_ptr,
    offsets_ptr,
    bias_ptr,  # [(H + 2 K) D], read when BIAS
    query_norm_ptr,  # [D], read when HEAD_NORM
    key_norm_ptr,  # [D], read when HEAD_NORM
    cosines_ptr,  # [positions, D / 2] fp32
    sines_ptr,  # [positions, D / 2] fp32
    queries_ptr,  # [R, H, D]
    keys_ptr,  # [blocks, block size, K, D]
    values_ptr,  # [blocks, block size, K, D]
    tables_ptr,  # [S, B]
    sequences_ptr,  # [R]
    positions_ptr,  # [R]
    key_scales_ptr,  # [blocks, block size, K] fp32, written when SCALED
    value_scales_ptr,  # [blocks, block size, K] fp32, written when SCALED
    partial_ptr,  # [splits, R, (H + 2 K) D] fp32
    counters_ptr,  # [tiles]
    # sizes
    rows,
    inputs,
    tiles,
    epsilon,
    head_epsilon,
    query_heads,
    kv_heads,
    largest_code,
    # strides
    stride_key_block,
    stride_key_slot,
    stride_key_head,
    stride_value_block,
    stride_value_slot,
    stride_value_head,
    stride_table,
    stride_angles,
    # constants
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    SQUARES_PADDED: tl.constexpr,
    BIAS: tl.constexpr,
    HEAD_NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EIGHT: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # 1. N outputs of one head of M rows, in one split of the inputs.
    PARTS: tl.constexpr = HEAD_DIM // BLOCK
    head = tl.program_id(0) // PARTS
    split = tl.program_id(1)
    outputs = tl.num_programs(0) * BLOCK
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    real_row = row < rows
    prefetch_split(weight_ptr, output, output < outputs, split, inputs, tiles, TILES, KIND, PREFETCH, OVERLAP)
    after_previous(OVERLAP)
    sums = split_sums(
        *(weighted_ptr, row, real_row, inputs),
        *(weight_ptr, scales_ptr, offsets_ptr, output, output < outputs, split, inputs, tiles),
        *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, RAGGED, WIDE),
    )  # [N, M]
    let_next_begin(OVERLAP)

    # 2. The halves of the head that turn with each other: of all splits and parts, by the program that comes last.
    pair = tl.arange(0, HEAD_DIM // 2)
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + HEAD_DIM // 2
    mask = real_row[None, :] & (pair < HEAD_DIM)[:, None]
    if SPLITS * PARTS == 1:
        a, b = halves(sums, INTERLEAVED)  # [D / 2, M]
    else:
        at = row[None, :] * outputs + output[:, None]
        tl.store(partial_ptr + split.to(tl.int64) * rows * outputs + at, sums, mask=real_row[None, :])
        counter = counters_ptr + tl.program_id(2) * tl.num_programs(0) + head
        if not last_to_arrive(counter, SPLITS * PARTS):
            return
        base = row[None, :] * outputs + head * HEAD_DIM
        a = sum_of_splits(partial_ptr, base + first[:, None], mask, rows.to(tl.int64) * outputs, SPLITS)
        b = sum_of_splits(partial_ptr, base + second[:, None], mask, rows.to(tl.int64) * outputs, SPLITS)
    scale = row_scales(squares_ptr, row, real_row, inputs, epsilon, SQUARES_PADDED)[None, :]
    a, b = a * scale, b * scale
    if BIAS:
        a += tl.load(bias_ptr + head * HEAD_DIM + first).to(tl.float32)[:, None]
        b += tl.load(bias_ptr + head * HEAD_DIM + second).to(tl.float32)[:, None]

    # 3. Queries and keys: their own norm, and the angles of their positions.
    position = tl.load(positions_ptr + row, mask=real_row, other=-1).to(tl.int64)  # [M]
    if head < query_heads + kv_heads:
        if HEAD_NORM:
            mean = (tl.sum(a * a, axis=0) + tl.sum(b * b, axis=0)) * (1.0 / HEAD_DIM)
            own = tl.div_rn(tl.full(mean.shape, 1.0, tl.float32), tl.sqrt_rn(mean + head_epsilon))  # [M]
            if head < query_heads:
                a_weight, b_weight = tl.load(query_norm_ptr + first), tl.load(query_norm_ptr + second)
            else:
                a_weight, b_weight = tl.load(key_norm_ptr + first), tl.load(key_norm_ptr + second)
            a = a * own[None, :] * a_weight.to(tl.float32)[:, None]
            b = b * own[None, :] * b_weight.to(tl.float32)[:, None]
        angle = tl.maximum(position, 0)[None, :] * stride_angles + pair[:, None]
        cosine = tl.load(cosines_ptr + angle, mask=mask, other=0.0)  # [D / 2, M]
        sine = tl.load(sines_ptr + angle, mask=mask, other=0.0)
        turned = a * cosine - b * sine
        b = b * cosine + a * sine
        a = turned

    # 4. Where they belong.
    if head < query_heads:
        target = queries_ptr + (row * query_heads + head) * HEAD_DIM  # [M]
        kind = queries_ptr.dtype.element_ty
        tl.store(target[None, :] + first[:, None], a.to(kind), mask=mask)
        tl.store(target[None, :] + second[:, None], b.to(kind), mask=mask)
        return
    written = real_row & (position >= 0)
    sequence = tl.load(sequences_ptr + row, mask=written, other=0).to(tl.int64)
    there = tl.maximum(position, 0)
    block = tl.load(tables_ptr + sequence * stride_table + there // BLOCK_SIZE, mask=written, other=0).to(tl.int64)
    slot = there % BLOCK_SIZE
    if EIGHT:
        scale = tl.full(row.shape, 1.0, tl.float32)
        if SCALED:
            largest = tl.maximum(tl.max(tl.abs(a), axis=0), tl.max(tl.abs(b), axis=0))  # [M]
            scale = scale_of(largest, largest_code)
            scale_at = (block * BLOCK_SIZE + slot) * kv_heads + (head - query_heads) % kv_heads
            if head < query_heads + kv_heads:
                tl.store(key_scales_ptr + scale_at, scale, mask=written)
            else:
                tl.store(value_scales_ptr + scale_at, scale, mask=written)
        a = on_grid(tl.clamp(tl.div_rn(a, scale[None, :] + tl.zeros_like(a)), -largest_code, largest_code), WHOLE)
        b = on_grid(tl.clamp(tl.div_rn(b, scale[None, :] + tl.zeros_like(b)), -largest_code, largest_code), WHOLE)
    mask = written[None, :] & (pair < HEAD_DIM)[:, None]
    kind = keys_ptr.dtype.element_ty
    if head < query_heads + kv_heads:
        own_head = (head - query_heads).to(tl.int64)
        target = keys_ptr + block * stride_key_block + slot * stride_key_slot + own_head * stride_key_head
        tl.store(target[None, :] + first[:, None], a.to(kind), mask=mask)
        tl.store(target[None, :] + second[:, None], b.to(kind), mask=mask)
    else:
        own_head = (head - query_heads - kv_heads).to(tl.int64)
        target = values_ptr + block * stride_value_block + slot * stride_value_slot + own_head * stride_value_head
        tl.store(target[None, :] + first[:, None], a.to(kind), mask=mask)
        tl.store(target[None, :] + second[:, None], b.to(kind), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _project_gated(
    # pointers
    weighted_ptr,  # [R, C]
    squares_ptr,  # [R, Q]
    weight_ptr,  # [2 I, C] or parts of a Weight4
    scales_ptr,
    offsets_ptr,
    gated_ptr,  # [R, I]
    partial_ptr,  # [splits, R, 2 I] fp32
    counters_ptr,  # [tiles]
    # sizes
    rows,
    width,  # I
    inputs,
    tiles,
    epsilon,
    # constants
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    SQUARES_PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # 1. Half of N outputs of the gate and the same of up, of M rows, in one split of the inputs.
    split = tl.program_id(1)
    HALF: tl.constexpr = BLOCK // 2
    lane = tl.arange(0, BLOCK)
    of_half = tl.program_id(0) * HALF + lane % HALF
    output = of_half + lane // HALF * width
    row = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    real_row = row < rows
    prefetch_split(weight_ptr, output, of_half < width, split, inputs, tiles, TILES, KIND, PREFETCH, OVERLAP)
    after_previous(OVERLAP)
    sums = split_sums(
        *(weighted_ptr, row, real_row, inputs),
        *(weight_ptr, scales_ptr, offsets_ptr, output, of_half < width, split, inputs, tiles),
        *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, RAGGED, WIDE),
    )  # [N, M]
    let_next_begin(OVERLAP)

    # 2. All splits of both, by the program that comes last.
    if SPLITS == 1:
        gate, up = halves(sums, False)  # [N / 2, M]
    else:
        target = partial_ptr + (split.to(tl.int64) * rows + row)[None, :] * (2 * width) + output[:, None]
        tl.store(target, sums, mask=real_row[None, :] & (of_half < width)[:, None])
        if not last_to_arrive(counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), SPLITS):
            return
        at = row[None, :] * (2 * width) + (tl.program_id(0) * HALF + tl.arange(0, HALF))[:, None]
        mask = real_row[None, :] & (tl.program_id(0) * HALF + tl.arange(0, HALF) < width)[:, None]
        gate = sum_of_splits(partial_ptr, at, mask, rows.to(tl.int64) * (2 * width), SPLITS)
        up = sum_of_splits(partial_ptr, at + width, mask, rows.to(tl.int64) * (2 * width), SPLITS)
    scale = row_scales(squares_ptr, row, real_row, inputs, epsilon, SQUARES_PADDED)[None, :]
    gate, up = gate * scale, up * scale
    output = tl.program_id(0) * HALF + tl.arange(0, HALF)
    mask = real_row[None, :] & (output < width)[:, None]

    # 3. The gate on up.
    gated = tl.div_rn(gate, 1.0 + tl.exp(-gate)) * up
    tl.store(gated_ptr + row[None, :] * width + output[:, None], gated.to(gated_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _project_added(
    # pointers
    x_ptr,  # [R, inputs]
    weight_ptr,  # [C, inputs] or parts of a Weight4
    scales_ptr,
    offsets_ptr,
    residual_ptr,  # [R, C]
    norm_ptr,  # [C]
    sum_ptr,  # [R, C]
    weighted_ptr,  # [R, C]
    squares_ptr,  # [R, Q]
    partial_ptr,  # [splits, R, C] fp32
    counters_ptr,  # [tiles]
    # sizes
    rows,
    outputs,  # C
    inputs,
    tiles,
    # strides
    stride_x,
    # constants
    BLOCK: tl.constexpr,  # SQUARES
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILES: tl.constexpr,
    GROUP: tl.constexpr,
    KIND: tl.constexpr,
    RAGGED: tl.constexpr,
    WIDE: tl.constexpr,
    PREFETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    # 1. 64 outputs of M rows, in one split of the inputs.
    split = tl.program_id(1)
    output = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    real_row = row < rows
    prefetch_split(weight_ptr, output, output < outputs, split, inputs, tiles, TILES, KIND, PREFETCH, OVERLAP)
    after_previous(OVERLAP)
    sums = split_sums(
        *(x_ptr, row, real_row, stride_x),
        *(weight_ptr, scales_ptr, offsets_ptr, output, output < outputs, split, inputs, tiles),
        *(BLOCK, BLOCK_ROWS, TILES, GROUP, KIND, RAGGED, WIDE),
    )  # [64, M]
    let_next_begin(OVERLAP)

    # 2. All splits, by the program that comes last.
    mask = real_row[None, :] & (output < outputs)[:, None]
    at = row[None, :] * outputs + output[:, None]
    if SPLITS > 1:
        tl.store(partial_ptr + split.to(tl.int64) * rows * outputs + at, sums, mask=mask)
        if not last_to_arrive(counters_ptr + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0), SPLITS):
            return
        sums = sum_of_splits(partial_ptr, at, mask, rows.to(tl.int64) * outputs, SPLITS)

    # 3. The residual; and for the next norm, its weights times what is stored, and the squares of that.
    residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    stored = (sums + residual).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + at, stored, mask=mask)
    wide = tl.where(mask, stored.to(tl.float32), 0.0)
    norm = tl.load(norm_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)[:, None]
    tl.store(weighted_ptr + at, (wide * norm).to(stored.dtype), mask=mask)
    squares_at = squares_ptr + row * tl.num_programs(0) + tl.program_id(0)
    tl.store(squares_at, tl.sum(wide * wide, axis=0), mask=real_row)
