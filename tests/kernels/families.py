"""One tiny random checkpoint for each thing in which the families of decoders differ."""

from tests.kernels.tiny import Tiny

CONTEXT = 192
_ORIGINAL = 64

_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": _ORIGINAL,
}

FAMILIES: dict[str, Tiny] = {
    "llama": Tiny(context_length=CONTEXT, tied_head=False),
    "llama_biased": Tiny(
        context_length=CONTEXT, qkv_bias=True, output_bias=True, settings=(("attention_bias", True),), seed=1
    ),
    "llama_3": Tiny(
        context_length=CONTEXT,
        rope_base=500_000.0,
        seed=2,
        settings=(
            (
                "rope_scaling",
                {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": _ORIGINAL,
                },
            ),
        ),
    ),
    "llama_linear": Tiny(
        context_length=CONTEXT,
        tied_head=False,
        seed=3,
        settings=(("rope_scaling", {"rope_type": "linear", "factor": 4.0}),),
    ),
    "llama_dynamic": Tiny(
        context_length=CONTEXT, seed=4, settings=(("rope_scaling", {"rope_type": "dynamic", "factor": 4.0}),)
    ),
    "llama_yarn": Tiny(
        context_length=CONTEXT,
        head_dim=32,
        seed=5,
        settings=(
            (
                "rope_scaling",
                {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": _ORIGINAL},
            ),
        ),
    ),
    "mistral": Tiny(context_length=CONTEXT, family="mistral", seed=6, settings=(("sliding_window", 24),)),
    "qwen2": Tiny(
        context_length=CONTEXT, family="qwen2", qkv_bias=True, tied_head=False, rope_base=1_000_000.0, seed=7
    ),
    "qwen2_windowed": Tiny(
        layers=3,
        context_length=CONTEXT,
        family="qwen2",
        qkv_bias=True,
        tied_head=False,
        seed=8,
        settings=(("use_sliding_window", True), ("sliding_window", 20), ("max_window_layers", 1)),
    ),
    "qwen3": Tiny(
        context_length=CONTEXT,
        family="qwen3",
        qk_norm=True,
        head_dim=32,
        tied_head=False,
        rope_base=1_000_000.0,
        seed=9,
    ),
    "nemotron": Tiny(
        context_length=CONTEXT,
        family="nemotron",
        layer_norm=True,
        gated=False,
        head_dim=32,
        rotary_dim=16,
        tied_head=False,
        seed=10,
    ),
    "nemotron_biased": Tiny(
        context_length=CONTEXT,
        family="nemotron",
        layer_norm=True,
        gated=False,
        rotary_dim=4,
        qkv_bias=True,
        output_bias=True,
        settings=(("attention_bias", True),),
        seed=11,
    ),
    "qwen3_moe": Tiny(
        context_length=CONTEXT,
        family="qwen3_moe",
        qk_norm=True,
        head_dim=32,
        tied_head=False,
        experts=8,
        experts_per_token=3,
        expert_ffn=64,
        seed=10,
        settings=(("norm_topk_prob", True),),
    ),
    "qwen3_moe_mixed": Tiny(
        layers=4,
        context_length=CONTEXT,
        family="qwen3_moe",
        qk_norm=True,
        tied_head=False,
        experts=20,
        experts_per_token=2,
        expert_ffn=32,
        dense_layers=(0, 2, 3),
        seed=11,
        settings=(
            ("norm_topk_prob", False),
            ("decoder_sparse_step", 2),
            ("mlp_only_layers", [3]),
            ("use_sliding_window", True),
            ("sliding_window", 20),
            ("max_window_layers", 4),
        ),
    ),
    "gpt_oss": Tiny(
        layers=3,
        context_length=CONTEXT,
        family="gpt_oss",
        head_dim=32,
        qkv_bias=True,
        output_bias=True,
        tied_head=False,
        rope_base=150_000.0,
        experts=8,
        experts_per_token=3,
        expert_ffn=64,
        seed=12,
        settings=(
            ("rope_scaling", _GPT_OSS_ROPE),
            ("sliding_window", 24),
            ("swiglu_limit", 1.5),
            ("swiglu_alpha", 1.25),
            ("layer_types", ["full_attention", "sliding_attention", "sliding_attention"]),
        ),
    ),
    "gpt_oss_mxfp4": Tiny(
        context_length=CONTEXT,
        family="gpt_oss",
        qkv_bias=True,
        output_bias=True,
        tied_head=False,
        rope_base=150_000.0,
        experts=20,
        experts_per_token=4,
        expert_ffn=32,
        seed=13,
        settings=(
            ("rope_scaling", _GPT_OSS_ROPE),
            ("sliding_window", 20),
            ("swiglu_limit", 7.0),
            (
                "quantization_config",
                {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
            ),
        ),
    ),
}
