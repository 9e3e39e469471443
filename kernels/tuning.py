"""Block sizes, warps and stages of the Triton kernels.

Rule: a choice that decides the order of a sum is a function of the operator's shape (hidden size, head size) and a
constant of the release. It never depends on the number of rows, and it is never found at run time: two workers that had
tuned themselves differently would round differently, and the same request would get different tokens. So nothing here
autotunes. Where no sum is involved (sampling, rotary, copies) a choice may follow the number of rows.

The numbers come from reasoning (16-byte accesses per thread, enough programs for 132 multiprocessors, loads in flight
before their first use) and from sweeps on an H200; `python -m kernels.verify` prints the share of the bandwidth that
each kernel reaches with them.
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


# Attention: positions per split. A context of 512 positions has two programs for each KV head, of two tiles each. With
# 512 an 8k context is read 4 % faster, one of 512 positions half as fast. The fp32 partials add 1.6 % to the bytes of
# a bf16 cache with a head size of 128 and 4 query heads per KV head.
ATTENTION_SPLIT = 256

# Queries of one tile, as many as one tensor core instruction takes: a decode row fills it with its query heads alone.
ATTENTION_QUERIES = 16

# Splits whose partial results are on their way at once when the splits of a row are combined.
ATTENTION_COMBINE = Launch(block=8, num_warps=4)

# Rows of attention are worked off in pieces whose fp32 partials fit in this much memory; no row depends on another.
ATTENTION_WORKSPACE_BYTES = 128 << 20


def attention(head_dim: int, cache_bytes: int) -> Launch:
    """Positions per tile, by the head size and the bytes of a cache element.

    16-bit caches: a tile of K and V in flight is 64 KiB at a head size of 128, and three programs fit on a
    multiprocessor. Codes of eight bits are widened in registers, so their tile is half as large. fp32 caches multiply
    without tensor cores, in registers: a smaller tile still and twice the warps, or the compiler spills.
    """
    if cache_bytes > 2:
        return Launch(block=32, num_warps=8, num_stages=3)
    if cache_bytes == 1 or head_dim > 128:
        return Launch(block=64, num_warps=4, num_stages=3)
    return Launch(block=128, num_warps=4, num_stages=2)


# Sampling: token ids per program.
SAMPLING = Launch(block=1024, num_warps=4)


# Multiprocessors of an H100 or H200: what a grid should cover, twice where programs are small.
PROGRAMS = 132

# Rows of a product are worked off in pieces whose fp32 partial sums fit in this much memory.
SPLIT_WORKSPACE_BYTES = 128 << 20


# Above so many rows, a program of a product works on all splits itself, one after the other: there are enough programs
# without splits, and partial sums of many rows are more to move than the weights. Products of eight bits, which have no
# splits, have another kernel there.
FEW_ROWS = 64


def product_rows(rows: int) -> int:
    """Rows of a tile of a product. No sum runs along them, so they may follow the batch."""
    return min(64, max(16, padded(rows)))


def linear4_split(outputs: int, inputs: int) -> tuple[Launch, int]:
    """Outputs of a program, and splits of the inputs: so many that 3.5 programs or more share a multiprocessor.

    That is a power of two where there are inputs enough; a split has two tiles of 128 inputs at least. Unpacking takes
    many instructions for a byte, and a program waits for its tensor core four times a tile: the others fill the time.
    """
    enough = padded(-(-7 * PROGRAMS // (2 * -(-outputs // 64))))
    return Launch(64, num_warps=4, num_stages=3), max(1, min(-(-inputs // 128) // 2, enough))


def linear8(outputs: int, inputs: int) -> Launch:
    """Outputs of a program. Inputs are not divided: a program of many rows would have to add as those of few do.

    Six stages of 64 x 128 weights of eight bits are 48 KiB on their way for each of at least one program.
    """
    return Launch(64, num_warps=4, num_stages=6)


def linear8_many(outputs: int, inputs: int) -> tuple[int, Launch]:
    """Rows of a tile, and outputs of it, where there are many rows.

    Two programs of 72 KiB on a multiprocessor: one's sums are promoted while another's are multiplied.
    """
    return 128, Launch(64, num_warps=4, num_stages=3)


def layer_product(outputs: int, inputs: int, four: bool = False) -> tuple[Launch, int]:
    """Outputs of a program and splits of the inputs in the fused products of a layer.

    Five stages of 64 x 128 weights of 16 bits are 80 KiB on their way for each program; inputs that all are on their
    way at once need no splits. Two programs on each multiprocessor reach the memory's bandwidth with weights of 16
    bits; those of `four` bits are divided as in `linear4_split`.
    """
    tiles, stages = -(-inputs // 128), 5
    if tiles <= stages:
        return Launch(64, num_warps=4, num_stages=stages), 1
    if four:
        return linear4_split(outputs, inputs)
    splits = min(-(-tiles // 2), 2 * PROGRAMS // -(-outputs // 64))
    return Launch(64, num_warps=4, num_stages=stages), max(1, splits)


def layer_heads(head_dim: int, outputs: int, inputs: int, four: bool = False) -> tuple[Launch, int]:
    """As `layer_product`, where a program has outputs of one head."""
    choice, splits = layer_product(outputs, inputs, four)
    return choice._replace(block=min(64, head_dim)), splits


# Tiles of weights that a program of the fused products asks for while the kernel before it still runs: all that its
# stages hold.
PREFETCH = 4


def head(vocabulary: int) -> Launch:
    """Ids of a program: its best are read again by one program, so not too few for a large vocabulary."""
    return Launch(128, num_warps=8, num_stages=3) if vocabulary > 64 * 1024 else Launch(64, num_warps=4, num_stages=4)
