"""Checks of the matrix products and of what quantises their activations; the sets as in `kernels.cases`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import (
    reference,
    reference_experts,
    triton_experts,
    triton_linear4,
    triton_linear8,
    triton_quantise,
    tuning,
)
from kernels.case import TOLERANCE, Case, copies_of, generator_for, normal, short
from kernels.triton_product import Workspace
from kernels.weight4 import TILE_INPUTS, TILE_OUTPUTS, TILE_WORDS, Weight4, packed
from kernels.weight8 import BLOCK, KINDS, Rows8, Weight8, dequantised8, nearest


def serving_cases(device: str) -> Iterator[Case]:
    """Llama-3.1-8B's matrices, and a large square one; bf16."""
    kind = torch.bfloat16
    for outputs, inputs in ((4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192)):
        for rows in (1, 2, 4, 8, 16, 64, 512):
            lowered = (outputs, inputs) == (4096, 4096) and rows in (1, 16, 512)
            yield from linear4_cases(rows, outputs, inputs, 128, "symmetric", kind, device, lowered)
    for offsets, group in (("zeros", 64), ("minima", 32), ("mxfp4", 32)):
        for rows in (1, 16, 512):
            yield from linear4_cases(rows, 4096, 4096, group, offsets, kind, device, offsets != "zeros" and rows == 16)
    for code in KINDS:
        for rows in (1, 16, 512, 2048):
            for blocks in (False, True):
                lowered = (rows == 16 and blocks != (code == torch.int8)) or (rows == 512 and code.is_floating_point)
                yield from linear8_cases(rows, 4096, 4096, code, blocks, kind, device, lowered)
        if code.is_floating_point:
            for outputs, inputs in ((8192, 8192), (28672, 4096)):
                for rows in (512, 2048):
                    yield from linear8_cases(rows, outputs, inputs, code, False, kind, device, lowered=False)
        for rows in (1, 32, 256):
            yield from quantise8_cases(rows, 4096, code, rows == 1, kind, device, code.is_floating_point)
    # gpt-oss-20b: 32 experts, 4 of them for a row
    for rows in (1, 16, 64):
        yield experts_case(rows, 32, 4, 2880, 2880, "mxfp4", kind, device, rows == 1)


def small_cases(device: str) -> Iterator[Case]:
    """Sizes that fill no tile."""
    yield experts_case(3, 4, 2, 64, 32, "mxfp4", torch.float16, device)
    for offsets, group in (("symmetric", 128), ("zeros", 64), ("minima", 32), ("mxfp4", 32)):
        for rows in (1, 6):
            yield from linear4_cases(rows, 12, 264, group, offsets, torch.float16, device)
    for code in KINDS:
        for blocks in (False, True):
            yield from linear8_cases(3, 7, 530, code, blocks, torch.float16, device)
            yield from quantise8_cases(3, 300, code, blocks, torch.float16, device)


def dense_products(rows: int, outputs: int, inputs: int, kind: torch.dtype, device: str) -> list[Callable[[], Any]]:
    """The library's products of the same size in 16 bits, to compare with."""
    x = normal((rows, inputs), kind, device, None)
    weights = copies_of(lambda: normal((outputs, inputs), kind, device, None), outputs * inputs * kind.itemsize)
    return [partial(F.linear, x, weight) for weight in weights]


def linear4_cases(
    rows: int,
    outputs: int,
    inputs: int,
    group: int,
    offsets: str,
    kind: torch.dtype,
    device: str,
    lowered: bool = True,
) -> Iterator[Case]:
    """A row on every path that its number takes: the exact one, and the fastest where that is another."""
    generator = generator_for(device)
    x = normal((rows, inputs), kind, device, generator)
    weight = random_weight4(outputs, inputs, group, offsets, kind, device, generator)
    shape = f"rows {rows}, {outputs} x {inputs}, groups of {group}, {offsets}, {short(kind)}"
    moved = weight.nbytes + rows * (inputs + outputs) * x.element_size()
    many = rows > triton_linear4.MANY_ROWS
    splits = tuning.linear4_split(outputs, inputs)[1]
    work = Workspace(device, min(rows, triton_linear4.MANY_ROWS), splits * outputs)

    def copies(exact: bool) -> list[Callable[[], Any]]:
        weights = copies_of(
            lambda: random_weight4(outputs, inputs, group, offsets, kind, device, generator), weight.nbytes
        )
        return [partial(triton_linear4.linear4, x, other, exact, work=work) for other in weights]

    for name, exact in (("linear4", True), *((("linear4, fastest", False),) if many else ())):
        yield Case(
            name,
            shape,
            run=lambda exact=exact: (triton_linear4.linear4(x, weight, exact, work=work),),
            expect=lambda: (reference.linear4(x, weight),),
            # Where weights are dequantised once, each of them carries a rounding of its own.
            tolerance=TOLERANCE[kind] * (2 if many and not exact else 1),
            bytes=moved,
            flops=2 * rows * outputs * inputs,
            lowered=lowered,
            copies=partial(copies, exact),
            library=lambda: [dense_products(rows, outputs, inputs, kind, device)],
        )
    if rows > 1:
        yield Case(
            "linear4, rows alone",
            shape,
            run=lambda: tuple(triton_linear4.linear4(x[row : row + 1], weight) for row in (0, rows - 1)),
            expect=lambda: triton_linear4.linear4(x, weight)[[0, -1]].split(1),
            tolerance=0.0,
            bytes=moved,
            flops=2 * rows * outputs * inputs,
            timed=False,
        )


def random_weight4(
    outputs: int,
    inputs: int,
    group: int,
    offsets: str,
    kind: torch.dtype,
    device: str,
    generator: torch.Generator | None = None,
) -> Weight4:
    """Codes of every value, scales that differ by up to four times.

    `offsets` is "symmetric", "zeros", "minima" or "mxfp4".
    """
    if device == "meta":
        return _blank_weight4(outputs, inputs, group, offsets, kind)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator, device=device, dtype=torch.uint8)
    groups = (outputs, -(-inputs // group))
    scales = (0.02 * torch.rand(groups, generator=generator, device=device) + 0.005).to(kind)
    if offsets == "zeros":
        zeros = torch.randint(0, 16, groups, generator=generator, device=device, dtype=torch.uint8)
        return packed(codes, scales, group, zeros=zeros)
    if offsets == "mxfp4":
        exponents = torch.randint(118, 124, groups, generator=generator, device=device, dtype=torch.uint8)
        return packed(codes, exponents, group)
    if offsets == "minima":
        return packed(codes, scales, group, minima=normal(groups, kind, device, generator) * 0.05)
    return packed(codes, scales, group)


def _blank_weight4(outputs: int, inputs: int, group: int, offsets: str, kind: torch.dtype) -> Weight4:
    tiles = -(-outputs // TILE_OUTPUTS), -(-inputs // TILE_INPUTS)
    groups = (*tiles, TILE_INPUTS // group, TILE_OUTPUTS)
    types = {"zeros": torch.uint8, "minima": kind}
    scales, other = (
        None if of is None else torch.empty(groups, dtype=of, device="meta")
        for of in (torch.uint8 if offsets == "mxfp4" else kind, types.get(offsets))
    )
    words = torch.empty((*tiles, TILE_OUTPUTS, TILE_WORDS), dtype=torch.int16, device="meta")
    assert scales is not None
    return Weight4(words, scales, other, outputs, inputs, group)


def linear8_cases(
    rows: int,
    outputs: int,
    inputs: int,
    code: torch.dtype,
    blocks: bool,
    kind: torch.dtype,
    device: str,
    lowered: bool = True,
) -> Iterator[Case]:
    x, weight = random_rows8(rows, inputs, code, blocks, device), random_weight8(outputs, inputs, code, blocks, device)
    shape = (
        f"rows {rows}, {outputs} x {inputs}, {short(code)} {'in blocks' if blocks else 'per channel'}, {short(kind)}"
    )
    moved = x.codes.nbytes + weight.codes.nbytes + weight.scales.nbytes + rows * outputs * kind.itemsize

    def copies() -> list[Callable[[], Any]]:
        weights = copies_of(lambda: random_weight8(outputs, inputs, code, blocks, device), weight.codes.nbytes)
        return [partial(triton_linear8.linear8, x, other, kind) for other in weights]

    def library() -> list[list[Callable[[], Any]]]:
        """torch's scaled products with a scale for each row and output, promoting sums or not; or in whole numbers."""
        others = copies_of(lambda: random_weight8(outputs, inputs, code, blocks, device).codes.t(), weight.codes.nbytes)
        if code == torch.int8:
            return [[partial(torch._int_mm, x.codes, other) for other in others]]
        scales = torch.ones(rows, 1, device=device), torch.ones(1, outputs, device=device)
        scaled = partial(torch._scaled_mm, scale_a=scales[0], scale_b=scales[1], out_dtype=kind)
        return [[partial(scaled, x.codes, other, use_fast_accum=fast) for other in others] for fast in (False, True)]

    yield Case(
        "linear8",
        shape,
        run=lambda: (triton_linear8.linear8(x, weight, kind),),
        expect=lambda: (reference.linear8(x, weight, kind),),
        # A tensor core adds 128 products of FP8 into about 14 bits before they are promoted.
        tolerance=TOLERANCE[kind] + (2**-11 if code.is_floating_point else 0),
        bytes=moved,
        flops=2 * rows * outputs * inputs,
        lowered=lowered,
        copies=copies,
        library=library if rows > 16 and not blocks else None,
    )
    if rows > 1:
        some = (0, rows - 1)
        yield Case(
            "linear8, rows alone",
            shape,
            run=lambda: tuple(
                triton_linear8.linear8(Rows8(x.codes[row : row + 1], x.scales[row : row + 1]), weight, kind)
                for row in some
            ),
            expect=lambda: triton_linear8.linear8(x, weight, kind)[list(some)].split(1),
            tolerance=0.0,
            bytes=moved,
            flops=2 * rows * outputs * inputs,
            timed=False,
        )


def experts_case(
    rows: int,
    experts: int,
    most: int,
    hidden: int,
    width: int,
    offsets: str,
    kind: torch.dtype,
    device: str,
    lowered: bool = True,
) -> Case:
    """Bytes count the matrices of as many experts as rows can choose."""
    generator = generator_for(device)
    gate_up = random_weight4(experts * 2 * width, hidden, 32, offsets, kind, device, generator)
    down = random_weight4(experts * hidden, width, 32, offsets, kind, device, generator)
    x, logits = normal((rows, hidden), kind, device, generator), normal((rows, experts), kind, device, generator)
    read = min(experts, rows * most)
    return Case(
        "mixture",
        f"rows {rows}, {most} of {experts} experts, {hidden} x {width}, {offsets}, {short(kind)}",
        run=lambda: (triton_experts.mixture(x, logits, gate_up, down, most),),
        expect=lambda: (reference_experts.mixture(x, logits, gate_up, down, most),),
        tolerance=3 * TOLERANCE[kind],
        bytes=(gate_up.nbytes + down.nbytes) * read // experts + 2 * rows * hidden * kind.itemsize,
        flops=6 * rows * most * hidden * width,
        lowered=lowered,
    )


def quantise8_cases(
    rows: int, columns: int, code: torch.dtype, blocks: bool, kind: torch.dtype, device: str, lowered: bool = True
) -> Iterator[Case]:
    """Compared as the values they stand for: a scale that differs in its last bit may change a code by one step."""
    generator = generator_for(device)
    x, residual = (normal((rows, columns), kind, device, generator) for _ in range(2))
    weight = normal((columns,), kind, device, generator)
    shape = f"rows {rows}, columns {columns}, {short(kind)} to {short(code)} {'in blocks' if blocks else 'per row'}"
    size, tolerance = x.element_size(), 2**-4 if code.is_floating_point else 1 / 127
    result = rows * (columns + 4)

    def summed(module: Any) -> tuple[Tensor, ...]:
        quantised, total = module.add_rms_norm_quantise8(x, residual, weight, 1e-5, code, blocks)
        return dequantised8(quantised), total

    yield Case(
        "quantise8",
        shape,
        run=lambda: (dequantised8(triton_quantise.quantise8(x, code, blocks)),),
        expect=lambda: (dequantised8(reference.quantise8(x, code, blocks)),),
        tolerance=0.0,
        bytes=rows * columns * size + result,
        flops=4 * rows * columns,
        lowered=lowered,
    )
    yield Case(
        "rms_norm_quantise8",
        shape,
        run=lambda: (dequantised8(triton_quantise.rms_norm_quantise8(x, weight, 1e-5, code, blocks)),),
        expect=lambda: (dequantised8(reference.rms_norm_quantise8(x, weight, 1e-5, code, blocks)),),
        tolerance=tolerance,
        bytes=(rows + 1) * columns * size + result,
        flops=8 * rows * columns,
        lowered=lowered,
    )
    yield Case(
        "add_rms_norm_quantise8",
        shape,
        run=lambda: summed(triton_quantise),
        expect=lambda: summed(reference),
        tolerance=tolerance,
        bytes=(3 * rows + 1) * columns * size + result,
        flops=9 * rows * columns,
        lowered=lowered,
    )


def random_rows8(rows: int, inputs: int, code: torch.dtype, blocks: bool, device: str) -> Rows8:
    scales = _scales((rows, -(-inputs // BLOCK)) if blocks else (rows,), device)
    return Rows8(_codes(rows, inputs, code, device), scales)


def random_weight8(outputs: int, inputs: int, code: torch.dtype, blocks: bool, device: str) -> Weight8:
    scales = _scales((-(-outputs // BLOCK), -(-inputs // BLOCK)) if blocks else (outputs,), device)
    return Weight8(_codes(outputs, inputs, code, device), scales)


def _codes(rows: int, columns: int, code: torch.dtype, device: str) -> Tensor:
    """Codes spread over all of their range."""
    wide = normal((rows, columns), torch.float32, device, generator_for(device)) * (40 if code == torch.int8 else 100)
    return nearest(wide, code)


def _scales(shape: tuple[int, ...], device: str) -> Tensor:
    return torch.rand(shape, generator=generator_for(device), device=device) * 0.02 + 0.005
