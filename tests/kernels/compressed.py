"""Tiny models in compressed-tensors, written from the format's description and not by the reader's own code."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.kernels.tiny import Tiny, write_tiny_folder

SHAPE = Tiny(hidden=128, heads=4, kv_heads=2, head_dim=32, ffn=256, tied_head=False)
FORMATS = {"INT8": "int-quantized", "FP8": "float-quantized"}


def write_compressed_folder(folder: Path, kind: str, shape: Tiny = SHAPE, scales: torch.dtype = torch.bfloat16) -> Path:
    """The weights of `shape`, every matrix of its layers in one of the kinds of `kernels.compressed_tensors`."""
    write_tiny_folder(folder, shape)
    stored: dict[str, Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            stored[name] = weight
            continue
        module = name.removesuffix("weight")
        stored |= {module + part: tensor.contiguous() for part, tensor in in_parts(weight, kind, scales).items()}
    save_file(stored, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation(kind)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantisation(kind: str) -> dict[str, object]:
    """What config.json says of it."""
    weights: dict[str, object] = {"num_bits": 8, "type": "float" if kind == "FP8" else "int", "symmetric": True,
                                  "strategy": "channel", "group_size": None, "dynamic": False}
    if "4_G" in kind:
        weights |= {"num_bits": 4, "symmetric": kind.startswith("INT"), "strategy": "group",
                    "group_size": int(kind.partition("_G")[2])}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {"quant_method": "compressed-tensors", "format": FORMATS.get(kind, "pack-quantized"), "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group}}


def in_parts(weight: Tensor, kind: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A matrix rounded to the nearest, by the last of its tensors' names."""
    if kind in FORMATS:
        largest = 448.0 if kind == "FP8" else 127.0
        scale = (weight.abs().amax(1, keepdim=True) / largest).to(dtype)
        values = weight / scale.float()
        codes = values.clamp(-448, 448).to(torch.float8_e4m3fn) if kind == "FP8" else values.round().to(torch.int8)
        return {"weight": codes, "weight_scale": scale}
    outputs, inputs = weight.shape
    groups = weight.view(outputs, -1, int(kind.partition("_G")[2]))
    zeros = torch.full(groups.shape[:2], 8)
    if kind.startswith("INT"):
        scale = (groups.abs().amax(2) / 7.5).to(dtype)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = ((high - low) / 15).to(dtype)
        zeros = (-low / scale.float()).round().clamp(0, 15).long()
    codes = ((groups / scale.float()[..., None]).round() + zeros[..., None]).clamp(0, 15).long().view(outputs, inputs)
    parts = {"weight_packed": _words(codes), "weight_scale": scale, "weight_shape": torch.tensor([outputs, inputs])}
    return parts if kind.startswith("INT") else parts | {"weight_zero_point": _words(zeros.T).T}


def read_back(parts: dict[str, Tensor]) -> Tensor:
    """The weights that the parts of a matrix mean, in float32."""
    scale = parts["weight_scale"].float()
    if "weight" in parts:
        return parts["weight"].float() * scale
    outputs, inputs = parts["weight_shape"].tolist()
    values = _values(parts["weight_packed"]).view(outputs, scale.shape[1], -1)
    zeros = torch.full(scale.shape, 8)
    if "weight_zero_point" in parts:
        zeros = _values(parts["weight_zero_point"].T.contiguous()).T[:outputs]
    return ((values - zeros[..., None]) * scale[..., None]).view(outputs, inputs)


def _words(codes: Tensor) -> Tensor:
    """Codes [rows, columns] as int32 [rows, ceil(columns / 8)]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    words = sum(padded[..., at] << (4 * at) for at in range(8))
    assert isinstance(words, Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _values(words: Tensor) -> Tensor:
    """int32 [rows, columns] as codes [rows, columns * 8]."""
    return torch.stack([words.long() >> (4 * at) & 15 for at in range(8)], -1).view(len(words), -1)
