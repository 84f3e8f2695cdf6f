"""What a folder is that somebody gave as a model: named for what it is, with what to give instead.

Left out: whether its weights fit its config.json (hf/), and folders on another machine: nothing is downloaded.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.config.constraints import require
from gspo_megatron.errors import ConfigError

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
WEIGHTS = ("model.safetensors.index.json", "model.safetensors")
COMPLETE = "metadata.json"  # what Megatron writes last of a checkpoint
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OTHER_WEIGHTS = ("pytorch_model*.bin", "*.gguf", "consolidated*.pth", "*.pt", "*.bin", "*.pth", "*.msgpack", "*.h5")
SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Finding:
    """What a path is, and what to do instead."""

    what: str
    remedy: str

    def error(self, field: str, path: Path) -> ConfigError:
        """Return the message for who gave the path as `field`."""
        return ConfigError(f"{field} = {str(path)!r}: {self.what}. {self.remedy}")


INCOMPLETE = Finding(f"has no {COMPLETE}, so it is no complete checkpoint", "Give a folder named step_NNNNNN of a run.")


def require_model(folder: Path, field: str) -> None:
    """Raise ConfigError unless a folder has config.json, safetensors files and a tokenizer."""
    require_weights(folder, field)
    require_tokenizer(folder, field)


def require_tokenizer(folder: Path, field: str) -> None:
    """Raise ConfigError unless a folder has a tokenizer."""
    # Without one, transformers makes up a tokenizer that knows no token.
    require(
        any((folder / name).is_file() for name in TOKENIZERS),
        field,
        str(folder),
        f"has no tokenizer ({', '.join(TOKENIZERS)})",
        "Put the model's own into the folder.",
    )


def require_weights(folder: Path, field: str) -> None:
    """Raise ConfigError unless a folder has config.json and safetensors files."""
    if found := _unlike_a_model(folder):
        raise found.error(field, folder)


def require_checkpoint(folder: Path, field: str) -> None:
    """Raise ConfigError, which names the checkpoints that are near, unless a folder is a complete one."""
    if not (folder / COMPLETE).is_file():
        raise (no_folder(folder) or _of_a_run(folder) or INCOMPLETE).error(field, folder)


def _unlike_a_model(folder: Path) -> Finding | None:
    has_config = (folder / "config.json").is_file()
    has_weights = any((folder / name).is_file() for name in WEIGHTS)
    found = no_folder(folder) or _of_a_run(folder)
    if found or (has_config and has_weights):
        return found
    if (folder / COMPLETE).is_file():
        side = folder / "hf"
        return Finding(
            "is a Megatron checkpoint, not a Hugging Face folder",
            f"Convert it: gspo-megatron convert {folder} FOLDER"
            + ("." if side.is_dir() else " --hf-config FOLDER_WITH_CONFIG."),
        )
    if (folder / "adapter_config.json").is_file():
        return Finding(
            "is an adapter (PEFT), which has a part of the weights alone",
            "Merge it into its base model (PEFT's merge_and_unload, then save_pretrained) and give that folder.",
        )
    others = next((names for kind in OTHER_WEIGHTS if (names := sorted(p.name for p in folder.glob(kind)))), [])
    if others and not has_weights:
        return Finding(
            f"its weights are {_some(others)}, and only safetensors files are read",
            "Save the model again by transformers' save_pretrained, which writes them.",
        )
    lost = ([] if has_config else ["config.json"]) + ([] if has_weights else [" or ".join(WEIGHTS)])
    return Finding(
        f"has no {' and no '.join(lost)}",
        "Give a Hugging Face folder with config.json, safetensors files and tokenizer.",
    )


def no_folder(path: Path) -> Finding | None:
    """Say why a path is no folder; None where it is one."""
    if path.is_dir():
        return None
    if path.exists():
        return Finding("is a file, not a folder", f"Give the folder that it is in: {path.parent}.")
    if path.is_symlink():
        return Finding("is a link to what is not there", "Give a folder.")
    if HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        return Finding(
            "no such folder, and nothing is downloaded, if that is a name on a hub",
            "Download the model and give its folder.",
        )
    return Finding("no such folder", "Give a folder.")


def _of_a_run(folder: Path) -> Finding | None:
    """A run's folder, that of its checkpoints, or one of Megatron-LM: which of its folders can be meant."""
    if (folder / COMPLETE).is_file():
        return None
    near = [p.parent for place in ("", "checkpoints") for p in sorted((folder / place).glob(f"*/{COMPLETE}"))]
    if near := [path for path in near if path.suffix != ".unfinished"]:
        return Finding(
            f"is a folder of checkpoints, not one of them: it has {_some([path.name for path in near])}",
            f"Give one of them, for example {near[-1]}.",
        )
    if (folder / "checkpoints").is_dir() and (folder / "config.yaml").is_file():
        return Finding("is a run's folder without a complete checkpoint", "Let the run write one first.")
    return None


def _some(names: list[str]) -> str:
    """The last names, which are the newest checkpoints."""
    return ", ".join(([] if len(names) <= SHOWN else ["..."]) + names[-SHOWN:])
