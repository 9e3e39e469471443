"""The names of a checkpoint's tensors: ours, GGUF's and Hugging Face's, and the shapes that a config demands.

Rule: a name that is not known here stays as it is, and `check_shapes` refuses it: a tensor that the decoder would
ignore means that the checkpoint is of another family.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from kernels.config import CheckpointError, DecoderConfig

_TENSORS_PER_LAYER = 8
_EVERY_EXPERT = ".experts.*."  # in the name of a stack of all experts' tensors

_OUTSIDE = {
    "token_embd.weight": "embedding.weight",
    "output_norm.weight": "norm.weight",
    "output_norm.bias": "norm.bias",
    "output.weight": "head.weight",
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.weight",
    "model.norm.bias": "norm.bias",
    "lm_head.weight": "head.weight",
}
_INSIDE = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.o",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "attn_sinks": "attention.sinks",
    "ffn_norm": "mlp_norm",
    "post_attention_norm": "mlp_norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.down",
    "ffn_gate_inp": "router",
    "ffn_gate_exps": "experts.*.gate",
    "ffn_up_exps": "experts.*.up",
    "ffn_down_exps": "experts.*.down",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "self_attn.sinks": "attention.sinks",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
    "mlp.gate": "router",
    "mlp.router": "router",
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")


def from_gguf(name: str) -> str:
    """Our name; an unknown one stays, and is refused with the others."""
    return _ours(name, "blk.")


def from_hugging_face(name: str) -> str:
    return _ours(name + ".weight" if name.endswith(".sinks") else name, "model.layers.")


def _ours(name: str, prefix: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, rest = name.removeprefix(prefix).partition(".")
    inside, _, kind = rest.rpartition(".")
    expert = _EXPERT.fullmatch(inside)
    ours = f"experts.{expert[1]}.{expert[2]}" if expert else _INSIDE.get(inside)
    if not name.startswith(prefix) or kind not in ("weight", "bias") or ours is None:
        return name
    return f"layers.{layer}.{ours}.{kind}"


def experts_of(name: str, count: int) -> list[str] | None:
    """The names of each expert's tensor in a stack of `count`; None: `name` is of no stack."""
    if _EVERY_EXPERT not in name:
        return None
    return [name.replace("*", str(expert)) for expert in range(count)]


def expected_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this config holds."""
    hidden, ffn = config.hidden, config.ffn
    attention, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config.vocabulary, hidden), "norm.weight": (hidden,)}
    if config.layer_norm:
        shapes["norm.bias"] = (hidden,)
    if not config.tied_head:
        shapes["head.weight"] = (config.head_size, hidden)
    for layer in range(config.layers):
        inside = {
            "attention_norm": (hidden,),
            "attention.q": (attention, hidden),
            "attention.k": (kv, hidden),
            "attention.v": (kv, hidden),
            "attention.o": (hidden, attention),
            "mlp_norm": (hidden,),
        }
        if (experts := config.experts) and config.is_mixture(layer):
            inside["router"] = (experts.count, hidden)
            for expert in range(experts.count):
                inside |= _mlp(f"experts.{expert}", hidden, experts.ffn, config.gated)
        else:
            inside |= _mlp("mlp", hidden, ffn, config.gated)
        if config.sinks:
            inside["attention.sinks"] = (config.heads,)
        if config.qk_norm:
            inside |= {"attention.q_norm": (config.head_dim,), "attention.k_norm": (config.head_dim,)}
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in inside.items()}
        biased = ["attention.q", "attention.k", "attention.v"] if config.qkv_bias else []
        biased += ["attention.o"] if config.output_bias else []
        biased += ["attention_norm", "mlp_norm"] if config.layer_norm else []
        if experts and experts.biased:
            biased += [name for name in inside if name == "router" or name.startswith("experts.")]
        shapes |= {f"layers.{layer}.{name}.bias": inside[name][:1] for name in biased}
    return shapes


def _mlp(name: str, hidden: int, ffn: int, gated: bool) -> dict[str, tuple[int, ...]]:
    gate = {f"{name}.gate": (ffn, hidden)} if gated else {}
    return gate | {f"{name}.up": (ffn, hidden), f"{name}.down": (hidden, ffn)}


def check_shapes(path: Path, config: DecoderConfig, found: dict[str, tuple[int, ...]]) -> None:
    if config.layers * _TENSORS_PER_LAYER > len(found):
        raise CheckpointError(
            f"{path} announces {config.layers} layers but holds {len(found)} tensors; download it again"
        )
    if config.experts is not None:
        mixtures = sum(map(config.is_mixture, range(config.layers)))
        if mixtures * config.experts.count > len(found):
            raise CheckpointError(
                f"{path} announces {mixtures} layers of {config.experts.count} experts but holds {len(found)} tensors; "
                "download it again"
            )
    expected = expected_shapes(config)
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing:
        raise CheckpointError(f"{path} lacks {some(missing)}; download it again")
    if unknown:
        raise CheckpointError(
            f"{path} holds {some(unknown)}, which a model of its configuration has not; use another checkpoint"
        )
    wrong = [f"{name} {found[name]}, not {shape}" for name, shape in expected.items() if found[name] != shape]
    if wrong:
        raise CheckpointError(f"{path}: shapes contradict the configuration: {some(wrong)}")


def some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")
