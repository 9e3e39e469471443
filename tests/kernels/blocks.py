"""Random blocks of every kind of quantised weights: GGUF's own library writes only some of them."""

import math

import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from kernels.native.grids import BLOCK_BYTES, SUPER, SUPER_KINDS, taken_apart
from tests.kernels.tiny import Tiny, tiny_weights

KINDS = tuple(BLOCK_BYTES)
_FACTORS = {"Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
WIDE = Tiny(layers=1, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=512, vocabulary=77, tied_head=False)


def random_blocks(kind: str, outputs: int, inputs: int, seed: int = 0) -> NDArray[np.uint8]:
    """Rows [outputs, bytes] of any bits at all, but for fp16 factors that make weights of a model's size."""
    random = np.random.default_rng((seed, outputs, inputs))
    count = inputs // (SUPER if kind in SUPER_KINDS else 32)
    blocks = random.integers(0, 256, (outputs, count, BLOCK_BYTES[kind]), dtype=np.uint8)
    if kind == "MXFP4":
        blocks[..., 0] = random.integers(119, 123, (outputs, count))
        return blocks.reshape(outputs, -1)
    factors = _FACTORS.get(kind, (208,))
    for at in factors:
        blocks[..., at : at + 2] = np.ones((outputs, count, 1), np.float16).view(np.uint8)
    rows = blocks.reshape(outputs, -1)
    grid = taken_apart(kind, rows)
    largest = 127 * (128 if grid.halves is not None else np.abs(grid.scales).max())
    for at in factors:
        sizes = random.uniform(0.2, 1.0, (outputs, count, 1)) * random.choice([-1.0, 1.0], (outputs, count, 1))
        blocks[..., at : at + 2] = (sizes / 4 / largest).astype(np.float16).view(np.uint8)
    return rows


def stored_as(kind: str, shape: Tiny = WIDE) -> dict[str, tuple[NDArray[np.uint8], Kind]]:
    """Every matrix of a tiny model but its routers, in random blocks of a kind; those of experts are stacked."""
    matrices = {name: weight.shape for name, weight in tiny_weights(shape).items()
                if weight.ndim > 1 and "ffn_gate_inp" not in name and not name.endswith(".bias")}
    return {
        name: (random_blocks(kind, math.prod(stack), inputs, seed).reshape(*stack, -1), Kind[kind])
        for seed, (name, (*stack, inputs)) in enumerate(matrices.items())
    }
