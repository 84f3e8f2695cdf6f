"""OLMoE (arXiv 2409.02060): RMSNorm over the query (and the key) of all heads together, experts in every layer."""

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import ATTENTION, EXPERTS, MODEL, ROUTER, STACKED_EXPERTS, Family


def read(config: ConfigReader) -> Architecture:
    config.refuse("attention_bias", "sliding_window")  # a window is in use with some of transformers' attentions
    clip = config.get("clip_qkv")
    config.require(clip is None, f"clip_qkv = {clip!r} is not supported", "Use a model without it.")
    return Architecture(
        family="olmoe",
        **read_attention(config),
        **config.experts(config.get("norm_topk_prob")),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=config.size("intermediate_size"),
        moe_layers=(1,) * config.size("num_hidden_layers"),
        qk_norm="all_heads",
    )


FAMILY = Family(
    read, MODEL, ATTENTION, moe=ROUTER, experts=EXPERTS, stacked_moe=ROUTER, stacked_experts=STACKED_EXPERTS
)
