"""A model's weights on disk, under one set of names, read when asked for.

Rule: opening reads no weight, but checks all there is to check without one: architecture, names, shapes, length of the files.
A checkpoint that this decoder family cannot run is refused here, with the reason.

    embedding.weight  [vocabulary, hidden]         norm.weight  [hidden]         head.weight  [vocabulary, hidden]
    layers.N.attention_norm.weight [hidden]        layers.N.attention.{q,k,v}.weight [heads or KV heads * head_dim, hidden]
    layers.N.mlp_norm.weight [hidden]              layers.N.attention.o.weight [hidden, heads * head_dim]
    layers.N.mlp.{gate,up}.weight [ffn, hidden]    layers.N.mlp.down.weight [hidden, ffn]

With a tied head, `head.weight` is another name of `embedding.weight`. Rows of q and k stand as stored; the config's
`rope_interleaved` says which elements of a head turn together.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.config import CheckpointError, DecoderConfig, llama3_rope_factors
from kernels.gguf_header import GgufHeader, read_gguf_header

GGUF_ARCHITECTURES = ("llama",)
HUGGING_FACE_TYPES = ("llama", "mistral")


class Raw(NamedTuple):
    """A tensor as stored: `kind` is GGML's name of the type (Q4_1, F16, ...), `rows` the bytes [rows, bytes of a row]."""

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

    def tensor(self, name: str) -> Tensor:
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

    def tensor(self, name: str) -> Tensor:
        return _dequantised(self.raw(name)).view(self.shape(name))

    def _stored(self, name: str) -> str:
        return _stored(name, self.config)


class SafetensorsCheckpoint:
    """A Hugging Face folder with weights in float32, float16 or bfloat16."""

    _KINDS = {"F32": "F32", "F16": "F16", "BF16": "BF16"}  # safetensors' names to GGML's

    def __init__(self, path: Path) -> None:
        # Imported where it is needed: a GGUF opens without it.
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
                if piece.get_dtype() not in self._KINDS:
                    raise CheckpointError(
                        f"{shard}: {stored} is stored as {piece.get_dtype()}; plain {', '.join(self._KINDS)} can be read"
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
        stored = self._plain(name)
        kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[stored.dtype]
        rows = stored.shape[0] if stored.dim() > 1 else 1
        return Raw(kind, stored.contiguous().view(torch.uint8).view(rows, -1).numpy())

    def tensor(self, name: str) -> Tensor:
        return self._plain(name).float()

    def _plain(self, name: str) -> Tensor:
        name = _stored(name, self.config)
        plain: Tensor = self._files[name].get_tensor(self._stored_names[name])
        return plain


def _stored(name: str, config: DecoderConfig) -> str:
    return "embedding.weight" if name == "head.weight" and config.tied_head else name


def _dequantised(raw: Raw) -> Tensor:
    """Float32 [rows, elements]; plain types without the gguf package, which takes long to import."""
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
    hidden, ffn, attention, kv = config.hidden, config.ffn, config.heads * config.head_dim, config.kv_heads * config.head_dim
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
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(f"{path} is one part of a split GGUF; merge the parts first (gguf-split --merge)")
    if metadata.get("llama.expert_count", 0):
        raise CheckpointError(f"{path} is a mixture of experts; only dense models are supported")

    def number(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: llama.{key} should be one number, it is {value!r}")
        return value

    heads = number("attention.head_count")
    hidden = number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads if heads else 0)
    if number("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{path} has values of another size than its keys, which is not supported")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{path} lacks token_embd.weight; download it again")
    rotary_dim = number("rope.dimension_count", head_dim)
    return DecoderConfig(
        layers=number("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=number("feed_forward_length"),
        vocabulary=embedding.shape[0],
        context_length=number("context_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_base=number("rope.freq_base", 10_000.0),
        rotary_dim=rotary_dim,
        rope_interleaved=True,
        tied_head="output.weight" not in header.tensors,
        rope_factors=_gguf_rope_factors(path, header, rotary_dim),
    )


def _gguf_rope_factors(path: Path, header: GgufHeader, rotary_dim: int) -> tuple[float, ...] | None:
    kind = header.metadata.get("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise CheckpointError(f"{path} scales its rope by {kind!r}; supported: none, linear, or a rope_freqs tensor")
    stretch = float(header.metadata.get("llama.rope.scaling.factor", 1.0)) if kind == "linear" else 1.0
    tensor = header.tensors.get("rope_freqs.weight")
    if tensor is not None:
        factors = header.file[tensor.start : tensor.start + tensor.size_bytes].view(np.float32)
        return tuple(stretch * float(factor) for factor in factors)
    return (stretch,) * (rotary_dim // 2) if stretch != 1.0 else None


def _hugging_face_config(path: Path) -> DecoderConfig:
    file = path / "config.json"
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is no JSON ({error}); download it again") from error
    model_type = settings.get("model_type")
    if model_type not in HUGGING_FACE_TYPES:
        raise CheckpointError(
            f"{path} is of type {model_type!r}; supported in safetensors: {', '.join(HUGGING_FACE_TYPES)}"
        )
    context_length = _needed(settings, "max_position_embeddings", file)
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if settings.get(key, plain) != plain:
            raise CheckpointError(f"{file}: {key} is {settings[key]!r}, only {plain!r} is supported")
    if settings.get("quantization_config"):
        method = settings["quantization_config"].get("quant_method")
        raise CheckpointError(f"{path} is quantised ({method}); use the plain checkpoint or a GGUF")
    if (settings.get("sliding_window") or context_length) < context_length:
        raise CheckpointError(f"{file}: attention in a sliding window is not supported")
    heads, hidden = _needed(settings, "num_attention_heads", file), _needed(settings, "hidden_size", file)
    head_dim = settings.get("head_dim") or hidden // heads
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
    return DecoderConfig(
        layers=_needed(settings, "num_hidden_layers", file),
        hidden=hidden,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn=_needed(settings, "intermediate_size", file),
        vocabulary=_needed(settings, "vocab_size", file),
        context_length=context_length,
        norm_eps=float(settings.get("rms_norm_eps", 1e-6)),
        rope_base=base,
        rotary_dim=head_dim,
        rope_interleaved=False,
        tied_head=bool(settings.get("tie_word_embeddings", False)),
        rope_factors=_hugging_face_rope_factors(file, rope, base, head_dim),
    )


def _needed(settings: dict[str, Any], key: str, file: Path) -> int:
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file}: {key} should be a positive whole number, it is {value!r}")
    return value


def _hugging_face_rope_factors(
    file: Path, rope: dict[str, Any], base: float, head_dim: int
) -> tuple[float, ...] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * (head_dim // 2)
    if kind == "llama3":
        return llama3_rope_factors(
            base,
            head_dim,
            factor=float(rope["factor"]),
            low_frequency_factor=float(rope["low_freq_factor"]),
            high_frequency_factor=float(rope["high_freq_factor"]),
            original_context_length=int(rope["original_max_position_embeddings"]),
        )
    raise CheckpointError(f"{file}: rope scaling {kind!r} is not supported; supported: default, linear, llama3")


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
