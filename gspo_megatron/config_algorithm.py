"""The recipe's `algorithm` section, and the literal table of what each algorithm fills in where it says nothing."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gspo_megatron.requirements import STRICT, positive, require


@dataclass(frozen=True)
class KlConfig:
    """KL divergence to a frozen reference, the policy as RL found it. A coefficient of 0 needs no reference."""

    __pydantic_config__ = STRICT
    coef: float | None = None
    """None: the algorithm's own."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """k1: logp - ref; k2: half its square; k3: exp(ref - logp) - 1 + logp - ref (Schulman, 2020). None: k1 in the
    reward, k3 in the loss, where k1's gradient has mean 0."""
    place: Literal["loss", "reward"] | None = None
    """loss: a term of the loss. reward: taken off the reward, by token for ppo, by sequence for the others."""

    def __post_init__(self) -> None:
        require(self.coef is None or self.coef >= 0, "algorithm.kl.coef", self.coef, "must be 0 or more",
                "Give 0 for no reference.")  # fmt: skip


@dataclass(frozen=True)
class MismatchConfig:
    """Weights against the gap between rollout and training log-probs: exp(old - rollout) multiplies the advantage."""

    __pydantic_config__ = STRICT
    correction: Literal["none", "token_truncated", "token_masked", "sequence_truncated", "sequence_masked"] = "none"
    """By token or by sequence (its mean log-ratio); truncated at the threshold, or 0 outside 1/threshold..threshold."""
    threshold: float = 2.0

    def __post_init__(self) -> None:
        require(self.threshold > 1, "algorithm.mismatch.threshold", self.threshold, "must be above 1",
                "2 is common for tokens; a sequence's mean needs a tighter one.")  # fmt: skip


@dataclass(frozen=True)
class CriticConfig:
    """PPO's critic: a model of the policy's shape with a value head, and generalised advantage estimation."""

    __pydantic_config__ = STRICT
    lr: float = 1e-4
    warmup_steps: int = 8
    gamma: float = 1.0
    """Discount by token."""
    gae_lambda: float = 0.95
    clip_value: float = 0.2
    """A value that has moved further than this from the one at collection gets no gradient in that direction."""
    whiten_advantages: bool = True
    """Mean 0 and standard deviation 1 over the trained tokens of the whole batch."""

    def __post_init__(self) -> None:
        positive("algorithm.critic", self, "lr", "gamma", "clip_value")
        for name in ("gamma", "gae_lambda"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"algorithm.critic.{name}", value, "must lie between 0 and 1", "Give 1 or 0.95.")
        require(self.warmup_steps >= 0, "algorithm.critic.warmup_steps", self.warmup_steps, "must be 0 or more",
                "Give 0 for none.")  # fmt: skip


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


# What a recipe need not give, by algorithm: AlgorithmConfig.resolved() fills these in where it says None.
_GROUP = {"aggregation": "sequence_mean", "normalize_advantage_by_std": True, "entropy_coef": 0.0, "kl.coef": 0.0,
          "kl.place": "loss", "resampling_rounds": 0, "overlong_buffer": 0}  # fmt: skip
_TOKEN = _GROUP | {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gspo": _GROUP | {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},  # arXiv 2507.18071, section 5.1
    "gspo_token": _GROUP | {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    "grpo": _TOKEN | {"kl.coef": 0.04},  # arXiv 2402.03300, section 4.2
    "dr_grpo": _TOKEN | {"aggregation": "constant_length", "normalize_advantage_by_std": False},  # arXiv 2503.20783
    "dapo": _TOKEN | {"clip_ratio_high": 0.28, "aggregation": "token_mean", "resampling_rounds": 3,
                      "overlong_buffer": None},  # arXiv 2503.14476
    "ppo": _TOKEN | {"aggregation": "token_mean", "entropy_coef": 0.001, "kl.coef": 0.01, "kl.place": "reward"},
    "dpo": _TOKEN,  # of these, DPO uses none
}  # fmt: skip
SEQUENCE_RATIO = ("gspo", "gspo_token")
GROUP_NORMALISED = ("gspo", "gspo_token", "grpo", "dr_grpo", "dapo")


@dataclass(frozen=True)
class AlgorithmConfig:
    """Policy optimization. None means the algorithm's own value, see ALGORITHMS above."""

    __pydantic_config__ = STRICT
    name: Literal["gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "ppo", "dpo"] = "gspo"
    clip_ratio_low: float | None = None
    """eps_low: the ratio is clipped below 1 - eps_low. gspo: 3e-4, of the sequence ratio; grpo and its kin: 0.2."""
    clip_ratio_high: float | None = None
    """eps_high: the ratio is clipped above 1 + eps_high. gspo: 4e-4; dapo: 0.28."""
    clip_ratio_dual: float | None = None
    """Where the advantage is negative, also bound the ratio above by this (dual clip; 3 is common). None: off."""
    aggregation: Literal["sequence_mean", "token_mean", "constant_length", "length_proportional"] | None = None
    """How tokens are weighed: each sequence the same (the GSPO paper), each token the same, summed and divided by
    max_response_length (Dr. GRPO), or summed."""
    num_minibatches: int = 4
    """Optimizer steps on one rollout batch."""
    normalize_advantage_by_std: bool | None = None
    """Divide by the group's standard deviation (off: Dr. GRPO)."""
    entropy_coef: float | None = None
    """Of an entropy bonus in the loss."""
    old_logprobs: Literal["recomputed", "rollout", "first_minibatch"] = "recomputed"
    """What stands in the ratio's denominator. recomputed: a pass of the training engine over all minibatches.
    first_minibatch: the first minibatch uses its own forward's (its ratio is 1), the pass covers only the others.
    rollout: the log-probs that sampling gave; no pass, but its noise is then part of the ratio."""
    resampling_rounds: int | None = None
    """Most further rounds of fresh prompts in place of groups without signal (DAPO's dynamic sampling). 0: off."""
    overlong_buffer: int | None = None
    """Tokens below max_response_length in which the reward falls by up to overlong_penalty. 0: off. None: 0, but for
    dapo a fifth of max_response_length, as in its paper."""
    overlong_penalty: float = 1.0
    shuffle_advantages: bool = False
    """Control run: advantages are permuted within each group, so nothing can be learned from them."""
    kl: KlConfig = field(default_factory=KlConfig)
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)

    def __post_init__(self) -> None:
        positive("algorithm", self, "num_minibatches")
        for name in ("clip_ratio_low", "clip_ratio_high"):
            value = getattr(self, name)
            require(value is None or value > 0, f"algorithm.{name}", value, "must be greater than 0",
                    "The GSPO paper uses 3e-4 and 4e-4, GRPO 0.2.")  # fmt: skip
        require(self.clip_ratio_low is None or self.clip_ratio_low < 1, "algorithm.clip_ratio_low",
                self.clip_ratio_low, "must be below 1", "The GSPO paper uses 3e-4, GRPO 0.2.")  # fmt: skip
        high = 0.0 if self.clip_ratio_high is None else self.clip_ratio_high
        require(self.clip_ratio_dual is None or self.clip_ratio_dual > 1 + high, "algorithm.clip_ratio_dual",
                self.clip_ratio_dual, f"must be above 1 + clip_ratio_high = {1 + high:g}", "3 is common.")  # fmt: skip
        for name in ("resampling_rounds", "overlong_buffer", "overlong_penalty", "entropy_coef"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"algorithm.{name}", value, "must be 0 or more", "Give 0 for none.")
        require(not self.shuffle_advantages or self.name in GROUP_NORMALISED, "algorithm.shuffle_advantages", True,
                f"permutes within groups, and {self.name} does not compare within groups",
                "Leave it out, or choose a group-normalised algorithm.")  # fmt: skip
        require(not self.resampling_rounds or self.name in GROUP_NORMALISED, "algorithm.resampling_rounds",
                self.resampling_rounds, f"is for groups without signal, and {self.name} does not compare within groups",
                "Give 0.")  # fmt: skip
        require(self.old_logprobs != "rollout" or self.mismatch.correction == "none", "algorithm.mismatch.correction",
                self.mismatch.correction, "has nothing to correct where old_logprobs is rollout",
                "Give old_logprobs recomputed, or correction none.")  # fmt: skip

    def resolved(self) -> "AlgorithmConfig":
        """Every None that stands for the algorithm's own value replaced by it."""
        changes: dict[str, Any] = {}
        kl: dict[str, Any] = {}
        for name, value in ALGORITHMS[self.name].items():
            part, _, field_name = name.rpartition(".")
            owner, target = (self.kl, kl) if part else (self, changes)
            if getattr(owner, field_name) is None:
                target[field_name] = value
        place = kl.get("place", self.kl.place)
        if self.kl.estimator is None:
            kl["estimator"] = "k1" if place == "reward" else "k3"
        return replace(self, kl=replace(self.kl, **kl), **changes)
