"""The recipe's `algorithm.kl` section has the KL term; ResolvedKl is the same with every value filled in."""

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.config.constraints import STRICT, require

Estimator = Literal["k1", "k2", "k3"]
Place = Literal["loss", "reward"]


@dataclass(frozen=True)
class KlConfig:
    """KL divergence to a frozen reference, the policy as RL found it. A coefficient of 0 needs no reference."""

    __pydantic_config__ = STRICT
    coef: float | None = None
    """None: the algorithm's own."""
    estimator: Estimator | None = None
    """k1: logp - ref; k2: half its square; k3: exp(ref - logp) - 1 + logp - ref (Schulman, 2020). None: k1 in the
    reward, k3 in the loss, where k1's gradient has mean 0."""
    place: Place | None = None
    """loss: a term of the loss. reward: taken off the reward, by token for ppo, by sequence for the others."""

    def __post_init__(self) -> None:
        require(
            self.coef is None or self.coef >= 0,
            "algorithm.kl.coef",
            self.coef,
            "must be 0 or more",
            "Give 0 for no reference.",
        )


@dataclass(frozen=True)
class ResolvedKl(KlConfig):
    """In this KlConfig the algorithm's own values stand where the recipe gave none."""

    coef: float = 0.0
    estimator: Estimator = "k3"
    place: Place = "loss"

    @property
    def is_in_reward(self) -> bool:
        """Return whether there is a penalty on the reward, which needs old log-probs of all responses."""
        return self.coef > 0 and self.place == "reward"
