"""gpt-oss's experts in safetensors: all of a layer in one tensor, taken apart to the matrices of each.

Rows of gate and up take turns. Matrices are MXFP4, four bits a weight and an exponent for each 32, or plain and then
transposed, inputs before outputs:

    model.layers.N.mlp.experts.gate_up_proj_blocks [experts, 2 ffn, hidden / 32, 16]
    model.layers.N.mlp.experts.down_proj_blocks [experts, hidden, ffn / 32, 16]     _scales: the same without the 16
    or .gate_up_proj [experts, hidden, 2 ffn], .down_proj [experts, ffn, hidden]; always _bias [experts, outputs]

A byte of theirs holds weights 2i and 2i + 1; in GGML's blocks, which `Raw` has, it holds i and i + 16.
"""

import re
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_GROUP_BYTES = 16  # 32 weights
_STORED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj(|_blocks|_scales|_bias)")


class Cut(NamedTuple):
    """Where a tensor of one expert lies in a stored one."""

    stored: str
    expert: int
    rows: slice  # of its outputs
    shape: tuple[int, ...]
    kind: str = ""  # as `Checkpoint.kind`; empty: as stored
    scales: str = ""  # the name of the tensor with its exponents
    transposed: bool = False


def cuts(stored: str, shape: tuple[int, ...]) -> dict[str, Cut] | None:
    """The tensors in a stored one, by our names; none of their own have exponents. None: it is no tensor of experts."""
    found = _STORED.fullmatch(stored)
    inputs: tuple[int, ...] = ()
    match found and found[3], shape:
        case "_scales", _:
            return {}
        case "_blocks", (count, outputs, groups, 16):
            inputs = (groups * 32,)
        case "", (count, wide, outputs):
            inputs = (wide,)
        case "_bias", (count, outputs):
            pass
        case _:
            return None
    layer, which, form = found.groups()
    parts = {"gate": slice(0, None, 2), "up": slice(1, None, 2)} if which == "gate_up" else {"down": slice(None)}
    packed = {"kind": "MXFP4", "scales": stored.removesuffix(form) + "_scales"} if form == "_blocks" else {}
    return {
        f"layers.{layer}.experts.{expert}.{part}.{'bias' if form == '_bias' else 'weight'}": Cut(
            stored, expert, rows, (len(range(*rows.indices(outputs))), *inputs), transposed=form == "", **packed
        )
        for expert in range(count)
        for part, rows in parts.items()
    }


def as_ggml(blocks: Bytes, exponents: Bytes) -> Bytes:
    """Blocks [outputs, groups, 16] and exponents [outputs, groups] as rows of GGML's MXFP4 [outputs, groups * 17]."""
    codes = np.stack((blocks & 15, blocks >> 4), -1).reshape(*blocks.shape[:-1], 2, _GROUP_BYTES)
    paired = codes[..., 0, :] | codes[..., 1, :] << 4
    return np.concatenate((exponents[..., None], paired), -1).reshape(len(blocks), -1)
