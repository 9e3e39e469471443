"""A decoder's tensors and configuration in Hugging Face's words, for checkpoints that are written here.

Dense decoders with RMS norms and gated MLPs: llama, mistral, qwen2, qwen3.
"""

import torch
from torch import Tensor

from kernels.config import DecoderConfig

MATRICES = {
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
NORMS = {
    "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
}


def settings(config: DecoderConfig) -> dict[str, object]:
    """What config.json says of a dense decoder whose rope is not scaled."""
    family = ("qwen3" if config.qk_norm else "mistral" if config.windows is not None and not config.qkv_bias
              else "qwen2" if config.qkv_bias and not config.output_bias else "llama")
    said: dict[str, object] = {
        "model_type": family, "hidden_act": "silu", "hidden_size": config.hidden, "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "head_dim": config.head_dim, "vocab_size": config.vocabulary,
        "max_position_embeddings": config.context_length, "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base, "tie_word_embeddings": config.tied_head, "attention_bias": config.output_bias,
    }
    if config.windows is not None and any(config.windows):
        said |= {"sliding_window": max(config.windows), "use_sliding_window": True,
                 "layer_types": ["sliding_attention" if window else "full_attention" for window in config.windows]}
    return said


def halves(weight: Tensor, name: str, config: DecoderConfig) -> Tensor:
    """Rows of q and k in the order that safetensors have: element i of a head turns with i + half."""
    if name not in ("attention.q", "attention.k") or not config.rope_interleaved:
        return weight
    heads = weight.reshape(-1, config.head_dim, *weight.shape[1:])
    turning, rest = heads[:, :config.rotary_dim], heads[:, config.rotary_dim:]
    return torch.cat((turning[:, 0::2], turning[:, 1::2], rest), 1).reshape(weight.shape)
