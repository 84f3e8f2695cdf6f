"""The recipe's `algorithm.preference` section has DPO's data and loss."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gspo_megatron.config.constraints import STRICT, positive


@dataclass(frozen=True)
class PreferenceConfig:
    """DPO's data and loss."""

    __pydantic_config__ = STRICT
    path: Path | None = None
    """JSONL, one object a line: {"prompt": ..., "chosen": ..., "rejected": ...}."""
    eval_path: Path | None = None
    """Held-out pairs in the same form; None: the last tenth of `path`."""
    batch_size: int = 64
    """Pairs an optimizer step, over all data-parallel ranks."""
    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"

    def __post_init__(self) -> None:
        positive("algorithm.preference", self, "batch_size", "beta")
