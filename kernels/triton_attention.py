"""Attention over the paged KV cache, one row (one query token) at a time, in fixed splits of its context.

Rule: what a row gets depends on its own context only, bit for bit: not on the number of rows, not on other rows, not on
whether it came as a decode, a verify or a prefill row. Splits are aligned to position 0 and have the same length for
every batch; tiles inside a split and splits inside a row are added in position order.
Reference: `reference.paged_attention`.

`_attend_split` gives every (row, KV head, split) an unnormalised output, its maximum and its sum. A tensor core
multiplies at least 16 queries at a time: they are the query heads that share a KV head, and with them up to 16 / G
neighbouring rows of the same sequence, so that a draft's rows read K and V once. A row's place among the 16 does not
enter its arithmetic; what it must not see is masked, and a masked position adds an exact zero. What varies with the
batch is kept out of Triton's specialisation, so that one compiled kernel serves every batch.

The splits of a (row, query head) are added in order: by a second kernel, `_combine_splits`, with a program for each;
or, where the caller has counters, by the program that comes last at its rows, in the same launch. Both do it element by
element with the same operations, so the bits are the same. The second kernel has more programs and suits long contexts.

R rows, H query heads, K KV heads, G = H / K, D head size, M queries of a tile, N positions of a tile, P splits.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch, product_type
from kernels.triton_codes import widened
from kernels.triton_overlap import after_previous, let_next_begin
from kernels.triton_product import last_to_arrive
from kernels.weight8 import KINDS

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
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    counters: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each row's attention over positions 0..positions[row] of its sequence, [R, H, D] in the type of `queries`.

    With a window, over the last `window` of those positions. `sinks` [H], float32: a logit of each head that has no
    value. `scales` of keys and of values [blocks, block size, K], float32 and dense: of caches in FP8 or int8.

    queries [R, H, D], caches [blocks, block size, K, D] of one type, tables [S, B] block ids, sequences [R] the table
    row of each query row, positions [R]. `longest` is the most positions any row attends to, if the host knows it;
    otherwise every row is taken to fill its table. A row with position -1 gets zeros. The last dimension of each tensor
    must be dense. With `counters`, int32 [R * K] or more, zero before and after, all is one launch.
    """
    rows, heads, head_dim = queries.shape
    _, block_size, kv_heads, _ = key_cache.shape
    if heads % kv_heads:
        raise ValueError(f"{heads} query heads cannot share {kv_heads} KV heads evenly")
    if key_cache.dtype != value_cache.dtype:
        raise ValueError(f"keys are {key_cache.dtype} but values {value_cache.dtype}; give both caches one type")
    eight = key_cache.dtype in KINDS
    if (scales is not None and not eight) or (scales is None and key_cache.dtype == torch.int8):
        raise ValueError(f"caches of {key_cache.dtype} {'need' if scales is None else 'have no'} scales")
    group = heads // kv_heads
    split = tuning.ATTENTION_SPLIT
    longest = tables.shape[1] * block_size if longest is None else longest
    splits = max(1, -(-longest // split))
    choice = tuning.attention(head_dim, key_cache.element_size())
    combine = tuning.ATTENTION_COMBINE
    if counters is not None and counters.numel() < rows * kv_heads:
        raise ValueError(f"{rows} rows of {kv_heads} KV heads need as many counters, not {counters.numel()}")

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
            # What is not there is not touched.
            *((maxima, maxima) if scales is None else scales),
            *(maxima if sinks is None else sinks, output[some], sequences if counters is None else counters),
            *(splits, count, scale * LOG2_E.value),
            *(*queries.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3], tables.stride(0)),
            *output.stride()[:2],
            choice=choice,
            HEADS=heads,
            GROUP=group,
            GROUP_PADDED=tuning.padded(group),
            ROWS=max(1, tuning.ATTENTION_QUERIES // tuning.padded(group)),
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=max(16, tuning.padded(head_dim)),
            BLOCK_SIZE=block_size,
            SPLIT=split,
            TILE=min(choice.block, split),
            WINDOW=window,
            SINKS=sinks is not None,
            EIGHT=eight,
            SCALED=scales is not None,
            WIDE=product_type(queries.dtype if eight else key_cache.dtype),
            COMBINE=counters is not None,
            CHUNK=combine.block,
        )
        if counters is not None:
            continue
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
    key_scales_ptr,  # [blocks, block size, K] fp32, read when SCALED
    value_scales_ptr,  # [blocks, block size, K] fp32, read when SCALED
    sinks_ptr,  # [H] fp32, read when SINKS
    output_ptr,  # [R, H, D], written when COMBINE
    counters_ptr,  # [R, K], used when COMBINE
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
    stride_output_row,
    stride_output_head,
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
    SINKS: tl.constexpr,
    EIGHT: tl.constexpr,
    SCALED: tl.constexpr,
    WIDE: tl.constexpr,
    COMBINE: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
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
    if COMBINE:  # noqa: SIM102 (a constant and a number of the device do not go into one condition)
        if split == 0:
            # Padding has no split that would write its zeros.
            lanes = tl.arange(0, HEAD_DIM_PADDED)
            padding = mine & (positions < 0) & (in_group < GROUP)
            nothing = rows * stride_output_row + (kv_head * GROUP + in_group) * stride_output_head
            blank = tl.zeros((ROWS * GROUP_PADDED, HEAD_DIM_PADDED), output_ptr.dtype.element_ty)
            blank_mask = padding[:, None] & (lanes < HEAD_DIM)[None, :]
            tl.store(output_ptr + nothing[:, None] + lanes[None, :], blank, mask=blank_mask)
    if start > last:
        return

    # 2. Their queries that read this KV head.
    lane = tl.arange(0, HEAD_DIM_PADDED)
    heads = kv_head * GROUP + in_group
    reaches = (positions >= start) & (in_group < GROUP)
    filled = (positions + SPLIT) // SPLIT  # [M]
    hidden = tl.maximum(positions - WINDOW + 1, 0) // SPLIT if WINDOW else tl.zeros_like(filled)  # [M]
    belongs = (positions >= 0) & (in_group < GROUP)
    first_split = tl.min(tl.where(belongs, hidden, 2147483647), axis=0)
    if WINDOW:
        reaches = reaches & (hidden <= tl.program_id(2))
        # Where the last to arrive combines, all splits from the first on arrive, those between two windows too.
        if first_split > tl.program_id(2):
            return
        if not COMBINE:  # noqa: SIM102
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
    # The trip count is fixed: a tile behind the last position loads nothing and changes no bit, and a count that
    # depended on it would make all of them slower by a tenth.
    for tile in tl.range(0, SPLIT, TILE):
        at = start + tile + tl.arange(0, TILE)
        inside = at <= last
        entry = tables_ptr + sequence * stride_table + at // BLOCK_SIZE
        block = tl.load(entry, mask=inside, other=0).to(tl.int64)  # [N]
        slot = (at % BLOCK_SIZE).to(tl.int64)
        tile_mask = inside[:, None] & (lane < HEAD_DIM)[None, :]
        key_rows = block * stride_key_block + slot * stride_key_slot + kv_head * stride_key_head
        key = tl.load(keys_ptr + key_rows[:, None] + lane[None, :], mask=tile_mask, other=0.0)  # [N, D]
        if EIGHT:  # exact
            key = widened(key, query) if WIDE is None else key.to(queries_ptr.dtype.element_ty)
        if WIDE is not None:
            products = tl.dot(query, tl.trans(key.to(WIDE)), input_precision="ieee", out_dtype=WIDE).to(tl.float32)
        else:
            products = tl.dot(query, tl.trans(key))
        scores = products * scale_log2  # [M, N]
        scale_at = (block * BLOCK_SIZE + slot) * tl.num_programs(1) + kv_head
        if SCALED:
            scores = scores * tl.load(key_scales_ptr + scale_at, mask=inside, other=0.0)[None, :]
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
        if EIGHT:
            value = widened(value, query) if WIDE is None else value.to(queries_ptr.dtype.element_ty)
        if SCALED:
            weights = weights * tl.load(value_scales_ptr + scale_at, mask=inside, other=0.0)[None, :]
        if WIDE is not None:
            added = tl.dot(weights.to(WIDE), value.to(WIDE), input_precision="ieee", out_dtype=WIDE).to(tl.float32)
        else:
            added = tl.dot(weights.to(value.dtype), value)
        output = output * decay[:, None] + added

    let_next_begin(OVERLAP)

    # 4. The partial results of the rows that reach the split.
    partial_rows = (rows * splits + split) * HEADS + heads
    tl.store(partial_ptr + partial_rows[:, None] * HEAD_DIM + lane[None, :], output, mask=query_mask)
    tl.store(maxima_ptr + partial_rows, running_max, mask=reaches)
    tl.store(sums_ptr + partial_rows, running_sum, mask=reaches)

    # 5. All splits of these rows, by the program that comes last.
    if COMBINE:
        end_split = tl.max(filled, axis=0)
        if last_to_arrive(counters_ptr + first_row * tl.num_programs(1) + kv_head, end_split - first_split):
            combined = _combined(
                *(partial_ptr, maxima_ptr, sums_ptr, sinks_ptr, rows * splits, heads, belongs, filled, hidden),
                *(first_split, end_split, lane, HEADS, HEAD_DIM, CHUNK, SINKS),
            )
            target = rows * stride_output_row + heads * stride_output_head
            output_mask = belongs[:, None] & (lane < HEAD_DIM)[None, :]
            kind = output_ptr.dtype.element_ty
            tl.store(output_ptr + target[:, None] + lane[None, :], combined.to(kind), mask=output_mask)


@triton.jit
def _combined(
    partial_ptr,
    maxima_ptr,
    sums_ptr,
    sinks_ptr,
    first_partial,  # [M] of each query's row
    heads,  # [M]
    belongs,  # [M]
    filled,  # [M] splits of its context
    hidden,  # [M] splits before its window
    first_split,
    end_split,
    lane,  # [D]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The output [M, D] of queries from their splits, added one after the other, CHUNK of them in flight."""
    running_max = tl.full(heads.shape, float("-inf"), tl.float32)
    running_sum = tl.zeros(heads.shape, tl.float32)
    if SINKS:  # as if a split before all others had seen it
        running_max = tl.load(sinks_ptr + heads, mask=belongs, other=0.0) * LOG2_E
        running_sum = running_sum + 1.0
    output = tl.zeros((heads.shape[0], lane.shape[0]), tl.float32)
    # Chunks begin at multiples of CHUNK, wherever the first split is.
    for chunk in range(first_split // CHUNK * CHUNK, end_split, CHUNK):
        new_max = running_max
        for step in tl.static_range(CHUNK):
            exists = belongs & (filled > chunk + step) & (hidden <= chunk + step)
            at = (first_partial + chunk + step) * HEADS + heads
            maximum = tl.load(maxima_ptr + at, mask=exists, other=float("-inf"), cache_modifier=".cg")  # [M]
            new_max = tl.maximum(new_max, maximum)
        finite_max = tl.where(new_max > float("-inf"), new_max, 0.0)  # a chunk before the window has none
        decay = tl.exp2(running_max - finite_max)
        running_sum = running_sum * decay
        output = output * decay[:, None]
        for step in tl.static_range(CHUNK):
            exists = belongs & (filled > chunk + step) & (hidden <= chunk + step)
            at = (first_partial + chunk + step) * HEADS + heads
            maximum = tl.load(maxima_ptr + at, mask=exists, other=float("-inf"), cache_modifier=".cg")  # [M]
            weight = tl.exp2(maximum - finite_max)
            running_sum += weight * tl.load(sums_ptr + at, mask=exists, other=0.0, cache_modifier=".cg")
            mask = exists[:, None] & (lane < HEAD_DIM)[None, :]
            partial_at = partial_ptr + at[:, None] * HEAD_DIM + lane[None, :]
            output += weight[:, None] * tl.load(partial_at, mask=mask, other=0.0, cache_modifier=".cg")  # [M, D]
        running_max = new_max
    return output / tl.where(running_sum > 0.0, running_sum, 1.0)[:, None]


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["positions_ptr"])
def _combine_splits(
    # pointers
    partial_ptr,  # [R, P, H, D] fp32
    maxima_ptr,  # [R, P, H] fp32, in powers of two
    sums_ptr,  # [R, P, H] fp32
    positions_ptr,  # [R]
    sinks_ptr,  # [H] fp32, read when SINKS
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
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    let_next_begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    # A row without a position (-1: padding) has no split; its output is zero.
    position = tl.load(positions_ptr + row).to(tl.int32)
    filled = (position + SPLIT) // SPLIT
    # splits before the window were not computed
    hidden = tl.maximum(position - WINDOW + 1, 0) // SPLIT if WINDOW else 0
    lane = tl.arange(0, HEAD_DIM_PADDED)
    one = tl.zeros((1,), tl.int64)
    output = _combined(
        *(partial_ptr, maxima_ptr, sums_ptr, sinks_ptr, one + row * splits, one + tl.program_id(1), one == 0),
        *(one + filled, one + hidden, hidden, filled, lane, HEADS, HEAD_DIM, CHUNK, SINKS),
    )  # [1, D]
    target = output_ptr + row * stride_output_row + tl.program_id(1).to(tl.int64) * stride_output_head
    mask = (lane < HEAD_DIM)[None, :]
    tl.store(target + lane[None, :], output.to(output_ptr.dtype.element_ty), mask=mask)
