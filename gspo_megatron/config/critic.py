"""The recipe's `algorithm.critic` section configures PPO's critic."""

from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, at_most, positive, require


@dataclass(frozen=True)
class CriticConfig:
    """PPO's critic: a model of the policy's shape with a value head, and generalised advantage estimation."""

    __pydantic_config__ = STRICT
    lr: float = 1e-4
    """The critic's learning rate, constant after its warm-up."""
    warmup_steps: int = 8
    """Optimizer steps in which it rises from 0."""
    gamma: float = 1.0
    """Discount by token."""
    gae_lambda: float = 0.95
    """Lambda of generalised advantage estimation: 1 is the return less the value, 0 one step ahead."""
    clip_value: float = 0.2
    """A value that has moved further than this from the one at collection gets no gradient in that direction."""
    whiten_advantages: bool = True
    """Mean 0 and standard deviation 1 over the trained tokens of the whole batch."""

    def __post_init__(self) -> None:
        positive("algorithm.critic", self, "lr", "gamma", "clip_value")
        at_most("algorithm.critic", self, lr=10)
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"algorithm.critic.{name}", value, "must lie between 0 and 1", "Give 1 or 0.95.")
        require(
            self.warmup_steps >= 0,
            "algorithm.critic.warmup_steps",
            self.warmup_steps,
            "must be 0 or more",
            "Give 0 for none.",
        )
