"""Launching a Triton kernel: on a GPU, in the interpreter, or on paper.

Every wrapper launches through `launch`, so that `recording` can ask any of them what it would launch, for which
argument types, and `kernels.lowering` can compile exactly that for a GPU that is not there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# True when this process runs kernels in Triton's Python interpreter, which knows neither warps nor compilation.
# `triton.jit` reads the same switch when a kernel is defined, so it is fixed before the first kernel is imported.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def product_type(operand: torch.dtype) -> tl.dtype | None:
    """What the operands of a matrix product are widened to before they are multiplied; None: as they are.

    The interpreter is wrong on bf16, and its matrix product rounds a row by the row's place. Summed in float64 and
    rounded once, a product depends on its operands only, as it does on a tensor core.
    """
    if INTERPRETED:
        return tl.float64
    return tl.float32 if operand == torch.float32 else None


class Launch(NamedTuple):
    """Launch choices of one kernel; `block` is its tile, in the unit of `kernels.tuning`."""

    block: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True, slots=True)
class Recorded:
    """One launch that was not made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int | bool]


_recorder: list[Recorded] | None = None


@cache
def overlaps() -> bool:
    """Whether kernels begin before the previous one has ended; on paper they do."""
    if INTERPRETED:
        return False
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, choice: Launch, **constants: Any) -> None:
    """Run `kernel` over `grid`; `constants` are its constexpr parameters. Nothing runs for an empty grid.

    No multiplication is fused into an addition: Triton's default changes with its version and the rounding with it, and
    without fusion the elementwise operators round like their reference. The interpreter has no options and never fuses.
    A kernel with a constant OVERLAP begins before the previous one has ended, where `overlaps` says so.
    """
    if 0 in grid:
        return
    options = {"num_warps": choice.num_warps, "num_stages": choice.num_stages, "enable_fp_fusion": False}
    if "OVERLAP" in kernel.arg_names:
        constants["OVERLAP"] = overlaps()
        options["launch_pdl"] = overlaps()
    if _recorder is not None:
        _recorder.append(Recorded(kernel, grid, arguments, constants, options))
    elif INTERPRETED:
        kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants, **options)


def recording(call: Callable[[], Any]) -> list[Recorded]:
    """The launches that `call` would make; tensors may be on the meta device, since no kernel runs."""
    with _recording() as launches:
        call()
    return launches


@contextmanager
def _recording() -> Iterator[list[Recorded]]:
    global _recorder
    if _recorder is not None:
        raise RuntimeError("launches are already being recorded; record one call at a time")
    _recorder = []
    try:
        yield _recorder
    finally:
        _recorder = None
