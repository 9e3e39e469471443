"""Matrices rounded to few bits, in the parts in which compressed-tensors stores them.

Rule: pure, and what is read back is exactly scale * (code - zero) of what is written. Codes are chosen for the scale as
it is stored, rounded to its own type. Layout: `kernels.compressed_tensors`.
"""

import torch
from torch import Tensor

from kernels.compressed_tensors import GROUPS, METHOD, Scheme

Parts = dict[str, Tensor]

_WORD = 8  # codes of four bits in an int32
_MIDDLE = 8
_LARGEST8 = 127


def scheme_for(bits: int, group: int, symmetric: bool) -> Scheme:
    """Raises ValueError for what cannot be written, with what can."""
    if bits == 8:
        if not symmetric:
            raise ValueError("eight bits are symmetric: leave out the zero points")
        return Scheme("int-quantized", 0, True)
    if bits != 4 or group not in GROUPS:
        groups = ", ".join(map(str, GROUPS))
        raise ValueError(f"{bits} bits in groups of {group} cannot be written: 4 bits in groups of {groups} can, and 8")
    return Scheme("pack-quantized", group, symmetric)


def check_inputs(inputs: int, scheme: Scheme) -> None:
    """Raises ValueError when the inputs of a matrix are no whole groups."""
    if scheme.group and inputs % scheme.group:
        fitting = [str(group) for group in GROUPS if not inputs % group]
        raise ValueError(f"{inputs} inputs are no whole groups of {scheme.group}: "
                         + (f"choose {' or '.join(fitting)}" if fitting else "choose 8 bits"))


def rounded(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> Parts:
    """A matrix [N, C] rounded to the nearest, scales in `dtype`; keys are the last of the tensors' names."""
    outputs, inputs = weight.shape
    wide = weight.float()
    if scheme.format == "int-quantized":
        scale = _scale(wide.abs().amax(1, keepdim=True) / _LARGEST8, dtype)
        codes = (wide / scale.float()).round().clamp(-_LARGEST8, _LARGEST8)
        return {"weight": codes.to(torch.int8), "weight_scale": scale}
    groups = wide.view(outputs, -1, scheme.group)
    zeros = torch.full(groups.shape[:2], float(_MIDDLE))
    if scheme.symmetric:
        # the codes reach from -8 to 7, and either end may be the largest weight's
        scale = _scale(groups.abs().amax(2) / 7.5, dtype)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = _scale((high - low) / 15, dtype)
        zeros = (-low / scale.float()).round().clamp(0, 15)
    codes = ((groups / scale.float()[..., None]).round() + zeros[..., None]).clamp(0, 15)
    parts = {"weight_packed": _words(codes.view(outputs, inputs)), "weight_scale": scale,
             "weight_shape": torch.tensor([outputs, inputs])}
    if not scheme.symmetric:
        parts["weight_zero_point"] = _words(zeros.T).T.contiguous()
    return parts


def quantisation(scheme: Scheme) -> dict[str, object]:
    """What config.json says of it: every linear layer but the head."""
    packed = scheme.format == "pack-quantized"
    weights = {"num_bits": 4 if packed else 8, "type": "int", "symmetric": scheme.symmetric,
               "strategy": "group" if packed else "channel", "group_size": scheme.group if packed else None,
               "dynamic": False}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": METHOD, "format": scheme.format, "quantization_status": "compressed", "ignore": ["lm_head"],
            "config_groups": {"group_0": group}}


def _scale(steps: Tensor, dtype: torch.dtype) -> Tensor:
    """In its type, and of zeros alone 1: no weight divides by zero.

    What fp16 does not hold of a tiny one is left out, so that blocks with scales in fp16 can hold the same weights.
    """
    scale = steps.to(dtype).half().to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _words(codes: Tensor) -> Tensor:
    """Codes 0..15 [rows, columns] as int32 [rows, ceil(columns / 8)], the first in the lowest bits."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _WORD)).to(torch.int32)
    words = padded.view(len(codes), -1, _WORD) << 4 * torch.arange(_WORD, dtype=torch.int32)
    # no two codes share a bit, so that the sum is their union, also where it reaches the sign
    return words.sum(-1, dtype=torch.int32)
