"""DeepSeek-V2 (arXiv 2405.04434) and V3 (arXiv 2412.19437): latent attention, shared experts, first layers dense. V2
has a softmax router, V3 a sigmoid one with a correction bias; both may limit a token to its best groups of experts.

Left out: V3's layers that predict further tokens (load.py refuses or drops them).
"""

from gspo_megatron.models.architecture import Architecture, LatentAttention
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import DENSE, EXPERTS, MODEL, OURS, ROUTER, STACKED_EXPERTS, THEIRS, Family
from gspo_megatron.models.families.glm4_moe import MOE as MOE_WITH_BIAS
from gspo_megatron.models.families.glm4_moe import SHARED, check_groups, sigmoid_router
from gspo_megatron.models.operators import rename

_OURS, _THEIRS = OURS + "self_attention.", THEIRS + "self_attn."
ATTENTION = (
    rename(OURS + "input_layernorm.weight", THEIRS + "input_layernorm.weight"),
    rename(_OURS + "linear_q_proj.weight", _THEIRS + "q_proj.weight", when="has_whole_query"),
    rename(_OURS + "linear_q_down_proj.weight", _THEIRS + "q_a_proj.weight", when="has_query_latent"),
    rename(_OURS + "q_layernorm.weight", _THEIRS + "q_a_layernorm.weight", when="has_query_latent"),
    rename(_OURS + "linear_q_up_proj.weight", _THEIRS + "q_b_proj.weight", when="has_query_latent"),
    rename(_OURS + "linear_kv_down_proj.weight", _THEIRS + "kv_a_proj_with_mqa.weight"),
    rename(_OURS + "kv_layernorm.weight", _THEIRS + "kv_a_layernorm.weight"),
    rename(_OURS + "linear_kv_up_proj.weight", _THEIRS + "kv_b_proj.weight"),
    rename(_OURS + "linear_proj.weight", _THEIRS + "o_proj.weight"),
    rename(OURS + "pre_mlp_layernorm.weight", THEIRS + "post_attention_layernorm.weight"),
)


def _common(config: ConfigReader) -> dict:
    config.refuse("attention_bias", "mlp_bias")
    # Two fields of DeepSeek's own code, of which transformers' class reads at most one.
    interleave, every = config.hf.get("rope_interleave", True), config.hf.get("moe_layer_freq", 1)
    config.require(interleave is True, "rope_interleave off is not supported", "Use a published model.")
    config.require(every == 1, "moe_layer_freq other than 1 is not supported", "Use 1.")
    moe, attention = config.size("moe_intermediate_size"), read_attention(config, scalings=("yarn",))
    heads, groups = attention["num_attention_heads"], attention["num_key_value_heads"]
    config.require(
        heads == groups,
        f"{config.said('num_key_value_heads')} {groups} is not num_attention_heads {heads}, and latent attention has "
        "a key for each head",
        "Correct num_key_value_heads.",
    )
    config.require(
        config.size("qk_rope_head_dim") % 2 == 0,
        f"qk_rope_head_dim {config.size('qk_rope_head_dim')} dimensions are rotated, which are no pairs",
        "Correct qk_rope_head_dim.",
    )
    latent = LatentAttention(
        q_lora_rank=config.size("q_lora_rank") if config.get("q_lora_rank") is not None else None,
        kv_lora_rank=config.size("kv_lora_rank"),
        qk_nope_head_dim=config.size("qk_nope_head_dim"),
        qk_rope_head_dim=config.size("qk_rope_head_dim"),
        v_head_dim=config.size("v_head_dim"),
    )
    return {
        **attention,
        "latent": latent,
        "intermediate_size": config.size("intermediate_size"),
        "moe_intermediate_size": moe,
        "shared_intermediate_size": moe * config.size("n_shared_experts"),
        "moe_layers": config.first_dense(),
        "router_scaling": config.factor("routed_scaling_factor"),
    }


def read_v2(config: ConfigReader) -> Architecture:
    method = config.get("topk_method")
    config.require(
        method in ("greedy", "group_limited_greedy"),
        f"topk_method {method!r} is not supported",
        "Use greedy or group_limited_greedy.",
    )
    is_limited = method == "group_limited_greedy"
    groups, top_groups = (config.size("n_group"), config.size("topk_group")) if is_limited else (1, 1)
    check_groups(config, groups, top_groups, best=1)
    return Architecture(
        family="deepseek_v2",
        **_common(config),
        **config.experts(renormalise=False),
        router_groups=groups,
        router_top_groups=top_groups,
        router_group_best=1,
    )


def read_v3(config: ConfigReader) -> Architecture:
    return Architecture(family="deepseek_v3", **_common(config), **sigmoid_router(config))


V2_MOE = (*ROUTER, *SHARED)
V2 = Family(read_v2, MODEL, ATTENTION, DENSE, V2_MOE, EXPERTS, V2_MOE, STACKED_EXPERTS)
V3 = Family(read_v3, MODEL, ATTENTION, DENSE, MOE_WITH_BIAS, EXPERTS, MOE_WITH_BIAS, STACKED_EXPERTS)
