"""The recipe's `algorithm.preference` section has DPO's data and loss."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gspo_megatron.config.constraints import STRICT, at_most, positive


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
    """How strongly the policy is held to the reference: it multiplies the margin of log-ratios."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: DPO (arXiv 2305.18290). ipo: a squared distance from a margin of 1 / (2 beta) (arXiv 2310.12036)."""
    length_normalised: bool = False
    """Compare means of log-ratios over an answer's tokens, not their sums. TRL's ipo does, the paper does not; with
    sigmoid it is length-normalised DPO (arXiv 2411.15124), where beta is 5."""

    def __post_init__(self) -> None:
        positive("algorithm.preference", self, "batch_size", "beta")
        at_most("algorithm.preference", self, batch_size=10_000_000)
