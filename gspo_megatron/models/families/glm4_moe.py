"""GLM-4.5 (arXiv 2508.06471): sigmoid router with a correction bias, shared expert, first layers dense, half of each
head rotated.

Left out: the multi-token-prediction layer behind the last one (load.py refuses or drops its tensors).
"""

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import (
    ATTENTION,
    DENSE,
    EXPERTS,
    MODEL,
    OURS,
    ROUTER,
    STACKED_EXPERTS,
    THEIRS,
    Family,
)
from gspo_megatron.models.operators import merge_gate_up, rename

SHARED = (
    merge_gate_up(
        OURS + "mlp.shared_experts.linear_fc1.weight",
        THEIRS + "mlp.shared_experts.gate_proj.weight",
        THEIRS + "mlp.shared_experts.up_proj.weight",
    ),
    rename(OURS + "mlp.shared_experts.linear_fc2.weight", THEIRS + "mlp.shared_experts.down_proj.weight"),
)
MOE = (*ROUTER, rename(OURS + "mlp.router.expert_bias", THEIRS + "mlp.gate.e_score_correction_bias"), *SHARED)


def sigmoid_router(config: ConfigReader) -> dict:
    """Read the fields of a sigmoid router with a correction bias, of GLM-4.5 and DeepSeek-V3."""
    experts, chosen = config.experts(renormalise=False), config.size("num_experts_per_tok")
    groups, top_groups = config.size("n_group"), config.size("topk_group")
    config.require(
        config.get("norm_topk_prob") and chosen > 1,
        "norm_topk_prob off, or a single expert a token, is not supported with a sigmoid router",
        "Use a model that renormalises.",
    )
    check_groups(config, groups, top_groups, best=2)
    return experts | {
        "renormalise": True,
        "router_score": "sigmoid",
        "router_bias": True,
        "router_groups": groups,
        "router_top_groups": top_groups,
    }


def check_groups(config: ConfigReader, groups: int, top_groups: int, best: int) -> None:
    """Raise ConfigError for groups of experts from which a token cannot choose."""
    experts, chosen = config.experts(renormalise=False)["num_experts"], config.size("num_experts_per_tok")
    sizes = f"n_group {groups}, topk_group {top_groups}, {experts} experts, num_experts_per_tok {chosen}"
    fits = groups == 1 or (
        experts % groups == 0
        and best <= experts // groups
        and top_groups <= groups
        and chosen <= top_groups * (experts // groups)
    )
    config.require(fits, f"{sizes} do not fit together", "Correct config.json.")


def read(config: ConfigReader) -> Architecture:
    moe = config.size("moe_intermediate_size")
    return Architecture(
        family="glm4_moe",
        **read_attention(config),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=moe,
        shared_intermediate_size=moe * config.size("n_shared_experts"),
        moe_layers=config.first_dense(),
        qk_norm="head" if config.get("use_qk_norm") else "none",
        qkv_bias=config.get("attention_bias"),
        router_scaling=config.factor("routed_scaling_factor"),
        **sigmoid_router(config),
    )


FAMILY = Family(read, MODEL, ATTENTION, DENSE, MOE, EXPERTS, MOE, STACKED_EXPERTS)
