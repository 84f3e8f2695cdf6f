"""Llama, dense (arXiv 2302.13971); SmolLM2 has its layout, and Llama 3 too."""

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import ATTENTION, DENSE, MODEL, Family


def read(config: ConfigReader) -> Architecture:
    config.refuse("attention_bias", "mlp_bias")
    return Architecture(
        family="llama",
        **read_attention(config),
        intermediate_size=config.size("intermediate_size"),
        moe_layers=(0,) * config.size("num_hidden_layers"),
    )


FAMILY = Family(read, MODEL, ATTENTION, DENSE)
