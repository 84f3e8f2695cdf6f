"""What a config.json means that leaves a field out: the value of transformers' own class, which differs by family.

A literal table, because importing those classes imports torch; tests/models/test_defaults.py compares every entry with
them (transformers 5.23). What is not in a family's row has no default that makes sense: sizes of tensors. ConfigReader
refuses a file that lacks one.

Left out: fields that only training with dropout or an auxiliary loss reads, and token ids, which recipe/hf_config.py
reads.
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "head_dim": None,  # hidden_size / num_attention_heads
    "num_key_value_heads": None,  # num_attention_heads
    "attention_bias": False,
    "rope_parameters": None,
}
_QWEN_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": None}
_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_GPT_OSS_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": _COMMON | _QWEN_MOE | _WINDOW | {
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "num_experts_per_tok": 8, "norm_topk_prob": False,
    },
    "qwen3_next": _COMMON | _QWEN_MOE | {
        "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768, "num_experts_per_tok": 10,
        "norm_topk_prob": True, "layer_types": None, "full_attention_interval": 4, "partial_rotary_factor": 0.25,
    },
    "qwen2_moe": _COMMON | _QWEN_MOE | _WINDOW | {
        "num_key_value_heads": 16, "max_position_embeddings": 32768, "num_experts_per_tok": 4, "norm_topk_prob": False,
        "qkv_bias": True, "layer_types": None,
    },
    "mixtral": _COMMON | {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "num_experts_per_tok": 2, "sliding_window": None, "router_jitter_noise": 0.0,
    },
    "olmoe": _COMMON | {
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "clip_qkv": None,
    },
    "glm4_moe": _COMMON | {
        "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "use_qk_norm": False, "partial_rotary_factor": 0.5,
    },
    "deepseek_v2": _COMMON | {
        "max_position_embeddings": 2048, "mlp_bias": False, "routed_scaling_factor": 1.0, "n_group": None,
        "topk_group": None, "first_k_dense_replace": 0, "topk_method": "greedy",
    },
    "deepseek_v3": _COMMON | {
        "num_key_value_heads": 128, "max_position_embeddings": 4096, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4, "first_k_dense_replace": 3,
        "rope_interleave": True,
    },
    "gpt_oss": _COMMON | {
        "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0, "num_experts_per_tok": 4, "sliding_window": 128, "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0, "layer_types": None, "attention_bias": True, "rope_parameters": _GPT_OSS_ROPE,
    },
    "qwen3": _COMMON | _WINDOW | {
        "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "layer_types": None,
    },
    "llama": _COMMON | {"max_position_embeddings": 2048, "mlp_bias": False},
}  # fmt: skip

# Where transformers takes null for an answer of its own. Elsewhere it refuses the file, and so do we.
NULLABLE: dict[str, frozenset[str]] = {
    "qwen3_moe": frozenset({"head_dim", "sliding_window", "mlp_only_layers", "rope_parameters"}),
    "qwen3_next": frozenset({"mlp_only_layers", "layer_types", "rope_parameters"}),
    "qwen2_moe": frozenset({"num_key_value_heads", "head_dim", "sliding_window", "mlp_only_layers", "layer_types",
                            "rope_parameters"}),
    "mixtral": frozenset({"head_dim", "sliding_window", "rope_parameters"}),
    "olmoe": frozenset({"num_key_value_heads", "head_dim", "clip_qkv", "rope_parameters"}),
    "glm4_moe": frozenset({"head_dim", "rope_parameters"}),
    "deepseek_v2": frozenset({"num_key_value_heads", "head_dim", "n_group", "topk_group", "q_lora_rank",
                              "rope_parameters"}),
    "deepseek_v3": frozenset({"num_key_value_heads", "head_dim", "q_lora_rank", "rope_parameters"}),
    "gpt_oss": frozenset({"layer_types", "rope_parameters"}),
    "qwen3": frozenset({"num_key_value_heads", "sliding_window", "layer_types", "rope_parameters"}),
    "llama": frozenset({"num_key_value_heads", "head_dim", "rope_parameters"}),
}  # fmt: skip

# Names under which a family's class knows the number of its experts; the first is its field.
EXPERT_NAMES: dict[str, tuple[str, ...]] = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "qwen3_next": ("num_experts",),
    "qwen2_moe": ("num_experts",),
    "mixtral": ("num_local_experts", "num_experts"),
    "olmoe": ("num_experts", "num_local_experts"),
    "glm4_moe": ("n_routed_experts", "num_local_experts"),
    "deepseek_v2": ("n_routed_experts", "num_experts"),
    "deepseek_v3": ("n_routed_experts", "num_local_experts"),
    "gpt_oss": ("num_local_experts", "num_experts"),
}

# What a field must be where it is neither absent nor null; a size is a whole number above 0.
KINDS: dict[str, type] = {
    "hidden_act": str, "rms_norm_eps": float, "rope_theta": float, "tie_word_embeddings": bool,
    "initializer_range": float, "attention_bias": bool, "rope_parameters": dict, "rope_scaling": dict,
    "decoder_sparse_step": int, "mlp_only_layers": list, "use_sliding_window": bool, "sliding_window": int,
    "norm_topk_prob": bool, "layer_types": list, "full_attention_interval": int, "partial_rotary_factor": float,
    "qkv_bias": bool, "router_jitter_noise": float, "clip_qkv": float, "routed_scaling_factor": float, "n_group": int,
    "topk_group": int, "first_k_dense_replace": int, "use_qk_norm": bool, "mlp_bias": bool, "topk_method": str,
    "rope_interleave": bool, "swiglu_alpha": float, "swiglu_limit": float,
}  # fmt: skip
