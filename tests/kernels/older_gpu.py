"""`python -m tests.kernels.older_gpu`: compile products of four bits for an Ampere GPU, which lacks much of Hopper's.

Writes JSON: kind of offsets -> the target in the assembled PTX.
"""

import json
import re
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget

from kernels import launch, triton_linear4
from kernels.lowering import source_of
from kernels.product_cases import random_weight4

AMPERE = GPUTarget("cuda", 80, 32)


def main() -> None:
    launch.overlaps = lambda: False  # as on such a GPU
    x = torch.empty(1, 512, dtype=torch.bfloat16, device="meta")
    targets = {}
    for offsets, group in (("symmetric", 128), ("zeros", 64), ("mxfp4", 32)):
        weight = random_weight4(64, 512, group, offsets, torch.bfloat16, "meta")
        product = launch.recording(partial(triton_linear4.linear4, x, weight))[0]
        compiled = triton.compile(source_of(product), target=AMPERE, options=dict(product.options))
        assert compiled.asm["cubin"]
        targets[offsets] = re.search(r"\.target (\w+)", compiled.asm["ptx"]).group(1)
    print(json.dumps(targets))


if __name__ == "__main__":
    main()
