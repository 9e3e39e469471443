"""What the Triton kernels are checked on: inputs, the kernel, its reference, and the least work there is to do.

Two sets: `serving_cases`, shapes of Llama-3.1-8B for a GPU (and, on the meta device, for the compiler alone), and
`small_cases`, odd shapes that the interpreter gets through in seconds. Cache memory that no row owns is NaN.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    layer_cases,
    product_cases,
    reference,
    triton_attention,
    triton_kv,
    triton_norm,
    triton_rotary,
    triton_sampling,
    triton_swiglu,
)
from kernels.case import TOLERANCE, Case, generator_for, normal, short
from kernels.weight8 import KINDS, nearest


def serving_cases(device: str) -> Iterator[Case]:
    """Llama-3.1-8B: 32 query and 8 KV heads of 128, hidden 4096, MLP 14336, vocabulary 128256, blocks of 16; bf16."""
    kind = torch.bfloat16
    for rows in (1, 32, 256):
        yield from norm_cases(rows, 4096, kind, device)
        yield rotary_case(rows, 32, 8, 128, 64, False, kind, device)
        yield swiglu_case(rows, 14336, kind, device)
        yield write_kv_case(rows, 8, 128, 16, kind, kind, device)
    for contexts, rows_each in (
        ([2048], 1),
        ([32768], 1),
        ([8192] * 8, 1),
        ([8192] * 32, 1),
        ([1024] * 256, 1),
        ([2048] * 32, 5),
    ):
        yield from attention_cases(contexts, rows_each, 32, 8, 128, 16, kind, device)
    for other in (torch.float16, torch.float32):
        yield from attention_cases([1000, 77, 3000, 256], 1, 32, 8, 128, 16, other, device)
    for code in KINDS:
        yield from code_cache_cases([8192] * 8, 32, 8, 128, 16, code, kind, device)
    for rows in (1, 32, 256):
        yield sample_case(rows, 128256, device)
    yield accepted_case(256, 5, device)
    yield from product_cases.serving_cases(device)
    yield from layer_cases.serving_cases(device)


def serving_calls() -> Iterator[Callable[[], Any]]:
    """What `serving_cases` run, on the meta device: for the compiler."""
    return (case.run for case in serving_cases("meta"))


def small_cases(device: str) -> Iterator[Case]:
    """Sizes that are no powers of two and contexts that end inside a block, a tile and a split."""
    for kind in (torch.float32, torch.float16):
        yield from norm_cases(3, 77, kind, device)
        yield rotary_case(3, 6, 2, 20, 10, False, kind, device)
        yield rotary_case(3, 6, 2, 20, 8, True, kind, device)
        yield swiglu_case(2, 1100, kind, device)
        yield write_kv_case(5, 3, 20, 4, kind, torch.float16, device)
        yield from attention_cases([300, 3, 256], 2, 6, 2, 20, 4, kind, device)
    yield from attention_cases([70], 1, 4, 4, 64, 16, torch.bfloat16, device)
    for code in KINDS:
        yield from code_cache_cases([70, 3], 6, 2, 20, 4, code, torch.float16, device)
    yield sample_case(4, 3001, device)
    yield accepted_case(5, 4, device)
    yield from product_cases.small_cases(device)
    yield from layer_cases.small_cases(device)


def norm_cases(rows: int, columns: int, kind: torch.dtype, device: str) -> Iterator[Case]:
    generator = generator_for(device)
    x, residual = (normal((rows, columns), kind, device, generator) for _ in range(2))
    weight = normal((columns,), kind, device, generator)
    size = x.element_size()
    shape = f"rows {rows}, columns {columns}, {short(kind)}"
    yield Case(
        "rms_norm",
        shape,
        run=lambda: (triton_norm.rms_norm(x, weight, 1e-5),),
        expect=lambda: (reference.rms_norm(x, weight, 1e-5),),
        tolerance=TOLERANCE[kind],
        bytes=(2 * rows + 1) * columns * size,
        flops=4 * rows * columns,
    )
    yield Case(
        "add_rms_norm",
        shape,
        run=lambda: triton_norm.add_rms_norm(x, residual, weight, 1e-5),
        expect=lambda: reference.add_rms_norm(x, residual, weight, 1e-5),
        tolerance=TOLERANCE[kind],
        bytes=(4 * rows + 1) * columns * size,
        flops=5 * rows * columns,
    )
    if rows > 1:
        yield Case(
            "rms_norm, rows alone",
            shape,
            run=lambda: (torch.cat([triton_norm.rms_norm(row, weight, 1e-5) for row in x.split(1)]),),
            expect=lambda: (triton_norm.rms_norm(x, weight, 1e-5),),
            tolerance=0.0,
            bytes=(2 * rows + 1) * columns * size,
            flops=4 * rows * columns,
            timed=False,
        )


def rotary_case(
    rows: int, heads: int, kv_heads: int, head_dim: int, pairs: int, interleaved: bool, kind: torch.dtype, device: str
) -> Case:
    generator = generator_for(device)
    queries = normal((rows, heads, head_dim), kind, device, generator)
    keys = normal((rows, kv_heads, head_dim), kind, device, generator)
    frequencies = [10000.0 ** (-pair / pairs) for pair in range(pairs)]
    cosines, sines = reference.rotary_tables(frequencies, rows + 1, device)
    positions = torch.arange(rows, 0, -1, device=device)
    elements = rows * (heads + kv_heads) * head_dim
    style = "interleaved" if interleaved else "half"
    return Case(
        "rotary",
        f"rows {rows}, heads {heads}+{kv_heads}x{head_dim}, {pairs} pairs {style}, {short(kind)}",
        run=lambda: triton_rotary.rotary(queries, keys, positions, cosines, sines, interleaved),
        expect=lambda: reference.rotary(queries, keys, positions, cosines, sines, interleaved),
        tolerance=TOLERANCE[kind],
        bytes=2 * elements * queries.element_size() + rows * (8 * pairs + 8),
        flops=3 * elements,
    )


def swiglu_case(rows: int, columns: int, kind: torch.dtype, device: str) -> Case:
    # Gate and up as the two halves of one product, as the decoder has them.
    gate, up = normal((rows, 2 * columns), kind, device, generator_for(device)).chunk(2, dim=1)
    return Case(
        "swiglu",
        f"rows {rows}, columns {columns}, {short(kind)}",
        run=lambda: (triton_swiglu.swiglu(gate, up),),
        expect=lambda: (reference.swiglu(gate, up),),
        tolerance=TOLERANCE[kind],
        bytes=3 * rows * columns * gate.element_size(),
        flops=5 * rows * columns,
    )


def write_kv_case(
    rows: int, kv_heads: int, head_dim: int, block_size: int, kind: torch.dtype, cache_kind: torch.dtype, device: str
) -> Case:
    """One row in each of `rows` sequences; with more than two rows the last is padding."""
    generator = generator_for(device)
    keys, values = (normal((rows, kv_heads, head_dim), kind, device, generator) for _ in range(2))
    blank = torch.full((2 * rows + 1, block_size, kv_heads, head_dim), torch.nan, dtype=cache_kind, device=device)
    caches = (blank.clone(), blank.clone())
    tables = torch.randperm(2 * rows).int().view(rows, 2)
    positions = torch.arange(rows) * 5 % (2 * block_size)
    if rows > 2:
        positions[-1] = -1
    where = (tables.to(device), torch.arange(rows, device=device), positions.to(device))

    def written(write: Callable[..., None]) -> tuple[Tensor, Tensor]:
        write(keys, values, *caches, *where)
        return caches

    def expected() -> tuple[Tensor, Tensor]:
        fresh = (blank.clone(), blank.clone())
        reference.write_kv(keys, values, *fresh, *where)
        return fresh

    moved = keys.element_size() + blank.element_size()
    return Case(
        "write_kv",
        f"rows {rows}, heads {kv_heads}x{head_dim}, blocks of {block_size}, {short(kind)} to {short(cache_kind)}",
        run=lambda: written(triton_kv.write_kv),
        expect=expected,
        tolerance=0.0,
        bytes=2 * rows * kv_heads * head_dim * moved,
        flops=0,
    )


def attention_cases(
    contexts: list[int],
    rows_each: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    kind: torch.dtype,
    device: str,
) -> Iterator[Case]:
    """Sequences of `contexts` positions of which the last `rows_each` are this step's rows (decode 1, verify more)."""
    generator = generator_for(device)
    counts = [-(-context // block_size) for context in contexts]
    order = torch.randperm(sum(counts) + 3).int()
    tables = torch.full((len(contexts), max(counts) + 1), -1, dtype=torch.int32)
    shape = (len(order), block_size, kv_heads, head_dim)
    key_cache, value_cache = (normal(shape, kind, device, generator) for _ in range(2))
    key_cache[order[sum(counts) :].long().to(device)] = torch.nan
    value_cache[order[sum(counts) :].long().to(device)] = torch.nan
    for sequence, (context, count) in enumerate(zip(contexts, counts, strict=True)):
        first = sum(counts[:sequence])
        tables[sequence, :count] = order[first : first + count]
        tail = context - (count - 1) * block_size
        key_cache[int(order[first + count - 1]), tail:] = torch.nan
        value_cache[int(order[first + count - 1]), tail:] = torch.nan

    rows = [(sequence, at) for sequence, end in enumerate(contexts) for at in range(max(0, end - rows_each), end)]
    sequences, positions = (torch.tensor(column).to(device) for column in zip(*rows, strict=True))
    queries = normal((len(rows), heads, head_dim), kind, device, generator)
    # A few rows see almost one position only, so that a wrong maximum shows.
    queries[::3] *= 8.0
    tables = tables.to(device)
    scale = head_dim**-0.5

    def attend(operator: Callable[..., Tensor], some: slice = slice(None), longest: int | None = None) -> Tensor:
        rows_of = (sequences[some], positions[some])
        return operator(queries[some], key_cache, value_cache, tables, *rows_of, scale, longest)

    context = f"{len(contexts)} x {max(contexts)}" if len(set(contexts)) < 2 else "/".join(map(str, contexts))
    shape_name = f"contexts {context}, rows {rows_each}, heads {heads}/{kv_heads}x{head_dim}, {short(kind)}"

    def library() -> list[list[Callable[[], Any]]]:
        """torch's attention, over keys and values that lie in one piece for each sequence."""
        pieces = tables[:, : counts[0]].long().clamp(min=0)
        dense = [
            cache[pieces].flatten(1, 2)[:, : contexts[0]].nan_to_num().transpose(1, 2).contiguous()
            for cache in (key_cache, value_cache)
        ]
        attend = partial(F.scaled_dot_product_attention, queries[:, :, None], dense[0], dense[1])
        return [[partial(attend, enable_gqa=heads != kv_heads)]]

    size = key_cache.element_size()
    moved = 2 * sum(contexts) * kv_heads * head_dim * size + 2 * len(rows) * heads * head_dim * size
    flops = 4 * heads * head_dim * sum(at + 1 for _, at in rows)
    yield Case(
        "paged_attention",
        shape_name,
        run=lambda: (attend(triton_attention.paged_attention, longest=max(contexts)),),
        expect=lambda: (attend(reference.paged_attention),),
        # 16-bit weights are rounded before they meet the values; in fp32 a large score carries its rounding into exp.
        tolerance=(5 if kind == torch.float32 else 2) * TOLERANCE[kind],
        bytes=moved,
        flops=flops,
        library=library if rows_each == 1 and len(set(contexts)) == 1 else None,
    )
    counters = torch.zeros(len(rows) * kv_heads, dtype=torch.int32, device=device)
    yield Case(
        "paged_attention, one launch",
        shape_name,
        run=lambda: (attend(partial(triton_attention.paged_attention, counters=counters), longest=max(contexts)),),
        expect=lambda: (attend(triton_attention.paged_attention, longest=max(contexts)),),
        tolerance=0.0,
        bytes=moved,
        flops=flops,
        lowered=kind == torch.bfloat16,
    )
    if len(rows) > 1:
        alone = range(0, len(rows), max(1, len(rows) // 4))
        yield Case(
            "paged_attention, rows alone",
            shape_name,
            run=lambda: tuple(attend(triton_attention.paged_attention, slice(row, row + 1)) for row in alone),
            expect=lambda: attend(triton_attention.paged_attention, longest=max(contexts))[list(alone)].split(1),
            tolerance=0.0,
            bytes=moved,
            flops=flops,
            timed=False,
        )


def code_cache_cases(
    contexts: list[int],
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    code: torch.dtype,
    kind: torch.dtype,
    device: str,
) -> Iterator[Case]:
    """The last row of each sequence over a cache of codes, with sinks; int8 has a scale for each key and value."""
    generator = generator_for(device)
    blocks = [-(-context // block_size) for context in contexts]
    shape = (sum(blocks), block_size, kv_heads, head_dim)
    caches = [nearest(normal(shape, torch.float32, device, generator) * 30, code) for _ in range(2)]
    scales = tuple(torch.full(shape[:3], 1 / 30, device=device) for _ in range(2)) if code == torch.int8 else None
    tables = torch.full((len(contexts), max(blocks)), -1, dtype=torch.int32)
    for sequence, count in enumerate(blocks):
        tables[sequence, :count] = torch.arange(count) + sum(blocks[:sequence])
    sequences, positions = torch.arange(len(contexts)).to(device), (torch.tensor(contexts) - 1).to(device)
    queries = normal((len(contexts), heads, head_dim), kind, device, generator)
    where = (tables.to(device), sequences, positions)
    sinks = torch.linspace(-2.0, 2.0, heads).to(device)
    scale = head_dim**-0.5 / (1 if scales else 30)
    name = (
        f"contexts {len(contexts)} x {max(contexts)}, heads {heads}/{kv_heads}x{head_dim}, {short(code)}, {short(kind)}"
    )
    per_head = head_dim + (4 if scales else 0)

    def attend(module: Any) -> tuple[Tensor, ...]:
        return (module.paged_attention(queries, *caches, *where, scale, max(contexts), 0, sinks, scales),)

    yield Case(
        "paged_attention, codes",
        name,
        run=lambda: attend(triton_attention),
        expect=lambda: attend(reference),
        tolerance=2 * TOLERANCE[kind],
        bytes=2 * sum(contexts) * kv_heads * per_head + 2 * queries.nbytes,
        flops=4 * heads * head_dim * sum(contexts),
    )
    keys, values = (normal((len(contexts), kv_heads, head_dim), kind, device, generator) for _ in range(2))

    blank = [[torch.zeros(shape, device=device).to(code) for _ in range(2)] for _ in range(2)]
    blank_scales = [None if scales is None else tuple(map(torch.zeros_like, scales)) for _ in range(2)]

    def written(module: Any, side: int) -> tuple[Tensor, ...]:
        module.write_kv(keys, values, *blank[side], *where, blank_scales[side])
        return (*blank[side], *(blank_scales[side] or ()))

    yield Case(
        "write_kv, codes",
        name,
        run=lambda: written(triton_kv, 0),
        expect=lambda: written(reference, 1),
        tolerance=0.0,
        bytes=2 * len(contexts) * kv_heads * (head_dim * kind.itemsize + per_head),
        flops=0,
    )


def sample_case(rows: int, vocabulary: int, device: str) -> Case:
    """Logits with ties and masked ids; every fourth row is greedy. The token must be the same."""
    generator = generator_for(device)
    logits = (normal((rows, vocabulary), torch.float32, device, generator) * 4.0).round(decimals=1)
    logits[:, ::7] = -torch.inf
    temperatures = (torch.arange(rows, dtype=torch.float32) % 4 / 2).to(device)
    seeds = (torch.arange(rows) * -7046029254386353131).to(device)
    positions = (torch.arange(rows) * 1234567891).to(device)
    return Case(
        "sample",
        f"rows {rows}, vocabulary {vocabulary}",
        run=lambda: (triton_sampling.sample(logits, temperatures, seeds, positions),),
        expect=lambda: (reference.sample(logits, temperatures, seeds, positions),),
        tolerance=0.0,
        bytes=4 * rows * vocabulary,
        flops=0,
    )


def accepted_case(sequences: int, most: int, device: str) -> Case:
    rows = [1 + sequence % most for sequence in range(sequences)]
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    chosen = torch.randint(0, 2, (sum(rows),), generator=torch.Generator().manual_seed(0)).int()
    tokens = torch.randint(0, 2, (sum(rows),), generator=torch.Generator().manual_seed(1)).int()
    arguments = (chosen.to(device), tokens.to(device), starts.to(device), most)
    return Case(
        "count_accepted",
        f"sequences {sequences}, rows up to {most}",
        run=lambda: (triton_sampling.count_accepted(*arguments),),
        expect=lambda: (reference.count_accepted(*arguments),),
        tolerance=0.0,
        bytes=4 * (2 * sum(rows) + 2 * sequences + 1),
        flops=0,
    )
