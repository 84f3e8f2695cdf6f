"""FAMILIES: model_type of a config.json -> how that family's config and tensors are read. Imports no torch.

Left out, and refused by name: everything that is not a decoder of text.
"""

from gspo_megatron.errors import ConfigError
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families import (
    deepseek,
    glm4_moe,
    gpt_oss,
    llama,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    qwen3_next,
)
from gspo_megatron.models.families.common import Family

FAMILIES: dict[str, Family] = {
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "glm4_moe": glm4_moe.FAMILY,
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "gpt_oss": gpt_oss.FAMILY,
    "qwen3_next": qwen3_next.FAMILY,
    "qwen3": qwen3.FAMILY,
    "llama": llama.FAMILY,
}


def architecture(hf: dict, origin: str = "config.json") -> Architecture:
    """Read what a Hugging Face config says.

    Args:
        hf: the config.json as a dict.
        origin: how complaints begin, for example `model.hf_config = 'path'`.

    Raises:
        ConfigError: the family is unknown, a size is missing, a field is of another type than transformers takes,
            or the model has something that is not built here.
    """
    family = hf.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(
            f"{origin}: model_type {family!r} is not supported. Give a model of one of: {', '.join(FAMILIES)}."
        )
    config = ConfigReader(hf, family, origin)
    _refuse_of_all_families(config)
    return FAMILIES[family].read(config)


def _refuse_of_all_families(config: ConfigReader) -> None:
    """Refuse what transformers honours in any family, though no family's class has the field."""
    config.refuse("per_layer_config")
    causal, weights = config.hf.get("is_causal", True), config.hf.get("transformers_weights")
    config.require(
        bool(causal),
        f"is_causal = {causal!r} is not supported: tokens see those behind them too, as in an embedding model",
        "Use a model that generates text.",
    )
    config.require(
        weights is None,
        f"transformers_weights = {weights!r} is not supported, which names another file of weights",
        "Call the file model.safetensors, and remove the field.",
    )
