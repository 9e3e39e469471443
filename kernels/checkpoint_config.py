"""A DecoderConfig out of GGUF metadata or Hugging Face's config.json.

Rule: what the decoder does not do (other biases, other rope scalings, other routers, other quantised safetensors) is
refused by name here, never ignored: a checkpoint that opens is computed as its authors meant it.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kernels.compressed_tensors import METHOD as COMPRESSED_TENSORS
from kernels.compressed_tensors import Scheme, scheme_of
from kernels.config import CheckpointError, ClampedSwiglu, DecoderConfig, Experts, Yarn, llama3_rope_factors, yarn_rope
from kernels.gguf_header import GgufHeader

HEAD_IDS = "d2t.json"
Q8_0 = "q8_0"
MXFP4 = "mxfp4"


class _Family(NamedTuple):
    """What a family's checkpoints have without saying so."""

    qkv_bias: bool = False
    qk_norm: bool = False
    rope_interleaved: bool = False  # in GGUF; Hugging Face stores halves
    windowed: bool = False  # `sliding_window` means something
    window_asked_for: bool = False  # `use_sliding_window` has to be set
    first_layers_see_all: bool = False  # those before `max_window_layers`
    every_second_sees_all: bool = False  # from layer 1 on, where no list says otherwise
    layer_norm: bool = False  # as `DecoderConfig`; Hugging Face stores what its weights exceed 1 by
    gated: bool = True  # as `DecoderConfig`
    activation: str = "silu"  # Hugging Face's name of what the MLP does
    partly_rotary: bool = False  # `partial_rotary_factor` means something, and is a half where nothing is said
    mixture: bool = False  # of experts
    gpt_oss: bool = False  # sinks, biased and clamped experts, YaRN whose ends are not rounded


_NEMOTRON = _Family(layer_norm=True, gated=False, activation="relu2", partly_rotary=True)
GGUF_FAMILIES = {
    "llama": _Family(rope_interleaved=True),
    "qwen2": _Family(qkv_bias=True),
    "qwen3": _Family(qk_norm=True),
    "nemotron": _NEMOTRON,
    "qwen3moe": _Family(qk_norm=True, mixture=True),
    "gpt-oss": _Family(every_second_sees_all=True, mixture=True, gpt_oss=True),
}
HUGGING_FACE_FAMILIES = {
    "llama": _Family(),
    "mistral": _Family(windowed=True),
    "qwen2": _Family(qkv_bias=True, windowed=True, window_asked_for=True, first_layers_see_all=True),
    "qwen3": _Family(qk_norm=True, windowed=True, window_asked_for=True, first_layers_see_all=True),
    "qwen3_moe": _Family(qk_norm=True, windowed=True, window_asked_for=True, mixture=True),
    "nemotron": _NEMOTRON,
    "gpt_oss": _Family(windowed=True, every_second_sees_all=True, mixture=True, gpt_oss=True),
}
# What gpt-oss's experts compute where the checkpoint has no word for it.
_CLAMPED = ClampedSwiglu(alpha=1.702, limit=7.0)

# What GGUF may say of experts, and what of that is done here. A key that is not there says nothing.
_ROUTING = {
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1, 3),  # a softmax over all, or over the chosen
    "leading_dense_block_count": (0,),
}

# Beyond any model; a damaged number must not become a huge table.
_LARGEST = 1 << 24  # a width, a vocabulary, a context
_MOST_LAYERS, _LONGEST_HEAD, _MOST_EXPERTS = 1 << 12, 1 << 14, 1 << 14
_FARTHEST = 1e15  # of a number from 1, as a factor


def head_ids(folder: Path) -> tuple[int, ...] | None:
    """The token id of each row of a trimmed head: the JSON list `d2t.json` beside the weights. None: there is none."""
    file = folder / HEAD_IDS
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}); make the drafter again") from error
    if not isinstance(found, list) or not all(type(id) is int for id in found):
        raise CheckpointError(f"{file} should be a list of token ids, one for each row of the head")
    return tuple(found)


def gguf_config(path: Path, header: GgufHeader) -> DecoderConfig:
    metadata = {
        key: f"an array of {value.size} {value.dtype}" if isinstance(value, np.ndarray) else value
        for key, value in header.metadata.items()
    }
    header = replace(header, metadata=metadata)
    architecture = metadata.get("general.architecture")
    family = GGUF_FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise CheckpointError(
            f"{path} is of architecture {architecture!r}; supported in GGUF: {', '.join(GGUF_FAMILIES)}"
        )
    if metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path} is one part of a split GGUF; merge the parts first (gguf-split --merge)")
    if metadata.get(f"{architecture}.expert_count", 0) and not family.mixture:
        mixtures = ", ".join(name for name, known in GGUF_FAMILIES.items() if known.mixture)
        raise CheckpointError(f"{path} is a mixture of experts of architecture {architecture}; supported: {mixtures}")

    def said(key: str, default: object = None) -> object:
        return metadata.get(f"{architecture}.{key}", default)

    def whole(key: str, default: int | None = None, most: int = _LARGEST) -> int:
        return _whole(path, f"{architecture}.{key}", said(key, default), most)

    heads, hidden = whole("attention.head_count"), whole("embedding_length")
    layers = whole("block_count", most=_MOST_LAYERS)
    head_dim = whole("attention.key_length", hidden // heads, _LONGEST_HEAD)
    if whole("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path} has values of another size than its keys, which is not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} lacks token_embd.weight; download it again")
    rotary_dim = whole("rope.dimension_count", head_dim, _LONGEST_HEAD)
    base = _positive(path, "rope.freq_base", said("rope.freq_base", 10_000.0))
    rope = _gguf_rope(path, header, str(architecture), base, rotary_dim, whole_pairs=not family.gpt_oss)
    epsilon = "attention.layer_norm_epsilon" if family.layer_norm else "attention.layer_norm_rms_epsilon"
    return DecoderConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=whole("feed_forward_length"),
        vocabulary=embedding.shape[0],
        context_length=whole("context_length"),
        norm_eps=_positive(path, epsilon, said(epsilon)),
        rope_base=base,
        rotary_dim=rotary_dim,
        rope_interleaved=family.rope_interleaved,
        tied_head="output.weight" not in header.tensors,
        rope_factors=rope.factors or None,
        rope_magnitude=rope.magnitude,
        qkv_bias=family.qkv_bias or "blk.0.attn_q.bias" in header.tensors,
        output_bias="blk.0.attn_output.bias" in header.tensors,
        qk_norm=family.qk_norm,
        layer_norm=family.layer_norm,
        gated=family.gated,
        windows=_gguf_windows(path, header, str(architecture), family, layers),
        head_ids=head_ids(path.parent),
        sinks=family.gpt_oss,
        experts=_gguf_experts(path, header, str(architecture), family, layers) if family.mixture else None,
    )


def _gguf_windows(
    path: Path, header: GgufHeader, architecture: str, family: _Family, layers: int
) -> tuple[int, ...] | None:
    window = header.metadata.get(f"{architecture}.attention.sliding_window")
    if not window:
        return None
    size = _whole(path, "attention.sliding_window", window)
    return tuple(0 if family.every_second_sees_all and layer % 2 else size for layer in range(layers))


def _gguf_experts(path: Path, header: GgufHeader, architecture: str, family: _Family, layers: int) -> Experts:
    def said(key: str) -> object:
        return header.metadata.get(f"{architecture}.{key}")

    for key, done in _ROUTING.items():
        if (value := said(key)) is not None and value not in done:
            supported = " or ".join(map(str, done))
            raise CheckpointError(f"{path}: {architecture}.{key} is {value!r}, only {supported} is supported")
    if layers > len(header.tensors):
        found = len(header.tensors)
        raise CheckpointError(f"{path} announces {layers} layers but holds {found} tensors; download it again")
    return Experts(
        count=_whole(path, "expert_count", said("expert_count"), _MOST_EXPERTS),
        per_token=_whole(path, "expert_used_count", said("expert_used_count")),
        ffn=_whole(path, "expert_feed_forward_length", said("expert_feed_forward_length")),
        normalised=said("expert_weights_norm") is not False,
        dense_layers=tuple(at for at in range(layers) if f"blk.{at}.ffn_gate_inp.weight" not in header.tensors),
        biased=family.gpt_oss,
        clamped=_CLAMPED if family.gpt_oss else None,
    )


def _gguf_rope(
    path: Path, header: GgufHeader, architecture: str, base: float, rotary_dim: int, *, whole_pairs: bool
) -> Yarn:
    """Divisors (none: all 1) and magnitude. GGUF cannot say whether the ends of YaRN's range are rounded."""
    metadata, prefix = header.metadata, f"{architecture}.rope.scaling"
    kind = metadata.get(f"{prefix}.type", "none")
    if kind not in ("none", "linear", "yarn"):
        raise CheckpointError(f"{path} scales its rope by {kind!r}; supported: none, linear, yarn, a rope_freqs tensor")
    factor = metadata.get(f"{prefix}.factor", 1.0) if kind != "none" else 1.0
    stretch = _positive(path, f"{prefix}.factor", factor)
    tensor = header.tensors.get("rope_freqs.weight")
    if kind == "yarn":
        if tensor is not None:
            raise CheckpointError(f"{path} has both YaRN and a rope_freqs tensor, which contradict each other")
        key = f"{prefix}.original_context_length"
        original = _whole(path, key, metadata.get(key))
        rope = yarn_rope(
            base, rotary_dim, factor=stretch, original_context_length=original, whole_pairs=whole_pairs
        )
        more = _positive(path, f"{prefix}.attn_factor", metadata.get(f"{prefix}.attn_factor", 1.0))
        return rope._replace(magnitude=rope.magnitude * more)
    if tensor is None:
        return Yarn((stretch,) * (rotary_dim // 2) if stretch != 1.0 else (), 1.0)
    if tensor.block.name != "F32":
        raise CheckpointError(f"{path}: rope_freqs.weight is stored as {tensor.block.name}, not as F32")
    factors = header.file[tensor.start : tensor.start + tensor.size_bytes].view(np.float32)
    return Yarn(tuple(stretch * _positive(path, "a rope factor", float(factor)) for factor in factors), 1.0)


def hugging_face_scheme(path: Path) -> Scheme | None:
    """How the quantised matrices of a folder are stored, where they are as compressed-tensors says."""
    quantisation = _settings(path / "config.json").get("quantization_config")
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != COMPRESSED_TENSORS:
        return None
    return scheme_of(path / "config.json", quantisation)


def hugging_face_config(path: Path) -> DecoderConfig:
    file = path / "config.json"
    settings = _settings(file)
    model_type = settings.get("model_type")
    family = HUGGING_FACE_FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise CheckpointError(
            f"{path} is of type {model_type!r}; supported in safetensors: {', '.join(HUGGING_FACE_FAMILIES)}"
        )

    def whole(key: str, default: int | None = None, most: int = _LARGEST) -> int:
        value = settings.get(key)
        return _whole(file, key, default if value is None else value, most)

    context_length = whole("max_position_embeddings")
    for key, plain in (("mlp_bias", False), ("hidden_act", family.activation)):
        if settings.get(key, plain) != plain:
            raise CheckpointError(f"{file}: {key} is {settings[key]!r}, only {plain!r} is supported")
    _check_quantisation(path, settings, family)
    heads, hidden = whole("num_attention_heads"), whole("hidden_size")
    head_dim = whole("head_dim", hidden // heads, _LONGEST_HEAD)
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{file}: rope_scaling should be an object, it is {rope!r}")
    if family.gpt_oss and not (rope and ("rope_theta" in rope or "rope_theta" in settings)):
        raise CheckpointError(f"{file} lacks rope_scaling or rope_theta, which gpt-oss has no defaults for here")
    base = _positive(file, "rope_theta", rope.get("rope_theta", settings.get("rope_theta", 10_000.0)))
    layers = whole("num_hidden_layers", most=_MOST_LAYERS)
    rotary_dim = _rotary_dim(file, settings, rope, head_dim) if family.partly_rotary else head_dim
    scaling = _hugging_face_rope(file, rope, base, rotary_dim, context_length)
    epsilon, usual = ("norm_eps", 1e-5) if family.layer_norm else ("rms_norm_eps", 1e-6)
    biased = bool(settings.get("attention_bias", family.gpt_oss))
    return DecoderConfig(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=whole("num_key_value_heads", heads),
        head_dim=head_dim,
        ffn=whole("intermediate_size"),
        vocabulary=whole("vocab_size"),
        context_length=context_length,
        norm_eps=_positive(file, epsilon, settings.get(epsilon, usual)),
        rope_base=base,
        rotary_dim=rotary_dim,
        rope_interleaved=False,
        tied_head=bool(settings.get("tie_word_embeddings", False)),
        rope_factors=scaling.factors or None,
        rope_magnitude=scaling.magnitude,
        qkv_bias=family.qkv_bias or biased,
        output_bias=biased,
        qk_norm=family.qk_norm,
        layer_norm=family.layer_norm,
        gated=family.gated,
        windows=_hugging_face_windows(file, settings, family, layers),
        head_ids=head_ids(path),
        sinks=family.gpt_oss,
        experts=_hugging_face_experts(file, settings, family) if family.mixture else None,
    )


def _settings(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is no JSON ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file} is no JSON object; download it again")
    return settings


def _check_quantisation(path: Path, settings: dict[str, Any], family: _Family) -> None:
    """Blocks of our own drafters, gpt-oss's experts, and compressed-tensors; everything else is refused."""
    quantisation = settings.get("quantization_config")
    if quantisation is None or quantisation == {"quant_method": Q8_0}:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
    if method != COMPRESSED_TENSORS and not (family.gpt_oss and method == MXFP4):
        raise CheckpointError(
            f"{path} is quantised as {method!r}; use the plain checkpoint, a GGUF, or one in {COMPRESSED_TENSORS}"
        )


def _hugging_face_experts(file: Path, settings: dict[str, Any], family: _Family) -> Experts:
    def whole(key: str, default: int | None = None, most: int = _LARGEST) -> int:
        value = settings.get(key)
        return _whole(file, key, default if value is None else value, most)

    count = whole("num_local_experts" if settings.get("num_experts") is None else "num_experts", most=_MOST_EXPERTS)
    per_token = whole("num_experts_per_tok")
    if family.gpt_oss:
        alpha, limit = (
            _positive(file, key, default if settings.get(key) is None else settings[key])
            for key, default in (("swiglu_alpha", _CLAMPED.alpha), ("swiglu_limit", _CLAMPED.limit))
        )
        ffn, clamped = whole("intermediate_size"), ClampedSwiglu(alpha, limit)
        return Experts(count, per_token, ffn, normalised=True, biased=True, clamped=clamped)
    dense = settings.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise CheckpointError(f"{file}: mlp_only_layers should be a list of layers, it is {dense!r}")
    return Experts(
        count=count,
        per_token=per_token,
        ffn=whole("moe_intermediate_size"),
        normalised=bool(settings.get("norm_topk_prob", False)),
        every=whole("decoder_sparse_step", 1),
        dense_layers=tuple(dense),
    )


def _rotary_dim(file: Path, settings: dict[str, Any], rope: dict[str, Any], head_dim: int) -> int:
    """Elements of a head that turn. The factor stands among the rope's parameters, or beside them in older configs."""
    factor = rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 0.5))
    return int(head_dim * _positive(file, "partial_rotary_factor", factor))


def _hugging_face_windows(file: Path, settings: dict[str, Any], family: _Family, layers: int) -> tuple[int, ...] | None:
    """Of each layer, as its own list says, or as its family lays them out where there is none."""
    window = settings.get("sliding_window")
    unasked = family.window_asked_for and not settings.get("use_sliding_window", False)
    if window is None or not family.windowed or unasked:
        return None
    size = _whole(file, "sliding_window", window)
    kinds = settings.get("layer_types")
    if kinds is None and family.every_second_sees_all:
        return tuple(0 if layer % 2 else size for layer in range(layers))
    if kinds is None:
        first = settings.get("max_window_layers") or 0 if family.first_layers_see_all else 0
        if not isinstance(first, int):
            raise CheckpointError(f"{file}: max_window_layers should be a number of layers, it is {first!r}")
        return tuple(size if layer >= first else 0 for layer in range(layers))
    known = isinstance(kinds, list) and all(kind in ("sliding_attention", "full_attention") for kind in kinds)
    if not known or len(kinds) != layers:
        raise CheckpointError(
            f"{file}: layer_types must name {layers} layers as sliding_attention or full_attention, they are {kinds!r}"
        )
    return tuple(size if kind == "sliding_attention" else 0 for kind in kinds)


def _hugging_face_rope(file: Path, rope: dict[str, Any], base: float, head_dim: int, context_length: int) -> Yarn:
    """Divisors (none: all 1) and magnitude.

    `dynamic` changes frequencies once a text outgrows the trained context, also of tokens that are cached; up to there,
    which is what the context length is, it is no scaling at all.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind in ("default", "dynamic"):
        return Yarn((), 1.0)
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"{file}: rope scaling {kind!r} is not supported; supported: default, linear, dynamic, llama3, yarn"
        )
    factor = _positive(file, "the rope's factor", rope.get("factor"))
    original = rope.get("original_max_position_embeddings")
    if kind == "linear":
        return Yarn((factor,) * (head_dim // 2), 1.0)
    if kind == "yarn":
        return yarn_rope(
            base,
            head_dim,
            factor=factor,
            original_context_length=_whole(
                file, "original_max_position_embeddings", context_length if original is None else original
            ),
            fast=_positive(file, "beta_fast", rope.get("beta_fast") or 32.0),
            slow=_positive(file, "beta_slow", rope.get("beta_slow") or 1.0),
            whole_pairs=bool(rope.get("truncate", True)),
            magnitude=_yarn_magnitude(file, rope, factor),
        )
    factors = llama3_rope_factors(
        base,
        head_dim,
        factor=factor,
        low_frequency_factor=_positive(file, "low_freq_factor", rope.get("low_freq_factor")),
        high_frequency_factor=_positive(file, "high_freq_factor", rope.get("high_freq_factor")),
        original_context_length=_whole(file, "original_max_position_embeddings", original),
    )
    return Yarn(factors, 1.0)


def _yarn_magnitude(file: Path, rope: dict[str, Any], factor: float) -> float | None:
    """What the config says of it; None: nothing."""
    if rope.get("attention_factor") is not None:
        return _positive(file, "attention_factor", rope["attention_factor"])
    some, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if not some or not all_dims:
        return None
    rise = math.log(factor) / 10 if factor > 1.0 else 0.0
    return (_positive(file, "mscale", some) * rise + 1.0) / (_positive(file, "mscale_all_dim", all_dims) * rise + 1.0)


def _whole(path: Path, key: str, value: object, most: int = _LARGEST) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{path}: {key} should be a whole number from 1, it is {value!r}")
    if value > most:
        raise CheckpointError(f"{path}: {key} is {value}, more than {most}; the file is damaged")
    return value


def _positive(path: Path, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 / _FARTHEST <= value <= _FARTHEST:
        raise CheckpointError(f"{path}: {key} should be a positive number, it is {value!r}")
    return float(value)
