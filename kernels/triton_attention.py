"""Attention over the paged KV cache, one row (one query token) at a time, in fixed splits of its context.

Rule: what a row gets depends on its own context only, bit for bit: not on the number of rows, not on other rows, not on
whether it came as a decode, a verify or a prefill row. Splits are aligned to position 0 and have the same length for
every batch; tiles inside a split and splits inside a row are added in position order.
Reference: `reference.paged_attention`.

Two kernels. `_attend_split` gives every (row, KV head, split) an unnormalised output, its maximum and its sum. A tensor
core multiplies at least 16 queries at a time: they are the query heads that share a KV head, and with them up to 16 / G
neighbouring rows of the same sequence, so that a draft's rows read K and V once. A row's place among the 16 does not
enter its arithmetic; what it must not see is masked, and a masked position adds an exact zero. `_combine_splits` adds
the splits of a (row, query head) in order. What varies with the batch is kept out of Triton's specialisation, so that
one compiled kernel serves every batch.

R rows, H query heads, K KV heads, G = H / K, D head size, M queries of a tile, N positions of a tile, P splits.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import INTERPRETED, launch

LOG2_E = tl.constexpr(1.4426950408889634)


def paged_attention(
    queries: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    longest: int | None = None,
    window: int = 0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row's attention over positions 0..positions[row] of its sequence, [R, H, D] in the type of `queries`.

    With a window, over the last `window` of those positions. `sinks` [H], float32: a logit of each head that has no
    value.

    queries [R, H, D], caches [blocks, block size, K, D] of one type, tables [S, B] block ids, sequences [R] the table
    row of each query row, positions [R]. `longest` is the most positions any row attends to, if the host knows it;
    otherwise every row is taken to fill its table. A row with position -1 gets zeros. The last dimension of each tensor
    must be dense.
    """
    rows, heads, head_dim = queries.shape
    _, block_size, kv_heads, _ = key_cache.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    if key_cache.dtype != value_cache.dtype:
        raise ValueError(f"keys are {key_cache.dtype} but values {value_cache.dtype}; give both caches one type")
    group = heads // kv_heads
    split = tuning.ATTENTION_SPLIT
    longest = tables.shape[1] * block_size if longest is None else longest
    splits = max(1, -(-longest // split))
    choice = tuning.attention(head_dim, key_cache.element_size())
    combine = tuning.ATTENTION_COMBINE

    output = torch.empty_like(queries, memory_format=torch.contiguous_format)
    piece = max(1, min(rows, tuning.ATTENTION_WORKSPACE_BYTES // (splits * heads * head_dim * 4)))
    partial = queries.new_empty((piece, splits, heads, head_dim), dtype=torch.float32)
    maxima, sums = queries.new_empty((2, piece, splits, heads), dtype=torch.float32)
    for first in range(0, rows, piece):
        some = slice(first, min(first + piece, rows))
        count = some.stop - first
        launch(
            _attend_split,
            (count, kv_heads, splits),
            *(queries[some], key_cache, value_cache, tables, sequences[some], positions[some], partial, maxima, sums),
            *(splits, count, scale * LOG2_E.value),
            *(*queries.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], tables.stride(0)),
            choice=choice,
            HEADS=heads,
            GROUP=group,
            GROUP_PADDED=tuning.padded(group),
            ROWS=max(1, tuning.ATTENTION_QUERIES // tuning.padded(group)),
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=max(16, tuning.padded(head_dim)),
            BLOCK_SIZE=block_size,
            SPLIT=split,
            TILE=choice.block,
            WINDOW=window,
            WIDE=_product_type(key_cache.dtype),
        )
        launch(
            _combine_splits,
            (count, heads),
            *(partial, maxima, sums, positions[some], maxima if sinks is None else sinks, output[some]),
            *(splits, output.stride(0), output.stride(1)),
            choice=combine,
            HEADS=heads,
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=tuning.padded(head_dim),
            SPLIT=split,
            CHUNK=combine.block,
            WINDOW=window,
            SINKS=sinks is not None,
        )
    return output


def _product_type(cache: torch.dtype) -> tl.dtype | None:
    """What queries, keys, weights and values are widened to before they are multiplied; None: as they are.

    The interpreter is wrong on bf16, and its matrix product rounds a row by the row's place. Summed in float64 and
    rounded once, a product depends on its operands only, as it does on a tensor core.
    """
    if INTERPRETED:
        return tl.float64
    return tl.float32 if cache == torch.float32 else None


@triton.jit(
    do_not_specialize=["splits", "row_count", "stride_table"],
    do_not_specialize_on_alignment=["sequences_ptr", "positions_ptr"],
)
def _attend_split(
    # pointers
    queries_ptr,  # [R, H, D]
    keys_ptr,  # [blocks, block size, K, D]
    values_ptr,  # [blocks, block size, K, D]
    tables_ptr,  # [S, B]
    sequences_ptr,  # [R]
    positions_ptr,  # [R]
    partial_ptr,  # [R, P, H, D] fp32
    maxima_ptr,  # [R, P, H] fp32, in powers of two
    sums_ptr,  # [R, P, H] fp32
    # sizes
    splits,
    row_count,
    scale_log2,
    # strides
    stride_query_row,
    stride_query_head,
    stride_key_block,
    stride_key_slot,
    stride_key_head,
    stride_value_block,
    stride_value_slot,
    stride_value_head,
    stride_table,
    # constants
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    WIDE: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    start = tl.program_id(2) * SPLIT

    # 1. The rows of this program: within an aligned window of ROWS, the first row of a sequence works for all of them.
    sequence = tl.load(sequences_ptr + first_row).to(tl.int64)
    before = tl.load(sequences_ptr + first_row - 1, mask=first_row % ROWS > 0, other=-1)
    if before == sequence:
        return
    query_index = tl.arange(0, ROWS * GROUP_PADDED)
    in_group = query_index % GROUP_PADDED
    rows = first_row + query_index // GROUP_PADDED
    in_window = (rows < row_count) & (rows // ROWS == first_row // ROWS)
    mine = in_window & (tl.load(sequences_ptr + rows, mask=in_window, other=-1) == sequence)
    positions = tl.load(positions_ptr + rows, mask=mine, other=-1).to(tl.int32)  # [M]
    last = tl.max(positions, axis=0)
    if start > last:
        return

    # 2. Their queries that read this KV head.
    lane = tl.arange(0, HEAD_DIM_PADDED)
    heads = kv_head * GROUP + in_group
    reaches = (positions >= start) & (in_group < GROUP)
    if WINDOW:
        reaches = reaches & (positions - WINDOW < start + SPLIT - 1)
        if tl.max(reaches.to(tl.int32), axis=0) == 0:
            return
    query_mask = reaches[:, None] & (lane < HEAD_DIM)[None, :]
    query_rows = rows * stride_query_row + heads * stride_query_head
    query = tl.load(queries_ptr + query_rows[:, None] + lane[None, :], mask=query_mask, other=0.0)  # [M, D]
    if WIDE is not None:
        query = query.to(WIDE)

    # 3. Tiles of the split, in position order, with a running maximum.
    running_max = tl.full((ROWS * GROUP_PADDED,), float("-inf"), tl.float32)
    running_sum = tl.zeros((ROWS * GROUP_PADDED,), tl.float32)
    output = tl.zeros((ROWS * GROUP_PADDED, HEAD_DIM_PADDED), tl.float32)
    # The trip count is fixed: a tile behind the last position loads nothing and changes no bit.
    for tile in tl.range(0, SPLIT, TILE):
        at = start + tile + tl.arange(0, TILE)
        inside = at <= last
        entry = tables_ptr + sequence * stride_table + at // BLOCK_SIZE
        block = tl.load(entry, mask=inside, other=0).to(tl.int64)  # [N]
        slot = (at % BLOCK_SIZE).to(tl.int64)
        tile_mask = inside[:, None] & (lane < HEAD_DIM)[None, :]
        key_rows = block * stride_key_block + slot * stride_key_slot + kv_head * stride_key_head
        key = tl.load(keys_ptr + key_rows[:, None] + lane[None, :], mask=tile_mask, other=0.0)  # [N, D]
        if WIDE is not None:
            products = tl.dot(query, tl.trans(key.to(WIDE)), input_precision="ieee", out_dtype=WIDE).to(tl.float32)
        else:
            products = tl.dot(query, tl.trans(key))
        scores = products * scale_log2  # [M, N]
        scores = tl.where(at[None, :] <= positions[:, None], scores, float("-inf"))
        if WINDOW:
            scores = tl.where(at[None, :] > positions[:, None] - WINDOW, scores, float("-inf"))

        # Without a window a row that reaches the split sees its first position: its maximum is finite from there on.
        new_max = tl.maximum(running_max, tl.max(scores, axis=1))
        finite_max = tl.where(reaches & (new_max > float("-inf")), new_max, 0.0)
        weights = tl.exp2(scores - finite_max[:, None])
        decay = tl.exp2(running_max - finite_max)
        running_sum = running_sum * decay + tl.sum(weights, axis=1)
        running_max = new_max

        value_rows = block * stride_value_block + slot * stride_value_slot + kv_head * stride_value_head
        value = tl.load(values_ptr + value_rows[:, None] + lane[None, :], mask=tile_mask, other=0.0)  # [N, D]
        if WIDE is not None:
            added = tl.dot(weights.to(WIDE), value.to(WIDE), input_precision="ieee", out_dtype=WIDE).to(tl.float32)
        else:
            added = tl.dot(weights.to(value.dtype), value)
        output = output * decay[:, None] + added

    # 4. The partial results of the rows that reach the split.
    partial_rows = (rows * splits + split) * HEADS + heads
    tl.store(partial_ptr + partial_rows[:, None] * HEAD_DIM + lane[None, :], output, mask=query_mask)
    tl.store(maxima_ptr + partial_rows, running_max, mask=reaches)
    tl.store(sums_ptr + partial_rows, running_sum, mask=reaches)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["positions_ptr"])
def _combine_splits(
    # pointers
    partial_ptr,  # [R, P, H, D] fp32
    maxima_ptr,  # [R, P, H] fp32, in powers of two
    sums_ptr,  # [R, P, H] fp32
    positions_ptr,  # [R]
    sinks_ptr,  # [H] fp32; read with SINKS only
    output_ptr,  # [R, H, D]
    # sizes
    splits,
    # strides
    stride_output_row,
    stride_output_head,
    # constants
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    # A row without a position (-1: padding) has no split; its output is zero.
    position = tl.load(positions_ptr + row).to(tl.int32)
    filled = (position + SPLIT) // SPLIT
    # splits before the window were not computed
    hidden = tl.maximum(position - WINDOW + 1, 0) // SPLIT if WINDOW else 0
    lane = tl.arange(0, HEAD_DIM_PADDED)
    running_max = tl.full((), float("-inf"), tl.float32)
    running_sum = tl.full((), 0.0, tl.float32)
    if SINKS:  # as if a split before all others had seen it
        running_max = tl.load(sinks_ptr + head) * LOG2_E
        running_sum = tl.full((), 1.0, tl.float32)
    output = tl.zeros((HEAD_DIM_PADDED,), tl.float32)

    # Chunks of CHUNK splits in order. A chunk's sum has the same shape however many of its splits exist.
    chunk = tl.full((), 0, tl.int32)
    while chunk < filled:
        split = chunk + tl.arange(0, CHUNK)
        exists = (split < filled) & (split >= hidden)
        at = (row * splits + split) * HEADS + head
        maxima = tl.load(maxima_ptr + at, mask=exists, other=float("-inf"))  # [CHUNK]
        sums = tl.load(sums_ptr + at, mask=exists, other=0.0)  # [CHUNK]
        mask = exists[:, None] & (lane < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + at[:, None] * HEAD_DIM + lane[None, :], mask=mask, other=0.0)  # [CHUNK, D]
        new_max = tl.maximum(running_max, tl.max(maxima, axis=0))
        finite_max = tl.where(new_max > float("-inf"), new_max, 0.0)  # a chunk before the window has none
        weights = tl.exp2(maxima - finite_max)
        decay = tl.exp2(running_max - finite_max)
        running_sum = running_sum * decay + tl.sum(sums * weights, axis=0)
        output = output * decay + tl.sum(partial * weights[:, None], axis=0)
        running_max = new_max
        chunk += CHUNK

    output = output / tl.where(running_sum > 0.0, running_sum, 1.0)
    target = output_ptr + row * stride_output_row + head * stride_output_head + lane
    tl.store(target, output.to(output_ptr.dtype.element_ty), mask=lane < HEAD_DIM)
