"""num_epochs of a recipe becomes steps, once it is known which rows are trained on.

From then on the run is one of so many steps: its config.yaml, schedules and charts know nothing of epochs. A start that
goes on counts them anew from the same data, and comes to the same steps. Left out: rows that dynamic sampling draws
(algorithm.resampling_rounds), which come on top.
"""

import dataclasses
from dataclasses import dataclass

from gspo_megatron.config import ResolvedConfig
from gspo_megatron.config.constraints import LARGEST, require
from gspo_megatron.tasks.mixture import TaskMixture


@dataclass(frozen=True)
class Epochs:
    """How often each row is to be seen, and how many rows there are."""

    number: int
    rows: int  # to train on: held-out rows and those that are too long are not among them

    @classmethod
    def of(cls, config: ResolvedConfig, mixture: TaskMixture) -> "Epochs | None":
        """Return what a recipe asks for; None where it gives steps. config/train.py has seen to one task of data."""
        if config.num_epochs is None:
            return None
        (task,) = mixture.data.values()
        return cls(config.num_epochs, task.size("train"))

    def steps(self, num_prompts: int) -> int:
        """Return the steps of so many prompts in which each row is seen that often.

        The last one is filled up with the first rows of one more epoch.
        """
        return -(-self.number * self.rows // num_prompts)

    def resolved(self, config: ResolvedConfig) -> ResolvedConfig:
        """Return the recipe with steps in place of num_epochs. Raises ConfigError for more than a run can count."""
        steps = self.steps(config.rollout.num_prompts)
        constraint = f"{self.rows:,} rows are {steps:,} steps, of which there are at most {LARGEST:,}"
        require(steps <= LARGEST, "num_epochs", self.number, constraint, "Give a smaller number.")
        return dataclasses.replace(config, steps=steps, num_epochs=None)

    def described(self, config: ResolvedConfig) -> str:
        """Return the header's line."""
        epochs = f"{self.number} epoch{'s' * (self.number > 1)}"
        return f"{config.steps}: {epochs} of {self.rows} rows, {config.rollout.num_prompts} prompts a step"
