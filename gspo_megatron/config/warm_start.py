"""The recipe's `warm_start` section has supervised steps before reinforcement learning."""

from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, at_most, positive, require


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on gold answers, because the model starts from random weights. steps = 0: none."""

    __pydantic_config__ = STRICT
    steps: int = 200
    """Most optimizer steps."""
    num_examples: int = 2048
    """Distinct labelled examples, gone over again and again. RL prompts are fresh instead."""
    batch_size: int = 128
    """Examples an optimizer step, over all data-parallel ranks."""
    lr: float = 1e-3
    """Highest learning rate, after the warm-up."""
    min_lr: float = 1e-5
    """End of the cosine decay."""
    warmup_steps: int = 10
    """Optimizer steps in which the learning rate rises from 0."""
    eval_interval: int = 50
    """Steps between evaluations on held-out prompts."""
    stop_accuracy: float = 1.0
    """End the warm start at the first evaluation with this accuracy: a solved task leaves RL nothing to add."""

    def __post_init__(self) -> None:
        positive("warm_start", self, "num_examples", "batch_size", "lr", "eval_interval")
        at_most("warm_start", self, num_examples=10_000_000, batch_size=10_000_000, lr=10)
        require(
            0 <= self.min_lr <= self.lr,
            "warm_start.min_lr",
            self.min_lr,
            f"must be between 0 and warm_start.lr = {self.lr:g}, from which the learning rate falls",
            "Give a smaller one.",
        )
        require(
            self.warmup_steps >= 0,
            "warm_start.warmup_steps",
            self.warmup_steps,
            "must be 0 or more",
            "Give 0 for none.",
        )
        require(self.steps >= 0, "warm_start.steps", self.steps, "must be 0 or more", "Give 0 for no warm start.")
        require(
            0 < self.stop_accuracy <= 1,
            "warm_start.stop_accuracy",
            self.stop_accuracy,
            "must be above 0 and at most 1",
            "Give 1.0 to stop at a solved task only.",
        )
