"""Checks of the fused operators of a decode step, and how many launches a layer takes.

The sets are those of `kernels.cases`.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import reference_layer, triton_choice, triton_layer
from kernels.case import TOLERANCE, Case, copies_of, generator_for, normal, short
from kernels.launch import recording
from kernels.product_cases import dense_products, random_weight4
from kernels.reference import rotary_tables
from kernels.reference_layer import hidden_of
from kernels.triton_choice import Samples
from kernels.triton_layer import Cache, HeadWeights, LayerWeights, Matrix, Norm
from kernels.triton_product import Workspace
from kernels.weight8 import quantised_weight8


class Shape(NamedTuple):
    """One layer and the head of a model."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    width: int
    vocabulary: int


LLAMA_8B = Shape(32, 8, 128, 4096, 14336, 128256)
# Nothing but the head size is a power of two, no matrix fills its tiles.
SMALL = Shape(2, 1, 16, 140, 64, 70)


def serving_cases(device: str) -> Iterator[Case]:
    for style in ("dense", "fp8", "4 bits"):
        for rows in (1, 16, 64):
            for case in cases(rows, LLAMA_8B, style, torch.bfloat16, device):
                # One kernel serves every number of rows, and one product in four bits shows what unpacking takes.
                lowered = rows == 1 and (style == "dense" or case.name == "project_gated")
                yield replace(case, lowered=lowered)


def small_cases(device: str) -> Iterator[Case]:
    for style in ("dense", "4 bits"):
        yield from cases(3, SMALL, style, torch.float16, device)


def launches_of_a_layer() -> int:
    """Launches that one layer takes in decode, counted on paper."""
    kind, rows = torch.bfloat16, 4
    layer = layer_of(LLAMA_8B, "dense", kind, "meta")
    work = workspace(LLAMA_8B, rows, "meta")
    cache = cache_of(rows, LLAMA_8B, kind, "meta")
    hidden = hidden_of(torch.empty(rows, 4096, dtype=kind, device="meta"))
    return len(recording(lambda: triton_layer.decode_layer(hidden, layer, layer.attention_norm, cache, work, 64)))


def cases(rows: int, shape: Shape, style: str, kind: torch.dtype, device: str) -> Iterator[Case]:
    generator = generator_for(device)
    layer, work = layer_of(shape, style, kind, device), workspace(shape, rows, device)
    hidden = hidden_of(normal((rows, shape.hidden), kind, device, generator), layer.attention_norm)
    attended = normal((rows, shape.heads * shape.head_dim), kind, device, generator)
    caches = [cache_of(rows, shape, kind, device) for _ in range(2)]
    size = kind.itemsize
    name = f"rows {rows}, hidden {shape.hidden}, {style}, {short(kind)}"

    def case(
        operator: str,
        run: Callable[[], tuple[Tensor, ...]],
        expect: Callable[[], tuple[Tensor, ...]],
        matrix: Matrix,
        elements: int,
        with_matrix: Callable[[Matrix], Any],
    ) -> Case:
        outputs, inputs = triton_layer.matrix_shape(matrix)

        def copies() -> list[Callable[[], Any]]:
            others = copies_of(
                lambda: matrix_of(outputs, inputs, style, kind, device), triton_layer.matrix_bytes(matrix)
            )
            return [partial(with_matrix, other) for other in others]

        return Case(
            operator,
            name,
            run=run,
            expect=expect,
            tolerance=2 * TOLERANCE[kind],
            bytes=triton_layer.matrix_bytes(matrix) + rows * elements * size,
            flops=2 * rows * outputs * inputs,
            copies=copies,
            library=lambda: [dense_products(rows, outputs, inputs, kind, device)],
        )

    epsilon = layer.mlp_norm.epsilon

    def heads(module: Any, cache: Cache, *more: Workspace) -> tuple[Tensor, ...]:
        return module.project_heads(hidden, epsilon, layer.qkv, layer.heads, cache, *more), *cache[:2]

    outputs, _ = triton_layer.matrix_shape(layer.qkv)
    yield case(
        "project_heads",
        lambda: heads(triton_layer, caches[0], work),
        lambda: heads(reference_layer, caches[1]),
        layer.qkv,
        shape.hidden + outputs,
        lambda other: triton_layer.project_heads(hidden, epsilon, other, layer.heads, caches[0], work),
    )
    gated = hidden, epsilon, layer.gate_up
    yield case(
        "project_gated",
        lambda: (triton_layer.project_gated(*gated, work),),
        lambda: (reference_layer.project_gated(*gated),),
        layer.gate_up,
        shape.hidden + shape.width,
        lambda other: triton_layer.project_gated(hidden, epsilon, other, work),
    )
    added = attended, layer.o, hidden, layer.mlp_norm
    yield case(
        "project_added",
        lambda: tuple(triton_layer.project_added(*added, work)),
        lambda: tuple(reference_layer.project_added(*added)),
        layer.o,
        attended.shape[1] + 2 * shape.hidden,
        lambda other: triton_layer.project_added(attended, other, hidden, layer.mlp_norm, work),
    )
    head = matrix_of(shape.vocabulary, shape.hidden, style, kind, device)
    chosen = hidden, epsilon, head, samples_of(rows, shape.vocabulary, device)
    choice = case(
        "choose",
        lambda: triton_choice.choose(*chosen, work),
        lambda: reference_layer.choose(*chosen),
        head,
        shape.hidden,
        lambda other: triton_choice.choose(hidden, epsilon, other, chosen[3], work),
    )
    yield replace(choice, tolerance=0.0)
    tokens = torch.arange(rows, device=device)
    yield Case(
        "embed",
        name,
        run=lambda: tuple(triton_layer.embed(tokens, hidden.values, layer.mlp_norm)),
        expect=lambda: tuple(reference_layer.embed(tokens, hidden.values, layer.mlp_norm)),
        tolerance=TOLERANCE[torch.float32],
        bytes=3 * rows * shape.hidden * size,
        flops=3 * rows * shape.hidden,
    )


def layer_of(shape: Shape, style: str, kind: torch.dtype, device: str) -> LayerWeights:
    """Random weights whose products have about the size of what goes in."""
    generator = generator_for(device)
    cosines, sines = rotary_tables(
        [10000.0 ** (-pair / shape.head_dim * 2) for pair in range(shape.head_dim // 2)], 64, device
    )
    norms = [Norm(normal((shape.hidden,), kind, device, generator), 1e-5) for _ in range(2)]
    return LayerWeights(
        attention_norm=norms[0],
        qkv=matrix_of((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.hidden, style, kind, device),
        heads=HeadWeights(None, None, None, 1e-5, cosines, sines, interleaved=False),
        o=matrix_of(shape.hidden, shape.heads * shape.head_dim, style, kind, device),
        mlp_norm=norms[1],
        gate_up=matrix_of(2 * shape.width, shape.hidden, style, kind, device),
        down=matrix_of(shape.hidden, shape.width, style, kind, device),
    )


def matrix_of(outputs: int, inputs: int, style: str, kind: torch.dtype, device: str) -> Matrix:
    if style in ("dense", "fp8"):
        dense = normal((outputs, inputs), kind, device, generator_for(device)) * inputs**-0.5
        return dense if style == "dense" else quantised_weight8(dense, torch.float8_e4m3fn, blocks=False)
    return random_weight4(outputs, inputs, 128, "symmetric", kind, device, generator_for(device))


def cache_of(rows: int, shape: Shape, kind: torch.dtype, device: str) -> Cache:
    """One row in each of `rows` sequences, in memory that is NaN; with more than two rows the last is padding."""
    keys, values = (
        torch.full((2 * rows, 16, shape.kv_heads, shape.head_dim), torch.nan, dtype=kind, device=device)
        for _ in range(2)
    )
    tables = torch.arange(2 * rows, dtype=torch.int32).flip(0).view(rows, 2)
    positions = torch.arange(rows) * 5 % 32
    if rows > 2:
        positions[-1] = -1
    return Cache(keys, values, tables.to(device), torch.arange(rows).to(device), positions.to(device))


def workspace(shape: Shape, rows: int, device: str) -> Workspace:
    matrices = [
        (shape.hidden, shape.width),
        (shape.hidden, shape.heads * shape.head_dim),
        (2 * shape.width, shape.hidden),
    ]
    matrices.append(((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.hidden))
    return Workspace(device, rows, triton_layer.splits_times_outputs(matrices))


def samples_of(rows: int, vocabulary: int, device: str) -> Samples:
    """One sequence for two rows; every other row greedy, every third under a mask of every other id."""
    number = torch.arange(rows)
    words = torch.full((1, -(-vocabulary // 32)), 0x55555555, dtype=torch.int32)
    mask_of = torch.where(number % 3 == 2, 0, -1).int()
    starts = torch.tensor([*range(0, rows, 2), rows]).int()
    values = (
        number,
        number % 2 / 2.0,
        number * -7046029254386353131,
        number * 1234567891,
        words,
        mask_of,
        number,
        starts,
    )
    return Samples(*(value.to(device) for value in values), most=2)
