"""Writing a step's keys and values into the paged cache.

Rule: a copy; the only rounding is the cache's type. Rows with position -1 are padding and are not written. In caches of
eight bits each key and each value is a row of codes of its own, with a scale where the cache has scales.
Reference: `reference.write_kv`.

Row r goes to block tables[sequences[r], positions[r] // block size], slot positions[r] % block size.
R rows, K KV heads, D head size.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import Launch, launch
from kernels.triton_quantise import on_grid, scale_of
from kernels.weight8 import KINDS, LARGEST


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Store `keys` and `values` [R, K, D] at the rows' positions in the caches [blocks, block size, K, D], in place.

    `scales` of keys and of values [blocks, block size, K] in float32, dense; int8 needs them, FP8 may do without.
    """
    rows, heads, head_dim = keys.shape
    if (key_cache.dtype == torch.int8 and scales is None) or (scales is not None and key_cache.dtype not in KINDS):
        raise ValueError(f"caches of {key_cache.dtype} {'need' if scales is None else 'have no'} scales")
    if key_cache.dtype in KINDS:
        _write_codes(keys, values, key_cache, value_cache, tables, sequences, positions, scales)
        return
    block_size = key_cache.shape[1]
    choice = tuning.elementwise(heads * head_dim)
    launch(
        _write_kv,
        (rows, -(-heads * head_dim // choice.block)),
        *(keys, values, key_cache, value_cache, tables, sequences, positions),
        *(*keys.stride()[:2], *values.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3]),
        tables.stride(0),
        choice=choice,
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK=choice.block,
    )


def _write_codes(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    rows, heads, head_dim = keys.shape
    padded = tuning.padded(heads), tuning.padded(head_dim)
    for source, cache, side in ((keys, key_cache, 0), (values, value_cache, 1)):
        launch(
            _write_kv_codes,
            (rows,),
            # Without scales their pointer is not touched.
            *(source, cache, positions if scales is None else scales[side], tables, sequences, positions),
            *(LARGEST[cache.dtype], *source.stride()[:2], *cache.stride()[:3], tables.stride(0)),
            choice=Launch(padded[1], num_warps=min(8, max(1, padded[0] * padded[1] // 256))),
            HEADS=heads,
            HEADS_PADDED=padded[0],
            HEAD_DIM=head_dim,
            HEAD_DIM_PADDED=padded[1],
            BLOCK_SIZE=cache.shape[1],
            WHOLE=cache.dtype == torch.int8,
            SCALED=scales is not None,
        )


@triton.jit(do_not_specialize=["stride_table"])
def _write_kv_codes(
    # pointers
    source_ptr,  # [R, K, D]
    cache_ptr,  # [blocks, block size, K, D]
    scales_ptr,  # [blocks, block size, K] fp32, written when SCALED
    tables_ptr,  # [S, B]
    sequences_ptr,  # [R]
    positions_ptr,  # [R]
    # sizes
    largest_code,
    # strides
    stride_row,
    stride_head,
    stride_block,
    stride_slot,
    stride_cache_head,
    stride_table,
    # constants
    HEADS: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    if position < 0:
        return

    # 1. Where the row belongs, and its heads.
    sequence = tl.load(sequences_ptr + row).to(tl.int64)
    block = tl.load(tables_ptr + sequence * stride_table + position // BLOCK_SIZE).to(tl.int64)
    slot = (position % BLOCK_SIZE).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED)
    lane = tl.arange(0, HEAD_DIM_PADDED)
    mask = (head < HEADS)[:, None] & (lane < HEAD_DIM)[None, :]
    source = source_ptr + row * stride_row + head[:, None] * stride_head + lane[None, :]
    values = tl.load(source, mask=mask, other=0.0).to(tl.float32)  # [K, D]

    # 2. A scale for each head, and codes.
    if SCALED:
        scales = scale_of(tl.max(tl.abs(values), axis=1), largest_code)  # [K]
        tl.store(scales_ptr + (block * BLOCK_SIZE + slot) * HEADS + head, scales, mask=head < HEADS)
        values = tl.div_rn(values, scales[:, None] + tl.zeros_like(values))
    codes = on_grid(tl.clamp(values, -largest_code, largest_code), WHOLE)
    target = cache_ptr + block * stride_block + slot * stride_slot + head[:, None] * stride_cache_head + lane[None, :]
    tl.store(target, codes.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_table"])
def _write_kv(
    # pointers
    keys_ptr,  # [R, K, D]
    values_ptr,  # [R, K, D]
    key_cache_ptr,  # [blocks, block size, K, D]
    value_cache_ptr,  # [blocks, block size, K, D]
    tables_ptr,  # [S, B]
    sequences_ptr,  # [R]
    positions_ptr,  # [R]
    # strides
    stride_key_row,
    stride_key_head,
    stride_value_row,
    stride_value_head,
    stride_key_block,
    stride_key_slot,
    stride_key_cache_head,
    stride_value_block,
    stride_value_slot,
    stride_value_cache_head,
    stride_table,
    # constants
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + row)
    if position < 0:
        return

    # 1. Where the row belongs.
    sequence = tl.load(sequences_ptr + row).to(tl.int64)
    block = tl.load(tables_ptr + sequence * stride_table + position // BLOCK_SIZE).to(tl.int64)
    slot = (position % BLOCK_SIZE).to(tl.int64)

    # 2. All heads of the row, as one run of HEADS * HEAD_DIM elements.
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = element < HEADS * HEAD_DIM
    head = (element // HEAD_DIM).to(tl.int64)
    lane = element % HEAD_DIM
    key_source = row * stride_key_row + head * stride_key_head + lane
    value_source = row * stride_value_row + head * stride_value_head + lane
    key = tl.load(keys_ptr + key_source, mask=mask, other=0.0)  # [BLOCK]
    value = tl.load(values_ptr + value_source, mask=mask, other=0.0)  # [BLOCK]
    key_target = block * stride_key_block + slot * stride_key_slot + head * stride_key_cache_head + lane
    value_target = block * stride_value_block + slot * stride_value_slot + head * stride_value_cache_head + lane
    tl.store(key_cache_ptr + key_target, key.to(key_cache_ptr.dtype.element_ty), mask=mask)
    tl.store(value_cache_ptr + value_target, value.to(value_cache_ptr.dtype.element_ty), mask=mask)
