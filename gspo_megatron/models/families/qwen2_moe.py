"""Qwen2-MoE (arXiv 2407.10671): biases on query, key and value; a shared expert behind a sigmoid gate."""

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

MOE = (
    *ROUTER,
    merge_gate_up(
        OURS + "mlp.shared_experts.linear_fc1.weight",
        THEIRS + "mlp.shared_expert.gate_proj.weight",
        THEIRS + "mlp.shared_expert.up_proj.weight",
    ),
    rename(OURS + "mlp.shared_experts.linear_fc2.weight", THEIRS + "mlp.shared_expert.down_proj.weight"),
    rename(OURS + "mlp.shared_experts.gate_weight", THEIRS + "mlp.shared_expert_gate.weight"),
)


def read(config: ConfigReader) -> Architecture:
    config.full_attention()
    config.sliding_window(switch=True)
    return Architecture(
        family="qwen2_moe",
        **read_attention(config),
        **config.experts(config.get("norm_topk_prob")),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=config.size("moe_intermediate_size"),
        shared_intermediate_size=config.size("shared_expert_intermediate_size"),
        shared_gate=True,
        moe_layers=config.sparse_steps(),
        qkv_bias=config.get("qkv_bias"),
    )


FAMILY = Family(read, MODEL, ATTENTION, DENSE, MOE, EXPERTS, MOE, STACKED_EXPERTS)
