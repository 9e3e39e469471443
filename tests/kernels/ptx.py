"""The PTX of every kernel compiled for Hopper: `python -m tests.kernels.ptx FILE` writes it as JSON.

In a process of its own: one that interprets kernels cannot compile them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.cases import serving_cases
from kernels.launch import recording
from kernels.lowering import HOPPER, source_of
from kernels.product_cases import random_weight4
from kernels.triton_linear4 import linear4


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What `kernels.lowering` lowers, and what no case of it has: splits that another launch adds, zero points."""
    for case in serving_cases("meta"):
        if case.timed and case.lowered:
            yield f"{case.name}: {case.shape}", case.run
    x = torch.empty(16, 4096, dtype=torch.bfloat16, device="meta")
    weight = random_weight4(4096, 4096, 64, "zeros", torch.bfloat16, "meta")
    yield "linear4 without a workspace: rows 16, groups of 64, zeros", lambda: linear4(x, weight)


def compiled() -> list[dict[str, str]]:
    """Their launches, each once: the kernel, what launched it, the PTX."""
    found: dict[str, dict[str, str]] = {}
    for name, call in calls():
        for recorded in recording(call):
            source = source_of(recorded)
            if source.hash() not in found:
                kernel = triton.compile(source, target=HOPPER, options=dict(recorded.options))
                found[source.hash()] = {"kernel": recorded.kernel.__name__, "name": name, "ptx": kernel.asm["ptx"]}
    return list(found.values())


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compiled()))
