"""A model's weights on disk, under one set of names, read when asked for.

Rule: opening reads no weight, but checks all there is to check without one: architecture, names, shapes, lengths of
files. A checkpoint that this decoder family cannot run is refused here, with the reason. torch is imported only to make
tensors, and gguf only to dequantise: the native step starts without either.

    embedding.weight [vocabulary, hidden]         norm.weight [hidden]         head.weight [vocabulary, hidden]
    layers.N.attention_norm.weight [hidden]       layers.N.attention.q.weight [heads * head_dim, hidden]
    layers.N.mlp_norm.weight [hidden]             layers.N.attention.{k,v}.weight [kv_heads * head_dim, hidden]
    layers.N.mlp.{gate,up}.weight [ffn, hidden]   layers.N.attention.o.weight [hidden, heads * head_dim]
    layers.N.mlp.down.weight [hidden, ffn]

With a tied head, `head.weight` is another name of `embedding.weight`. Rows of q and k stand as stored; the config's
`rope_interleaved` says which elements of a head turn together.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kernels.config import CheckpointError, DecoderConfig, llama3_rope_factors
from kernels.gguf_header import GgufHeader, read_gguf_header

if TYPE_CHECKING:
    from torch import Tensor

GGUF_ARCHITECTURES = ("llama",)
HUGGING_FACE_TYPES = ("llama", "mistral")

# Beyond any model; a damaged number must not become a huge table.
_LONGEST_CONTEXT = 1 << 24
_TENSORS_PER_LAYER = 9

# safetensors and GGML give them the same names.
_PLAIN_KINDS = ("F32", "F16", "BF16")


class Raw(NamedTuple):
    """A tensor as stored: GGML's name of its type (Q4_1, F16, ...), and the bytes [rows, bytes of a row]."""

    kind: str
    rows: NDArray[np.uint8]


class Checkpoint(Protocol):
    """The weights of one model; `tensor` and `raw` raise KeyError for a name that `names` lacks."""

    config: DecoderConfig
    path: Path

    def names(self) -> list[str]:
        """Every name there is, once: a tied head only as the embedding."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Rows first."""

    def tensor(self, name: str) -> "Tensor":
        """A float32 tensor of its own, dequantised where needed."""

    def raw(self, name: str) -> Raw:
        """The stored bytes, read-only; a vector is one row. Of a mapped file where the format allows."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, a folder with one, or a Hugging Face folder of config.json and safetensors.

    Raises CheckpointError, which says what is wrong and what to do.
    """
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() and any(path.glob("*.safetensors")):
            return SafetensorsCheckpoint(path)
        if len(ggufs) == 1:
            return GgufCheckpoint(ggufs[0])
        if ggufs:
            names = ", ".join(file.name for file in ggufs)
            raise CheckpointError(f"{path} holds several GGUF files; name one of {names}")
        raise CheckpointError(f"{path} holds no model: neither a .gguf file nor config.json with .safetensors files")
    if not path.exists():
        raise CheckpointError(f"there is no model at {path}; pull one with `tokenmill pull`")
    return GgufCheckpoint(path)


class GgufCheckpoint:
    """One GGUF file, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_gguf_header(path)
        self.config = _gguf_config(path, header)
        self._file = header.file
        self._infos = {
            _from_gguf(name): info for name, info in header.tensors.items() if name != "rope_freqs.weight"
        }
        _check_shapes(path, self.config, {name: info.shape for name, info in self._infos.items()})

    def names(self) -> list[str]:
        return list(self._infos)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._infos[self._stored(name)].shape

    def raw(self, name: str) -> Raw:
        info = self._infos[self._stored(name)]
        rows = info.shape[0] if len(info.shape) > 1 else 1
        return Raw(info.block.name, self._file[info.start : info.start + info.size_bytes].reshape(rows, -1))

    def tensor(self, name: str) -> "Tensor":
        return _dequantised(self.raw(name)).view(self.shape(name))

    def _stored(self, name: str) -> str:
        return _stored(name, self.config)


class SafetensorsCheckpoint:
    """A Hugging Face folder with weights in float32, float16 or bfloat16."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self.config = _hugging_face_config(path)
        self._files: dict[str, Any] = {}
        self._stored_names: dict[str, str] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in _shards(path):
            try:
                file = safe_open(shard, framework="pt")
            except SafetensorError as error:
                raise CheckpointError(f"{shard} is damaged or cut short ({error}); download it again") from error
            for stored in file.keys():  # noqa: SIM118 - a file is no dictionary
                if stored.endswith("rotary_emb.inv_freq"):
                    continue
                name = _from_hugging_face(stored)
                if name == "head.weight" and self.config.tied_head:
                    continue
                piece = file.get_slice(stored)
                if piece.get_dtype() not in _PLAIN_KINDS:
                    raise CheckpointError(
                        f"{shard}: {stored} is stored as {piece.get_dtype()}; {', '.join(_PLAIN_KINDS)} can be read"
                    )
                self._files[name], self._stored_names[name] = file, stored
                shapes[name] = tuple(piece.get_shape())
        _check_shapes(path, self.config, shapes)
        self._shapes = shapes

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[_stored(name, self.config)]

    def raw(self, name: str) -> Raw:
        import torch

        stored = self._plain(name)
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[stored.dtype]
        rows = stored.shape[0] if stored.dim() > 1 else 1
        return Raw(kind, stored.contiguous().view(torch.uint8).view(rows, -1).numpy())

    def tensor(self, name: str) -> "Tensor":
        return self._plain(name).float()

    def _plain(self, name: str) -> "Tensor":
        name = _stored(name, self.config)
        plain: Tensor = self._files[name].get_tensor(self._stored_names[name])
        return plain


def _stored(name: str, config: DecoderConfig) -> str:
    return "embedding.weight" if name == "head.weight" and config.tied_head else name


def _dequantised(raw: Raw) -> "Tensor":
    """Float32 [rows, elements]."""
    import torch

    if raw.kind == "F32":
        return torch.from_numpy(raw.rows.view(np.float32).copy())
    if raw.kind == "F16":
        return torch.from_numpy(raw.rows.view(np.float16).astype(np.float32))
    if raw.kind == "BF16":
        return torch.from_numpy((raw.rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32))
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(quants.dequantize(raw.rows, GGMLQuantizationType[raw.kind]))


# Names

_OUTSIDE = {
    "token_embd.weight": "embedding.weight",
    "output_norm.weight": "norm.weight",
    "output.weight": "head.weight",
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
}
_INSIDE = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}


def _from_gguf(name: str) -> str:
    """Our name; an unknown one stays, and is refused with the others."""
    return _ours(name, "blk.")


def _from_hugging_face(name: str) -> str:
    return _ours(name, "model.layers.")


def _ours(name: str, prefix: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, rest = name.removeprefix(prefix).partition(".")
    inside = _INSIDE.get(rest.removesuffix(".weight"))
    if not name.startswith(prefix) or not name.endswith(".weight") or inside is None:
        return name
    return f"layers.{layer}.{inside}.weight"


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    hidden, ffn = config.hidden, config.ffn
    attention, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocabulary, hidden), "norm.weight": (hidden,)}
    if not config.tied_head:
        shapes["head.weight"] = (config.vocabulary, hidden)
    for layer in range(config.layers):
        inside = {
            "attention_norm": (hidden,),
            "attention.q": (attention, hidden),
            "attention.k": (kv, hidden),
            "attention.v": (kv, hidden),
            "attention.o": (hidden, attention),
            "mlp_norm": (hidden,),
            "mlp.gate": (ffn, hidden),
            "mlp.up": (ffn, hidden),
            "mlp.down": (hidden, ffn),
        }
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
    return shapes


def _check_shapes(path: Path, config: DecoderConfig, found: dict[str, tuple[int, ...]]) -> None:
    if config.layers * _TENSORS_PER_LAYER > len(found):
        raise CheckpointError(
            f"{path} announces {config.layers} layers but holds {len(found)} tensors; download it again"
        )
    expected = expected_shapes(config)
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise CheckpointError(f"{path} lacks {_some(missing)}; download it again")
    if unknown:
        raise CheckpointError(f"{path} holds {_some(unknown)}, which a plain Llama has not; use another checkpoint")
    wrong = [f"{name} {found[name]}, not {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise CheckpointError(f"{path}: shapes contradict the configuration: {_some(wrong)}")


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


# Configurations


def _gguf_config(path: Path, header: GgufHeader) -> DecoderConfig:
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


def _hugging_face_config(path: Path) -> DecoderConfig:
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


def _shards(path: Path) -> list[Path]:
    """The safetensors files of a folder; those of its index where it has one."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        return sorted(path.glob("*.safetensors"))
    try:
        shards = [path / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download it again") from error
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing:
        raise CheckpointError(f"{path} lacks {_some(missing)}; download the rest")
    return shards
