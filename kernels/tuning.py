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

# Splits whose partial results are on their way at once when the splits of a row are combined.
ATTENTION_COMBINE = Launch(block=8, num_warps=4)

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


# Multiprocessors of an H100 or H200: what a grid should cover, twice where programs are small.
PROGRAMS = 132

# Rows of a product are worked off in pieces whose fp32 partial sums fit in this much memory.
SPLIT_WORKSPACE_BYTES = 128 << 20


def product_rows(rows: int) -> int:
    """Rows of a tile of a product. No sum runs along them, so they may follow the batch."""
    return min(64, max(16, padded(rows)))


def linear4_few(outputs: int) -> tuple[Launch, int]:
    """Outputs of a program, and tiles of inputs that are in flight at once: two 16-byte loads for each thread.

    Eight or four words are on their way for each thread, in programs of 256. With 512 threads, four rows would spill;
    with fewer, or fewer outputs, the compiler moves activations between threads. Narrow matrices get narrower programs,
    or most multiprocessors would have none.
    """
    return Launch(16 if outputs >= 16 * PROGRAMS else 8, num_warps=8), 8


def linear4_split(outputs: int, inputs: int) -> tuple[Launch, int]:
    """Outputs of a program, and splits of the inputs: so many that two programs meet on each multiprocessor.

    A split has two tiles of 128 inputs at least. Wide matrices take 128 outputs, so that activations are read half as
    often.
    """
    block, warps = (128, 8) if outputs >= 128 * PROGRAMS else (64, 4)
    splits = min(-(-inputs // 128) // 2, 2 * PROGRAMS // -(-outputs // block))
    return Launch(block, warps, num_stages=4), max(1, splits)


def linear8(outputs: int, inputs: int) -> tuple[Launch, int]:
    """Outputs of a program and splits of the inputs, as `linear4_split`; a split has four blocks of 128 at least."""
    block, warps = (128, 8) if outputs >= 128 * PROGRAMS else (64, 4)
    splits = min(-(-inputs // 128) // 4, 2 * PROGRAMS // -(-outputs // block))
    return Launch(block, warps, num_stages=4), max(1, splits)


def layer_product(outputs: int, inputs: int) -> tuple[Launch, int]:
    """Outputs of a program and splits of the inputs in the fused products of a layer; as `linear4_split`, 64 outputs.

    Four stages of 64 x 128 weights of 16 bits are 64 KiB on their way for each program.
    """
    splits = min(-(-inputs // 128) // 2, 2 * PROGRAMS // -(-outputs // 64))
    return Launch(64, num_warps=4, num_stages=4), max(1, splits)


def head(vocabulary: int) -> Launch:
    """Ids of a program: its best are read again by one program, so not too few for a large vocabulary."""
    return Launch(128, num_warps=8, num_stages=3) if vocabulary > 64 * 1024 else Launch(64, num_warps=4, num_stages=4)
