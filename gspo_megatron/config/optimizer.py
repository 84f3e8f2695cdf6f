"""The recipe's `optimizer` section configures Adam in RL."""

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.config.constraints import STRICT, at_most, between, positive, require


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam in RL (Megatron's optimizer and learning-rate schedules)."""

    __pydantic_config__ = STRICT
    lr: float = 1e-4
    """Learning rate after the warm-up."""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """What it does from then on, until the last of `steps`. A run that goes on with more steps follows the longer
    curve from there."""
    min_lr: float = 0.0
    """Where linear and cosine end."""
    warmup_steps: int = 8
    """Optimizer steps (minibatches), not rollout steps. Fresh Adam moves many routes at once without it."""
    weight_decay: float = 0.0
    """Decoupled, as in AdamW."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: float = 0.95
    """Decay of the mean of squared gradients."""
    adam_eps: float = 1e-8
    """Added to the root of the latter."""
    clip_grad: float = 1.0
    """Largest gradient norm."""

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr", "adam_eps", "clip_grad")
        at_most("optimizer", self, lr=10)
        require(
            0 <= self.min_lr <= self.lr,
            "optimizer.min_lr",
            self.min_lr,
            f"must be between 0 and optimizer.lr = {self.lr:g}, from which the learning rate falls",
            "Give a smaller one.",
        )
        between("optimizer", self, 0, 1, "adam_beta1", "adam_beta2")
        require(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must be 0 or more", "Give 0 for none."
        )
        require(
            self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "must be 0 or more", "Give 0 for none."
        )
