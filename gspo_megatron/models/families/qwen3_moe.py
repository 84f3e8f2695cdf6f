"""Qwen3-MoE (arXiv 2505.09388): RMSNorm on each head's query and key, softmax router, no shared expert."""

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import ATTENTION, DENSE, EXPERTS, MODEL, ROUTER, STACKED_EXPERTS, Family


def read(config: ConfigReader) -> Architecture:
    config.refuse("attention_bias")
    config.sliding_window(switch=True)
    return Architecture(
        family="qwen3_moe",
        **read_attention(config),
        **config.experts(config.get("norm_topk_prob")),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=config.size("moe_intermediate_size"),
        moe_layers=config.sparse_steps(),
        qk_norm="head",
    )


FAMILY = Family(read, MODEL, ATTENTION, DENSE, ROUTER, EXPERTS, ROUTER, STACKED_EXPERTS)
