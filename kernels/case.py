"""One check of one kernel: what runs, what it must give, and the least work there is to do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Copies of a workload are made until they hold so much: four times what the L2 cache of a Hopper GPU does.
COPIES_BYTES = 200 << 20

# A result may differ by this much of the largest expected magnitude: a few float32 roundings, or one to the type.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@dataclass(frozen=True, slots=True)
class Case:
    """One kernel at one shape."""

    name: str
    shape: str
    run: Callable[[], tuple[Tensor, ...]]  # the kernel
    expect: Callable[[], tuple[Tensor, ...]]  # what it must give
    tolerance: float  # 0: every bit
    bytes: int  # read and written at least, each byte once
    flops: int
    timed: bool = True  # False: a property, not a workload
    lowered: bool = True  # False: another case compiles to the same, or nearly
    # The same work on other memory, made when it is timed: together more than a cache holds.
    copies: Callable[[], list[Callable[[], Any]]] | None = None
    # What the library has for the same work: ways, each as `copies`.
    library: Callable[[], list[list[Callable[[], Any]]]] | None = None

    def error(self, results: tuple[Tensor, ...]) -> float:
        """Largest difference as a share of the largest expected magnitude; NaN where one side alone is NaN."""
        worst = 0.0
        for result, expected in zip(results, self.expect(), strict=True):
            wide, exact = result.double(), expected.double()
            unwritten = exact.isnan() & wide.isnan()
            difference = (wide - exact).abs().masked_fill(unwritten, 0.0).max().item()
            worst = difference if difference != difference else max(worst, difference / _magnitude(exact))
        return worst


def _magnitude(exact: Tensor) -> float:
    return max(1e-30, exact.nan_to_num(nan=0.0).abs().max().item())


def generator_for(device: str) -> torch.Generator | None:
    return None if device == "meta" else torch.Generator(device).manual_seed(0)


def normal(shape: tuple[int, ...], kind: torch.dtype, device: str, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, dtype=kind, device=device, generator=generator)


def short(kind: torch.dtype) -> str:
    return {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.float8_e4m3fn: "fp8",
        torch.int8: "int8",
    }[kind]


def copies_of(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """As many of what `make` gives, of `nbytes` each, as no cache holds together."""
    return [make() for _ in range(max(2, COPIES_BYTES // max(1, nbytes)))]
