"""Matrices of compressed-tensors as the blocks of GGML that the native step reads.

Rule: the same weights to the bit, or a ValueError.

    INT4_G32, INT4_G64, INT4_G128    Q4_0: a group's scale stands in each of its blocks of 32
    INT8                             Q8_0: an output's scale stands in each of its blocks

Blocks have scales in fp16, which holds those of bfloat16 between 2^-14 and 2^15. Zero points times scales are no fp16,
and FP8 is none of GGML's kinds: these stay what they are, and the step refuses them by name.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kernels.checkpoint import Checkpoint, Raw
from kernels.compressed_tensors import channels, grouped

if TYPE_CHECKING:
    from torch import Tensor

BLOCKS = {"INT4_G32": "Q4_0", "INT4_G64": "Q4_0", "INT4_G128": "Q4_0", "INT8": "Q8_0"}

_BLOCK = 32


class AsBlocks:
    """A `kernels.checkpoint.Checkpoint`: another one, with the kinds of BLOCKS as their blocks."""

    def __init__(self, stored: Checkpoint) -> None:
        self.config, self.path = stored.config, stored.path
        self._stored = stored

    def names(self) -> list[str]:
        return self._stored.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def kind(self, name: str) -> str:
        kind = self._stored.kind(name)
        return BLOCKS.get(kind, kind)

    def raw(self, name: str) -> Raw:
        """Raises ValueError for scales that a block does not hold."""
        raw = self._stored.raw(name)
        if raw.kind not in BLOCKS:
            return raw
        if raw.kind == "INT8":
            codes, scales = channels(raw.rows)
            return Raw("Q8_0", _blocks(name, scales[:, None], codes.reshape(len(codes), -1, _BLOCK)))
        codes, scales, _, _ = grouped(*raw)
        halves = codes.reshape(len(codes), -1, 2, _BLOCK // 2)
        return Raw("Q4_0", _blocks(name, scales, halves[..., 0, :] | halves[..., 1, :] << 4))

    def tensor(self, name: str) -> "Tensor":
        return self._stored.tensor(name)


def _blocks(name: str, scales: NDArray[np.float32], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Rows of scales [N, groups], each for as many of the blocks [N, B, bytes] as there are for one."""
    with np.errstate(over="ignore"):
        half = scales.astype("<f2")
    if not (half == scales).all():
        raise ValueError(f"{name} has scales that fp16 does not hold, so the native step cannot keep it: use torch")
    each = np.repeat(half, codes.shape[1] // scales.shape[1], 1)[..., None]
    return np.concatenate((each.view(np.uint8), codes), -1).reshape(len(codes), -1)
