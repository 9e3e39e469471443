"""Rotary position embedding of queries and keys, in one launch.

Rule: elementwise in float32, rounded once. Reference: `reference.rotary`.

A head of size D is turned in its first 2 C elements, C = the width of the tables; the rest passes through.
Pair styles: `half` pairs element i with i + C (Hugging Face), `interleaved` pairs 2 i with 2 i + 1 (GGUF's Llama).

R rows, H query heads, K KV heads, C pairs.
"""

import torch
import triton
import triton.language as tl

from kernels import tuning
from kernels.launch import Launch, launch


def rotary(
    queries: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries [R, H, D] and keys [R, K, D] to their positions [R]; tables [positions, C] in float32.

    A row at position -1 is padding and turns like position 0.
    """
    rows, query_heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    pairs = cosines.shape[1]
    if 2 * pairs > head_dim or cosines.stride() != sines.stride():
        raise ValueError(f"tables of {pairs} pairs, laid out alike, do not fit a head size of {head_dim}")
    rotated_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    rotated_keys = torch.empty_like(keys, memory_format=torch.contiguous_format)
    heads_padded = tuning.padded(max(query_heads, kv_heads))
    pairs_padded = tuning.padded(pairs)
    rest = head_dim - 2 * pairs
    launch(
        _rotate,
        (rows, 2),
        *(queries, keys, positions, cosines, sines, rotated_queries, rotated_keys, query_heads, kv_heads),
        *(*queries.stride()[:2], *keys.stride()[:2], *rotated_queries.stride()[:2], *rotated_keys.stride()[:2]),
        cosines.stride(0),
        choice=Launch(pairs_padded, num_warps=min(8, max(1, heads_padded * pairs_padded // 256))),
        HEADS_PADDED=heads_padded,
        HEAD_DIM=head_dim,
        PAIRS=pairs,
        PAIRS_PADDED=pairs_padded,
        REST_PADDED=tuning.padded(rest) if rest else 0,
        INTERLEAVED=interleaved,
    )
    return rotated_queries, rotated_keys


@triton.jit
def _rotate(
    # pointers
    queries_ptr,  # [R, H, D]
    keys_ptr,  # [R, K, D]
    positions_ptr,  # [R]
    cosines_ptr,  # [positions, C] fp32
    sines_ptr,  # [positions, C] fp32
    rotated_queries_ptr,  # [R, H, D], may be queries_ptr
    rotated_keys_ptr,  # [R, K, D], may be keys_ptr
    # sizes
    query_heads,
    kv_heads,
    # strides
    stride_query_row,
    stride_query_head,
    stride_key_row,
    stride_key_head,
    stride_rotated_query_row,
    stride_rotated_query_head,
    stride_rotated_key_row,
    stride_rotated_key_head,
    stride_table,
    # constants
    HEADS_PADDED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_PADDED).to(tl.int64)
    pair = tl.arange(0, PAIRS_PADDED)

    # 1. Queries or keys: the second grid axis says which.
    if tl.program_id(1) == 0:
        heads = query_heads
        source = queries_ptr + row * stride_query_row + head * stride_query_head  # [H]
        target = rotated_queries_ptr + row * stride_rotated_query_row + head * stride_rotated_query_head  # [H]
    else:
        heads = kv_heads
        source = keys_ptr + row * stride_key_row + head * stride_key_head  # [K]
        target = rotated_keys_ptr + row * stride_rotated_key_row + head * stride_rotated_key_head  # [K]

    # 2. The angle of every pair at this row's position.
    position = tl.maximum(tl.load(positions_ptr + row), 0).to(tl.int64)
    cosine = tl.load(cosines_ptr + position * stride_table + pair, mask=pair < PAIRS, other=0.0)[None, :]  # [1, C]
    sine = tl.load(sines_ptr + position * stride_table + pair, mask=pair < PAIRS, other=0.0)[None, :]  # [1, C]

    # 3. Both elements of each pair are read before either is written, by the same thread, so source may be target.
    first = 2 * pair if INTERLEAVED else pair
    second = 2 * pair + 1 if INTERLEAVED else pair + PAIRS
    mask = (head < heads)[:, None] & (pair < PAIRS)[None, :]
    a = tl.load(source[:, None] + first[None, :], mask=mask, other=0.0).to(tl.float32)  # [H, C]
    b = tl.load(source[:, None] + second[None, :], mask=mask, other=0.0).to(tl.float32)  # [H, C]
    element = rotated_queries_ptr.dtype.element_ty
    tl.store(target[:, None] + first[None, :], (a * cosine - b * sine).to(element), mask=mask)
    tl.store(target[:, None] + second[None, :], (b * cosine + a * sine).to(element), mask=mask)

    # 4. What no pair covers.
    if REST_PADDED > 0:
        rest = 2 * PAIRS + tl.arange(0, REST_PADDED)
        rest_mask = (head < heads)[:, None] & (rest < HEAD_DIM)[None, :]
        kept = tl.load(source[:, None] + rest[None, :], mask=rest_mask, other=0.0)  # [H, D - 2 C]
        tl.store(target[:, None] + rest[None, :], kept, mask=rest_mask)
