"""Writing a step's keys and values into the paged cache.

Rule: a copy; the only rounding is the cache's type. Rows with position -1 are padding and are not written.
Reference: `reference.write_kv`.

Row r goes to block tables[sequences[r], positions[r] // block size], slot positions[r] % block size.
R rows, K KV heads, D head size.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import launch


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Store `keys` and `values` [R, K, D] at the rows' positions in the caches [blocks, block size, K, D], in place."""
    rows, heads, head_dim = keys.shape
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
