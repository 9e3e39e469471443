"""A drafter while it learns: some layers of the target, and a head that knows part of its vocabulary.

Rule: it computes what the served decoder computes (`kernels.decoder` over `kernels.reference`), over whole texts at
once and with gradients. The embedding is the target's and stays; layers, norms and head learn.

B texts, T tokens, C hidden, H rows of the head.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from gguf import GGMLQuantizationType, quants
from safetensors.numpy import save_file
from torch import Tensor, nn

from kernels.checkpoint import Checkpoint
from kernels.checkpoint_config import HEAD_IDS, Q8_0
from kernels.config import CheckpointError
from kernels.reference import rotary, rotary_tables
from worker.compress.hugging_face import MATRICES, NORMS, halves, settings

_STORED = {"quantization_config": {"quant_method": Q8_0}}

class Student(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A decoder with gradients. `head_ids`: the token id of each row of its head, ascending."""

    def __init__(self, target: Checkpoint, layers: Sequence[int], head_ids: Sequence[int]) -> None:
        """Raises CheckpointError when there is no such layer, or the target's rope cannot be written down."""
        super().__init__()
        config = target.config
        if not layers or any(not 0 <= layer < config.layers for layer in layers):
            raise CheckpointError(f"the target has layers 0..{config.layers - 1}: {list(layers)} cannot be copied")
        if config.rope_factors is not None or config.rope_magnitude != 1.0:
            raise CheckpointError(f"{target.path} scales its rope, which a drafter's config.json cannot say yet: "
                                  "distil from a model without rope scaling")
        if config.experts is not None:
            raise CheckpointError(f"{target.path} is a mixture of experts, which no drafter can be made of yet: "
                                  "distil from a dense model of its vocabulary")
        if config.layer_norm or not config.gated or config.rotary_dim != config.head_dim:
            raise CheckpointError(f"{target.path} is of a family that no drafter can be made of yet (layer norms, no "
                                  "gate, heads that turn in part): distil from a model of a Llama family")
        windows = None if config.windows is None else tuple(config.window(layer) for layer in layers)
        self.config = replace(config, layers=len(layers), tied_head=False, head_ids=tuple(head_ids), windows=windows)
        self.register_buffer("embedding", target.tensor("embedding.weight"), persistent=False)
        self.head = nn.Parameter(target.tensor("head.weight")[torch.tensor(head_ids)])
        self.norm = nn.Parameter(target.tensor("norm.weight"))
        there = set(target.names())
        self.layers = nn.ModuleList()
        for layer in layers:
            names = [name for name in there if name.startswith(f"layers.{layer}.")]
            inside = {name.removeprefix(f"layers.{layer}.").replace(".", "_"): nn.Parameter(target.tensor(name))
                      for name in sorted(names)}
            self.layers.append(nn.ParameterDict(inside))
        cosines, sines = rotary_tables(config.rope_frequencies(), config.context_length)
        self.register_buffer("cosines", cosines, persistent=False)
        self.register_buffer("sines", sines, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """The normed hidden states [B, T, C] that the head reads. Texts are padded behind their end."""
        config = self.config
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).repeat(batch)
        x = self.embedding[tokens]
        for number, layer in enumerate(self.layers):
            normed = self._normed(x, layer["attention_norm_weight"])
            q, k, v = (self._heads(layer, part, normed) for part in "qkv")
            if config.qk_norm:
                q = self._normed(q, layer["attention_q_norm_weight"])
                k = self._normed(k, layer["attention_k_norm_weight"])
            q, k = rotary(q.flatten(0, 1), k.flatten(0, 1), positions, self.cosines, self.sines,
                          config.rope_interleaved)
            q, k = (each.view(batch, length, -1, config.head_dim).transpose(1, 2).to(v.dtype) for each in (q, k))
            k, v = (each.repeat_interleave(config.heads_per_kv_head, 1) for each in (k, v.transpose(1, 2)))
            mask = self._mask(number, length, tokens.device)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
            merged = attended.transpose(1, 2).reshape(batch, length, -1)
            x = x + F.linear(merged, layer["attention_o_weight"], layer.get("attention_o_bias"))
            normed = self._normed(x, layer["mlp_norm_weight"])
            gate, up = (F.linear(normed, layer[f"mlp_{part}_weight"]) for part in ("gate", "up"))
            x = x + F.linear(F.silu(gate) * up, layer["mlp_down_weight"])
        return self._normed(x, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H]"""
        return F.linear(hidden, self.head)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps) * weight

    def _heads(self, layer: nn.ParameterDict, part: str, normed: Tensor) -> Tensor:
        product = F.linear(normed, layer[f"attention_{part}_weight"], layer.get(f"attention_{part}_bias"))
        return product.view(*normed.shape[:2], -1, self.config.head_dim)

    def _mask(self, layer: int, length: int, device: torch.device) -> Tensor | None:
        """Who sees whom [T, T]; None: each all before it."""
        window = self.config.window(layer)
        if not window or window >= length:
            return None
        at = torch.arange(length, device=device)
        behind = at[:, None] - at[None, :]
        return (behind >= 0) & (behind < window)


def export(student: Student, folder: Path) -> dict[str, int]:
    """Write it as a checkpoint that the native step reads: matrices in int8 blocks. The bytes of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    config = student.config
    tensors: dict[str, np.ndarray] = {
        "model.embed_tokens.weight": _blocks(student.embedding), "lm_head.weight": _blocks(student.head),
        "model.norm.weight": _plain(student.norm),
    }
    for number, layer in enumerate(student.layers):
        for ours, theirs in MATRICES.items():
            key, name = ours.replace(".", "_"), f"model.layers.{number}.{theirs}"
            tensors[f"{name}.weight"] = _blocks(halves(layer[f"{key}_weight"], ours, config))
            if f"{key}_bias" in layer:
                tensors[f"{name}.bias"] = _plain(halves(layer[f"{key}_bias"], ours, config))
        for ours, theirs in NORMS.items():
            if (key := f"{ours.replace('.', '_')}_weight") in layer:
                tensors[f"model.layers.{number}.{theirs}.weight"] = _plain(layer[key])
    written = {"model.safetensors": folder / "model.safetensors.part", HEAD_IDS: folder / f"{HEAD_IDS}.part",
               "config.json": folder / "config.json.part"}
    save_file(tensors, written["model.safetensors"])
    written[HEAD_IDS].write_text(json.dumps(list(config.head_ids or ())))
    written["config.json"].write_text(json.dumps(settings(config) | _STORED, indent=1))
    for name, part in written.items():
        part.replace(folder / name)
    return {name: (folder / name).stat().st_size for name in written}


def _blocks(weight: Tensor) -> np.ndarray:
    blocks: np.ndarray = quants.quantize(weight.detach().float().cpu().numpy(), GGMLQuantizationType.Q8_0)
    return blocks


def _plain(weight: Tensor) -> np.ndarray:
    plain: np.ndarray = weight.detach().float().cpu().numpy()
    return plain
