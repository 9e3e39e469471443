"""Block sizes, warps and stages of the Triton kernels.

Rule: a choice that decides the order of a sum is a function of the operator's shape (hidden size, head size) and a
constant of the release. It never depends on the number of rows, and it is never found at run time: two workers that had
tuned themselves differently would round differently, and the same request would get different tokens. So nothing here
autotunes. Where no sum is involved (sampling, rotary, copies) a choice may follow the number of rows.

The numbers come from reasoning (16-byte accesses per thread, enough programs for 132 multiprocessors, loads in flight
before their first use) and have not been measured on a GPU yet; `python -m kernels.verify` there prints the share of
the measured bandwidth that each kernel reaches with them.
"""

from kernels.launch import Launch


def padded(size: int) -> int:
    """The next power of two: what a Triton tile of `size` elements occupies."""
    return 1 << max(0, size - 1).bit_length()


def row_sum(columns: int) -> Launch:
    """A whole row of `columns` in one program, one sum; 16 elements per thread, two 16-byte loads of bf16."""
    block = padded(columns)
    return Launch(block, num_warps=min(16, max(1, block // 512)))


def elementwise(columns: int) -> Launch:
    """A piece of a row without any sum; 8 elements per thread."""
    block = min(1024, padded(columns))
    return Launch(block, num_warps=max(1, block // 256))


# Attention: positions per split. 256 positions x 8 KV heads give 64 programs at 2k context and batch 1; the fp32
# partials add 1.6 % to the bytes of a bf16 cache with a head size of 128 and 4 query heads per KV head.
ATTENTION_SPLIT = 256

# Queries of one tile, as many as one tensor core instruction takes: a decode row fills it with its query heads alone.
ATTENTION_QUERIES = 16

# Splits that are summed at once when the splits of a row are combined: 32 x 256 positions are one round trip to memory.
ATTENTION_COMBINE = Launch(block=32, num_warps=4)

# Rows of attention are worked off in pieces whose fp32 partials fit in this much memory; no row depends on another.
ATTENTION_WORKSPACE_BYTES = 128 << 20


def attention(head_dim: int, cache_bytes: int) -> Launch:
    """Positions per tile, by the head size and the bytes of a cache element.

    16-bit caches: a tile of K and V in flight is 32 KiB at a head size of 128, and four programs fit on a
    multiprocessor. fp32 caches multiply without tensor cores, in registers: half the tile and twice the warps, or the
    compiler spills.
    """
    if cache_bytes > 2:
        return Launch(block=32, num_warps=8, num_stages=3)
    return Launch(block=64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)


# Sampling: token ids per program.
SAMPLING = Launch(block=1024, num_warps=4)
