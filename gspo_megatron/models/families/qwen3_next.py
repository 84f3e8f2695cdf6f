"""Qwen3-Next (Qwen's release notes of September 2025): three layers of Gated DeltaNet (arXiv 2412.06464) to one of
attention, whose output is gated; zero-centred norms; a shared expert behind a sigmoid gate.

Published tensors of the linear layers have their rows by key head. Left out: layers that predict further tokens
(load.py refuses or drops them).
"""

from gspo_megatron.models.architecture import Architecture, LinearAttention
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import DENSE, EXPERTS, MODEL, OURS, STACKED_EXPERTS, THEIRS, Family
from gspo_megatron.models.families.qwen2_moe import MOE
from gspo_megatron.models.operators import convolution, merge_delta_net, merge_gated_qkv, rename

LAYER = (
    rename(OURS + "input_layernorm.weight", THEIRS + "input_layernorm.weight"),
    rename(OURS + "pre_mlp_layernorm.weight", THEIRS + "post_attention_layernorm.weight"),
)
_OURS, _THEIRS = OURS + "self_attention.", THEIRS + "self_attn."
SOFTMAX = (
    merge_gated_qkv(
        _OURS + "linear_qkv.weight", _THEIRS + "q_proj.weight", _THEIRS + "k_proj.weight", _THEIRS + "v_proj.weight"
    ),
    rename(_OURS + "q_layernorm.weight", _THEIRS + "q_norm.weight"),
    rename(_OURS + "k_layernorm.weight", _THEIRS + "k_norm.weight"),
    rename(_OURS + "linear_proj.weight", _THEIRS + "o_proj.weight"),
)
_LINEAR = THEIRS + "linear_attn."
LINEAR = (
    merge_delta_net(_OURS + "in_proj.weight", _LINEAR + "in_proj_qkvz.weight", _LINEAR + "in_proj_ba.weight"),
    convolution(_OURS + "conv1d.weight", _LINEAR + "conv1d.weight"),
    rename(_OURS + "dt_bias", _LINEAR + "dt_bias"),
    rename(_OURS + "A_log", _LINEAR + "A_log"),
    rename(_OURS + "out_norm.weight", _LINEAR + "norm.weight"),
    rename(_OURS + "out_proj.weight", _LINEAR + "out_proj.weight"),
)


def _linear_layers(config: ConfigReader) -> tuple[int, ...]:
    layers, interval = config.size("num_hidden_layers"), config.get("full_attention_interval")
    config.require(interval > 0, f"full_attention_interval is {interval}", "Give 1 or more.")
    default = ["full_attention" if layer % interval == 0 else "linear_attention" for layer in range(1, layers + 1)]
    types = config.get("layer_types") or default
    known = set(types) <= {"linear_attention", "full_attention"} and len(types) == layers
    config.require(
        known,
        f"layer_types is {types!r}, not linear_attention or full_attention for each layer",
        "Correct it in that file.",
    )
    return tuple(int(kind == "linear_attention") for kind in types)


def _linear(config: ConfigReader) -> LinearAttention:
    linear = LinearAttention(
        num_key_heads=config.size("linear_num_key_heads"),
        num_value_heads=config.size("linear_num_value_heads"),
        key_head_dim=config.size("linear_key_head_dim"),
        value_head_dim=config.size("linear_value_head_dim"),
        kernel=config.size("linear_conv_kernel_dim"),
    )
    keys, values = linear.num_key_heads, linear.num_value_heads
    config.require(
        values % keys == 0,
        f"linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}",
        "Correct one of the two.",
    )
    return linear


def read(config: ConfigReader) -> Architecture:
    config.refuse("attention_bias")
    layers = _linear_layers(config)
    return Architecture(
        family="qwen3_next",
        **read_attention(config),
        **config.experts(config.get("norm_topk_prob")),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=config.size("moe_intermediate_size"),
        shared_intermediate_size=config.size("shared_expert_intermediate_size"),
        shared_gate=True,
        moe_layers=config.sparse_steps(),
        qk_norm="head",
        output_gate=True,
        zero_centred_norms=True,
        linear=_linear(config) if any(layers) else None,
        linear_layers=layers,
    )


FAMILY = Family(read, MODEL, LAYER, DENSE, MOE, EXPERTS, MOE, STACKED_EXPERTS, softmax=SOFTMAX, linear=LINEAR)
