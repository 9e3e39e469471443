"""One check of one kernel: what runs, what it must give, and the least work there is to do."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
