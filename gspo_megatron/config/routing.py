"""The recipe's `routing` section says what is watched of MoE routing, and has replay, which is for comparison alone."""

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.config.constraints import STRICT, require


@dataclass(frozen=True)
class RoutingConfig:
    """GSPO leaves routing free. route/* in the metrics tell what it does."""

    __pydantic_config__ = STRICT
    replay: Literal["none", "R2", "R3"] = "none"
    """R2: every update sends tokens to the experts that the pass of old log-probs chose (Routing Replay, arXiv
    2507.18071, section 5.3). R3: that pass and every update take those of the rollout (arXiv 2510.11370). Baselines to
    compare with: gspo-megatron study routing-replay does."""
    statistics: bool = True
    """Count changed routes, router entropy and expert load in every update."""
    diagnostics_interval: int = 0
    """Steps between two further passes that tell how much of the ratio's spread comes with changed routes; 0: never."""

    def __post_init__(self) -> None:
        require(
            self.diagnostics_interval >= 0,
            "routing.diagnostics_interval",
            self.diagnostics_interval,
            "must be 0 or more",
            "Give 0 for never.",
        )
