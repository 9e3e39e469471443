"""A DecoderConfig out of GGUF metadata or Hugging Face's config.json.

Rule: what the decoder does not do (biases, windows, other rope scalings, experts, quantised safetensors) is refused by
name here, never ignored: a checkpoint that opens is computed as its authors meant it.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from kernels.config import CheckpointError, DecoderConfig, llama3_rope_factors
from kernels.gguf_header import GgufHeader

GGUF_ARCHITECTURES = ("llama",)
HUGGING_FACE_TYPES = ("llama", "mistral")

# Beyond any model; a damaged number must not become a huge table.
_LONGEST_CONTEXT = 1 << 24


def gguf_config(path: Path, header: GgufHeader) -> DecoderConfig:
    metadata = header.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise CheckpointError(
            f"{path} is of architecture {architecture!r}; supported in GGUF: {', '.join(GGUF_ARCHITECTURES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path} is one part of a split GGUF; merge the parts first (gguf-split --merge)")
    if metadata.get("llama.expert_count", 0):
        raise CheckpointError(f"{path} is a mixture of experts; only dense models are supported")

    def whole(key: str, default: int | None = None) -> int:
        return _whole(path, f"llama.{key}", metadata.get(f"llama.{key}", default))

    heads, hidden = whole("attention.head_count"), whole("embedding_length")
    head_dim = whole("attention.key_length", hidden // heads)
    if whole("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path} has values of another size than its keys, which is not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} lacks token_embd.weight; download it again")
    rotary_dim = whole("rope.dimension_count", head_dim)
    return DecoderConfig(
        layers=whole("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=whole("feed_forward_length"),
        vocabulary=embedding.shape[0],
        context_length=_context(path, "llama.context_length", metadata.get("llama.context_length")),
        norm_eps=_positive(
            path, "attention.layer_norm_rms_epsilon", metadata.get("llama.attention.layer_norm_rms_epsilon")
        ),
        rope_base=_positive(path, "rope.freq_base", metadata.get("llama.rope.freq_base", 10_000.0)),
        rotary_dim=rotary_dim,
        rope_interleaved=True,
        tied_head="output.weight" not in header.tensors,
        rope_factors=_gguf_rope_factors(path, header, rotary_dim),
    )


def _gguf_rope_factors(path: Path, header: GgufHeader, rotary_dim: int) -> tuple[float, ...] | None:
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{path} scales its rope by {kind!r}; supported: none, linear, or a rope_freqs tensor")
    factor = header.metadata.get("llama.rope.scaling.factor", 1.0) if kind == "linear" else 1.0
    stretch = _positive(path, "llama.rope.scaling.factor", factor)
    tensor = header.tensors.get("rope_freqs.weight")
    if tensor is None:
        return (stretch,) * (rotary_dim // 2) if stretch != 1.0 else None
    if tensor.block.name != "F32":
        raise CheckpointError(f"{path}: rope_freqs.weight is stored as {tensor.block.name}, not as F32")
    factors = header.file[tensor.start : tensor.start + tensor.size_bytes].view(np.float32)
    return tuple(stretch * _positive(path, "a rope factor", float(factor)) for factor in factors)


def hugging_face_config(path: Path) -> DecoderConfig:
    file = path / "config.json"
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is no JSON object; download it again")
    model_type = settings.get("model_type")
    if model_type not in HUGGING_FACE_TYPES:
        raise CheckpointError(
            f"{path} is of type {model_type!r}; supported in safetensors: {', '.join(HUGGING_FACE_TYPES)}"
        )

    def whole(key: str, default: int | None = None) -> int:
        value = settings.get(key)
        return _whole(file, key, default if value is None else value)

    context_length = _context(file, "max_position_embeddings", settings.get("max_position_embeddings"))
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if settings.get(key, plain) != plain:
            raise CheckpointError(f"{file}: {key} is {settings[key]!r}, only {plain!r} is supported")
    if settings.get("quantization_config"):
        raise CheckpointError(f"{path} is quantised; use the plain checkpoint or a GGUF")
    window = settings.get("sliding_window")
    if window is not None and _whole(file, "sliding_window", window) < context_length:
        raise CheckpointError(f"{file}: attention in a sliding window of {window} tokens is not supported")
    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    head_dim = whole("head_dim", hidden // heads)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{file}: rope_scaling should be an object, it is {rope!r}")
    base = _positive(file, "rope_theta", rope.get("rope_theta", settings.get("rope_theta", 10_000.0)))
    return DecoderConfig(
        layers=whole("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=whole("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=whole("intermediate_size"),
        vocabulary=whole("vocab_size"),
        context_length=context_length,
        norm_eps=_positive(file, "rms_norm_eps", settings.get("rms_norm_eps", 1e-6)),
        rope_base=base,
        rotary_dim=head_dim,
        rope_interleaved=False,
        tied_head=bool(settings.get("tie_word_embeddings", False)),
        rope_factors=_hugging_face_rope_factors(file, rope, base, head_dim),
    )


def _hugging_face_rope_factors(
    file: Path, rope: dict[str, Any], base: float, head_dim: int
) -> tuple[float, ...] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{file}: rope scaling {kind!r} is not supported; supported: default, linear, llama3")
    factor = _positive(file, "the rope's factor", rope.get("factor"))
    if kind == "linear":
        return (factor,) * (head_dim // 2)
    return llama3_rope_factors(
        base,
        head_dim,
        factor=factor,
        low_frequency_factor=_positive(file, "low_freq_factor", rope.get("low_freq_factor")),
        high_frequency_factor=_positive(file, "high_freq_factor", rope.get("high_freq_factor")),
        original_context_length=_whole(
            file, "original_max_position_embeddings", rope.get("original_max_position_embeddings")
        ),
    )


def _whole(path: Path, key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {key} should be a whole number from 1, it is {value!r}")
    return value


def _context(path: Path, key: str, value: object) -> int:
    length = _whole(path, key, value)
    if length > _LONGEST_CONTEXT:
        raise CheckpointError(f"{path}: {key} is {length}, more than {_LONGEST_CONTEXT}; the file is damaged")
    return length


def _positive(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{path}: {key} should be a positive number, it is {value!r}")
    return float(value)
