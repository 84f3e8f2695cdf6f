"""The recipe's `optimizer` section configures Adam in RL."""

from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, at_most, between, positive, require


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam in RL (Megatron's optimizer; constant learning rate after a linear warm-up)."""

    __pydantic_config__ = STRICT
    lr: float = 1e-4
    """Learning rate, constant after the warm-up."""
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
        between("optimizer", self, 0, 1, "adam_beta1", "adam_beta2")
        require(
            self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "must be 0 or more", "Give 0 for none."
        )
        require(
            self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "must be 0 or more", "Give 0 for none."
        )
