"""The model's Hugging Face config.json is read and checked before anything heavy is imported.

Left out: whether a layout can cut the model (check.py), the model itself (backend/model/builder.py), and the weights
of a folder beyond their being there (hf/load.py).
"""

from pathlib import Path

from gspo_megatron.config import ModelConfig, RolloutConfig
from gspo_megatron.config.constraints import LARGEST, require
from gspo_megatron.errors import ConfigError
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.families import architecture
from gspo_megatron.recipe.model_folders import HUB_NAME, require_model
from gspo_megatron.utils import plain_json


def read_shape(model: ModelConfig) -> Architecture:
    """Return what the Hugging Face config says.

    Raises:
        ConfigError: it is missing, not a JSON object, of an unsupported family, or lacks a size; or there are no
            weights or no tokenizer in the folder to start from.
    """
    path = config_path(model)
    if model.load_hf is not None:
        require_model(model.load_hf, "model.load_hf")
    field, value = ("model.load_hf", str(path)) if model.load_hf is not None else ("model.hf_config", str(path))
    return architecture(read_json(path, field), f"{field} = {value!r}")


def generation_stops(model: ModelConfig) -> tuple[int, ...]:
    """Return the tokens that end a response according to the folder to start from: eos_token_id, one or several, of
    generation_config.json and config.json. None without such a folder: another tokenizer numbers tokens anew.

    Raises:
        ConfigError: a file is not JSON, or the field is neither a token id nor a list of them.
    """
    if model.load_hf is None:
        return ()
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        path = model.load_hf / name
        if not path.is_file():
            continue
        value = read_json(path, "model.load_hf").get("eos_token_id")
        ids = value if isinstance(value, list) else [value] if value is not None else []
        require(
            all(isinstance(token, int) and not isinstance(token, bool) and token <= LARGEST for token in ids),
            "model.load_hf",
            str(path),
            f"eos_token_id is {value!r:.200}, not a token id or a list of them",
            "Correct it in that file.",
        )
        found |= set(ids)
    return tuple(sorted(token for token in found if token >= 0))  # -1 means none


def check_stop_ids(rollout: RolloutConfig, vocab_size: int) -> None:
    """Raise ConfigError for a stop token that the model cannot choose."""
    for token in rollout.stop_token_ids:
        require(
            token < vocab_size,
            "rollout.stop_token_ids",
            token,
            f"is not below the model's vocabulary size {vocab_size}",
            "Give ids of its tokenizer.",
        )


def config_path(model: ModelConfig) -> Path:
    """Return the path of config.json: in the folder to start from, where there is one."""
    return Path(model.hf_config) if model.load_hf is None else model.load_hf / "config.json"


def read_json(path: Path, field: str) -> dict:
    """Read a config.json as a dict. Raises ConfigError, which names the option `field`."""
    value = str(path)
    try:
        return plain_json.read_object(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        if HUB_NAME.fullmatch(value.removesuffix("/config.json")):
            reason += " (nothing is downloaded, if that is a name on a hub)"
        raise ConfigError(
            f"{field} = {value!r}: {reason}. Give the path of a Hugging Face config.json; a relative path is looked "
            "up from the current directory, the recipe's folder and the repository."
        ) from None
    except ValueError as error:
        raise ConfigError(f"{field} = {value!r}: no JSON object: {error}. Give a Hugging Face config.json.") from None
