"""The recipe's `algorithm.mismatch` section weighs the gap between rollout and training log-probs."""

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.config.constraints import STRICT, require


@dataclass(frozen=True)
class MismatchConfig:
    """Weights against the gap between rollout and training log-probs: exp(old - rollout) multiplies the advantage."""

    __pydantic_config__ = STRICT
    correction: Literal["none", "token_truncated", "token_masked", "sequence_truncated", "sequence_masked"] = "none"
    """By token or by sequence (its mean log-ratio); truncated at the threshold, or 0 outside 1/threshold..threshold."""
    threshold: float = 2.0
    """Above 1. A weight is cut at it, or is 0 beyond it."""

    def __post_init__(self) -> None:
        require(
            self.threshold > 1,
            "algorithm.mismatch.threshold",
            self.threshold,
            "must be above 1",
            "2 is common for tokens; a sequence's mean needs a tighter one.",
        )
