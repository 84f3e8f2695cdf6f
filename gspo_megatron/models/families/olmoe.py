"""OLMoE (arXiv 2409.02060): RMSNorm over the query (and the key) of all heads together, experts in every layer."""

from gspo_megatron.models.architecture import Architecture, ConfigReader
from gspo_megatron.models.families.common import ATTENTION, EXPERTS, MODEL, ROUTER, STACKED_EXPERTS, Family


def read(config: ConfigReader) -> Architecture:
    config.refuse("attention_bias", "clip_qkv")
    return Architecture(
        family="olmoe",
        **config.attention(),
        **config.experts(),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=config.size("intermediate_size"),
        moe_layers=(1,) * config.size("num_hidden_layers"),
        qk_norm="all_heads",
        renormalise=bool(config.get("norm_topk_prob", False)),
    )


FAMILY = Family(
    read, MODEL, ATTENTION, moe=ROUTER, experts=EXPERTS, stacked_moe=ROUTER, stacked_experts=STACKED_EXPERTS
)
