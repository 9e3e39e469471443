"""Tiny random decoders on disk, so that tests need no real model: as GGUF, or the same weights as Hugging Face has."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import save_file

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Tiny:
    """Shape of a tiny model. Widths are multiples of 32, so that every matrix can be quantised in blocks of 32."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 128
    vocabulary: int = 256
    context_length: int = 1024
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True
    seed: int = 0
    family: str = "llama"  # architecture in GGUF, model_type in Hugging Face
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    layer_norm: bool = False
    gated: bool = True
    rotary_dim: int | None = None  # None: head_dim
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    dense_layers: tuple[int, ...] = ()  # without experts all the same
    settings: tuple[tuple[str, object], ...] = ()  # more of config.json; windows and rope of GGUF

    @property
    def gpt_oss(self) -> bool:
        return self.family in ("gpt_oss", "gpt-oss")


def tiny_weights(shape: Tiny) -> dict[str, Floats]:
    """Random weights by GGUF name, q and k in GGUF's row order; scaled so that logits spread like a trained model's.

    Experts' weights are stacked. gpt-oss has biases everywhere, and sinks.
    """
    random = np.random.default_rng(shape.seed)
    attention, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def matrix(outputs: int, inputs: int) -> Floats:
        return (random.standard_normal((outputs, inputs)) * 1.5 / np.sqrt(inputs)).astype(np.float32)

    def norm() -> Floats:
        return random.uniform(0.5, 1.5, shape.hidden).astype(np.float32)

    def mlp(layer: int) -> dict[str, Floats]:
        down = {f"blk.{layer}.ffn_down.weight": matrix(shape.hidden, shape.ffn)}
        gate = {f"blk.{layer}.ffn_gate.weight": matrix(shape.ffn, shape.hidden)} if shape.gated else {}
        return down | gate | {f"blk.{layer}.ffn_up.weight": matrix(shape.ffn, shape.hidden)}

    def mixture(layer: int) -> dict[str, Floats]:
        sizes = {"gate": (shape.expert_ffn, shape.hidden), "up": (shape.expert_ffn, shape.hidden),
                 "down": (shape.hidden, shape.expert_ffn)}
        stacks = {f"blk.{layer}.ffn_{name}_exps.weight": np.stack([matrix(*size) for _ in range(shape.experts)])
                  for name, size in sizes.items()}
        return stacks | {f"blk.{layer}.ffn_gate_inp.weight": matrix(shape.experts, shape.hidden)}

    weights = {"token_embd.weight": matrix(shape.vocabulary, shape.hidden) * np.float32(4)}
    for layer in range(shape.layers):
        weights |= {
            f"blk.{layer}.attn_norm.weight": norm(),
            **(mixture(layer) if shape.experts and layer not in shape.dense_layers else mlp(layer)),
            f"blk.{layer}.ffn_norm.weight": norm(),
            f"blk.{layer}.attn_k.weight": matrix(kv, shape.hidden),
            f"blk.{layer}.attn_output.weight": matrix(shape.hidden, attention),
            f"blk.{layer}.attn_q.weight": matrix(attention, shape.hidden),
            f"blk.{layer}.attn_v.weight": matrix(kv, shape.hidden),
        }
    more = np.random.default_rng((shape.seed, 1))
    widths = {"attn_q": attention, "attn_k": kv, "attn_v": kv, "attn_output": shape.hidden}
    biased = [name for name in widths if (shape.output_bias if name == "attn_output" else shape.qkv_bias)]
    for layer in range(shape.layers):
        for name in biased:
            weights[f"blk.{layer}.{name}.bias"] = more.standard_normal(widths[name]).astype(np.float32)
        for name in ("attn_q_norm", "attn_k_norm") if shape.qk_norm else ():
            weights[f"blk.{layer}.{name}.weight"] = more.uniform(0.5, 1.5, shape.head_dim).astype(np.float32)
        for name in ("attn_norm", "ffn_norm") if shape.layer_norm else ():
            weights[f"blk.{layer}.{name}.bias"] = (more.standard_normal(shape.hidden) * 0.2).astype(np.float32)
    if shape.gpt_oss:
        for layer in range(shape.layers):
            sizes = {"ffn_gate_inp": (), "ffn_gate_exps": (shape.expert_ffn,), "ffn_up_exps": (shape.expert_ffn,),
                     "ffn_down_exps": (shape.hidden,)}
            for name, size in sizes.items():
                weights[f"blk.{layer}.{name}.bias"] = more.standard_normal((shape.experts, *size)).astype(np.float32)
            weights[f"blk.{layer}.attn_sinks.weight"] = more.standard_normal(shape.heads).astype(np.float32) * 2
    weights["output_norm.weight"] = norm()
    if shape.layer_norm:
        weights["output_norm.bias"] = (more.standard_normal(shape.hidden) * 0.2).astype(np.float32)
    if not shape.tied_head:
        weights["output.weight"] = matrix(shape.vocabulary, shape.hidden) * np.float32(4)
    return weights


def write_tiny_gguf(
    path: Path,
    shape: Tiny | None = None,
    *,
    linear: Kind = Kind.Q4_1,
    head: Kind = Kind.Q8_0,
    architecture: str | None = None,
    stored: Mapping[str, tuple[NDArray[np.uint8], Kind]] | None = None,
) -> Path:
    """Write the model of `shape` as GGUF: linears, and embedding and head, in the types given; norms in float32.

    `stored` gives blocks [rows, bytes] to write as they are, by GGUF name.
    """
    shape = shape or Tiny()
    writer = gguf.GGUFWriter(path, architecture or shape.family)
    writer.add_name("tiny")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context_length)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_rope_dimension_count(shape.rotary_dim or shape.head_dim)
    (writer.add_layer_norm_eps if shape.layer_norm else writer.add_layer_norm_rms_eps)(shape.norm_eps)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_per_token)
        writer.add_expert_feed_forward_length(shape.expert_ffn)
    settings = dict(shape.settings)
    if shape.gpt_oss:
        rope = settings["rope_scaling"]
        assert isinstance(rope, dict)
        writer.add_sliding_window(settings["sliding_window"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"<{token}>" for token in range(shape.vocabulary)])
    writer.add_token_types([1] * shape.vocabulary)
    for name, weight in tiny_weights(shape).items():
        plain = weight.ndim == 1 or "ffn_gate_inp" in name or name.endswith(".bias")  # as converters leave them
        kind = Kind.F32 if plain else head if name in ("token_embd.weight", "output.weight") else linear
        blocks, kind = (stored or {}).get(name) or (gguf.quants.quantize(weight, kind), kind)
        name = name.replace("ffn_norm", "post_attention_norm") if shape.gpt_oss else name
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_tiny_folder(folder: Path, shape: Tiny | None = None) -> Path:
    """Write the unquantised weights of `shape`: config.json and safetensors, q and k in halves order."""
    shape = shape or Tiny()
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [f"{shape.family.capitalize()}ForCausalLM"],
        "model_type": shape.family,
        "hidden_act": "silu" if shape.gated else "relu2",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.context_length,
        "norm_eps" if shape.layer_norm else "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_base,
        "tie_word_embeddings": shape.tied_head,
    }
    if shape.gpt_oss:
        config |= {
            "num_local_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "intermediate_size": shape.expert_ffn,
            "attention_bias": True,
        }
    elif shape.experts:
        config |= {
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.experts_per_token,
            "moe_intermediate_size": shape.expert_ffn,
            "mlp_only_layers": list(shape.dense_layers),
        }
    config |= dict(shape.settings)
    if shape.rotary_dim is not None:
        config["partial_rotary_factor"] = shape.rotary_dim / shape.head_dim
    (folder / "config.json").write_text(json.dumps(config))
    renamed: dict[str, NDArray[np.generic]] = _packed(shape) if shape.gpt_oss else {}
    for name, weight in tiny_weights(shape).items():
        if shape.gpt_oss and "_exps" in name:
            continue
        theirs = _hugging_face_name(name, shape)
        if "*" in theirs:
            renamed |= {theirs.replace("*", str(expert)): each for expert, each in enumerate(weight)}
        else:
            renamed[theirs] = _stored(name, weight, shape)
    save_file({name: np.ascontiguousarray(weight) for name, weight in renamed.items()}, folder / "model.safetensors")
    return folder


def _packed(shape: Tiny) -> dict[str, NDArray[np.generic]]:
    """gpt-oss's experts as its folders have them: in MXFP4 if the settings say so."""
    weights, packed = tiny_weights(shape), "quantization_config" in dict(shape.settings)
    found: dict[str, NDArray[np.generic]] = {}
    for layer in range(shape.layers):
        def of(name: str, kind: str, layer: int = layer) -> Floats:
            return weights[f"blk.{layer}.ffn_{name}_exps.{kind}"]

        def turned(kind: str) -> Floats:  # rows of gate and up take turns
            gate, up = of("gate", kind), of("up", kind)
            return np.stack((gate, up), 2).reshape(shape.experts, -1, *gate.shape[2:])

        at = f"model.layers.{layer}.mlp.experts"
        for name, matrices, bias in (("gate_up_proj", turned("weight"), turned("bias")),
                                     ("down_proj", of("down", "weight"), of("down", "bias"))):
            found[f"{at}.{name}_bias"] = bias
            if not packed:
                found[f"{at}.{name}"] = matrices.swapaxes(1, 2)
                continue
            blocks = gguf.quants.quantize(matrices, Kind.MXFP4).reshape(*matrices.shape[:2], -1, 17)
            codes = np.concatenate((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), -1)
            found[f"{at}.{name}_scales"] = blocks[..., 0]
            found[f"{at}.{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
    return found


def _stored(name: str, weight: Floats, shape: Tiny) -> Floats:
    """Rows of q and k from adjacent pairs, as a Llama's GGUF has them, to halves; layer norms less 1."""
    if shape.layer_norm and name.endswith("norm.weight"):
        return weight - np.float32(1)
    if shape.family != "llama" or (".attn_q." not in name and ".attn_k." not in name):
        return weight
    pairs = weight.reshape(-1, shape.head_dim // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _hugging_face_name(name: str, shape: Tiny) -> str:
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output_norm.bias": "model.norm.bias",
        "output.weight": "lm_head.weight",
    }
    inside = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_gate_inp": "mlp.router" if shape.gpt_oss else "mlp.gate",
        "ffn_gate_exps": "mlp.experts.*.gate_proj",
        "ffn_up_exps": "mlp.experts.*.up_proj",
        "ffn_down_exps": "mlp.experts.*.down_proj",
    }
    if name in outside:
        return outside[name]
    _, layer, kind, which = name.split(".")
    if kind == "attn_sinks":
        return f"model.layers.{layer}.self_attn.sinks"
    return f"model.layers.{layer}.{inside[kind]}.{which}"
