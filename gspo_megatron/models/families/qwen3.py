"""Qwen3, dense (arXiv 2505.09388): RMSNorm on each head's query and key."""

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import ATTENTION, DENSE, MODEL, Family


def read(config: ConfigReader) -> Architecture:
    config.refuse("attention_bias")
    config.full_attention()
    config.sliding_window(switch=True)
    return Architecture(
        family="qwen3",
        **read_attention(config),
        intermediate_size=config.size("intermediate_size"),
        moe_layers=(0,) * config.size("num_hidden_layers"),
        qk_norm="head",
    )


FAMILY = Family(read, MODEL, ATTENTION, DENSE)
