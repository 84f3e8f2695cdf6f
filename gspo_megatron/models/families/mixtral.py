"""Mixtral (arXiv 2401.04088): experts in every layer, weights of the chosen ones add up to 1."""

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import ATTENTION, MODEL, OURS, ROUTER, STACKED_EXPERTS, THEIRS, Family
from gspo_megatron.models.operators import merge_gate_up, rename

MOE = (rename(OURS + "mlp.router.weight", THEIRS + "block_sparse_moe.gate.weight"),)
EXPERTS = (
    merge_gate_up(
        OURS + "mlp.experts.{expert}.linear_fc1.weight",
        THEIRS + "block_sparse_moe.experts.{expert}.w1.weight",
        THEIRS + "block_sparse_moe.experts.{expert}.w3.weight",
    ),
    rename(OURS + "mlp.experts.{expert}.linear_fc2.weight", THEIRS + "block_sparse_moe.experts.{expert}.w2.weight"),
)


def read(config: ConfigReader) -> Architecture:
    config.refuse("router_jitter_noise")
    config.sliding_window(switch=False)
    return Architecture(
        family="mixtral",
        **read_attention(config),
        **config.experts(renormalise=True),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=config.size("intermediate_size"),
        moe_layers=(1,) * config.size("num_hidden_layers"),
    )


FAMILY = Family(read, MODEL, ATTENTION, moe=MOE, experts=EXPERTS, stacked_moe=ROUTER, stacked_experts=STACKED_EXPERTS)
