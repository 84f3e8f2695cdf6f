"""The model's Hugging Face config.json, read and checked before anything heavy is imported.

Left out: whether a layout can cut the model (check.py), and the model itself (backend/model.py).
"""

import json
from pathlib import Path

from gspo_megatron.config import ModelConfig, require
from gspo_megatron.errors import ConfigError

SUPPORTED_MODELS = ("qwen3_moe",)
SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
    "num_key_value_heads", "num_experts", "num_experts_per_tok", "max_position_embeddings",
)  # fmt: skip


def read_shape(model: ModelConfig) -> dict:
    """The Hugging Face config as a dict.

    Raises:
        ConfigError: it is missing, not a JSON object, of an unsupported family, or lacks a size.
    """
    path = Path(model.hf_config)
    field, value = "model.hf_config", str(path)
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"{field} = {value!r}: {reason}. Give the path of a Hugging Face config.json; a relative path is looked "
            "up from the current directory, the recipe's folder and the repository."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field} = {value!r}: not valid JSON: {error}. Give a config.json.") from None
    require(isinstance(shape, dict), field, value, "must hold a JSON object", "Give a Hugging Face config.json.")
    family = shape.get("model_type")
    require(family in SUPPORTED_MODELS, field, value, f"model_type {family!r} is not supported",
            f"Give a config of one of: {', '.join(SUPPORTED_MODELS)}.")  # fmt: skip
    for name in SIZES:
        size = shape.get(name)
        require(isinstance(size, int) and size > 0, field, value, f"{name} is {size!r}, not a whole number above 0",
                f"Correct {name} in that file.")  # fmt: skip
    _check_family(shape, field, value)
    return shape


def _check_family(shape: dict, field: str, value: str) -> None:
    """Variants of the family that the model builder would silently train as something else."""
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    remedy = "Use a model without it."
    require(kind == "default", field, value, f"rope_type {kind!r} is not supported", "Use plain rotary embeddings.")
    require(not shape.get("use_sliding_window"), field, value, "sliding-window attention is not supported", remedy)
    require(not shape.get("attention_bias"), field, value, "attention_bias (of all four projections) is not supported",
            remedy)  # fmt: skip
    activation = shape.get("hidden_act", "silu")
    require(activation == "silu", field, value, f"hidden_act {activation!r} is not supported", "Use silu.")
    experts, chosen = shape["num_experts"], shape["num_experts_per_tok"]
    require(chosen <= experts, field, value, f"num_experts_per_tok {chosen} exceeds num_experts {experts}",
            "Lower num_experts_per_tok.")  # fmt: skip
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    require(heads % groups == 0, field, value, f"num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{groups}", "Correct one of the two.")  # fmt: skip
