"""The recipe's `algorithm` section is here, and the literal table of what each algorithm fills in where it says
nothing."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from gspo_megatron.config.constraints import STRICT, positive, require
from gspo_megatron.config.critic import CriticConfig
from gspo_megatron.config.kl import KlConfig, ResolvedKl
from gspo_megatron.config.mismatch import MismatchConfig
from gspo_megatron.config.preference import PreferenceConfig

Aggregation = Literal["sequence_mean", "token_mean", "constant_length", "length_proportional"]
# What a recipe need not give, by algorithm: AlgorithmConfig.resolved() fills these in where it says None.
_GROUP = {
    "aggregation": "sequence_mean",
    "normalize_advantage_by_std": True,
    "entropy_coef": 0.0,
    "kl.coef": 0.0,
    "kl.place": "loss",
    "resampling_rounds": 0,
    "overlong_buffer": 0,
}
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
BY_TOKEN = ("gspo_token", "grpo", "dr_grpo", "dapo")  # of those, the ones whose loss takes an advantage a token


@dataclass(frozen=True)
class AlgorithmConfig:
    """Policy optimization. None means the algorithm's own value (ALGORITHMS in config/algorithm.py)."""

    __pydantic_config__ = STRICT
    name: Literal["gspo", "gspo_token", "grpo", "dr_grpo", "dapo", "ppo", "dpo"] = "gspo"
    """Which loss, and which advantages; docs/algorithms.md has the formulas."""
    clip_ratio_low: float | None = None
    """eps_low: the ratio is clipped below 1 - eps_low. gspo: 3e-4, of the sequence ratio; grpo and its kin: 0.2."""
    clip_ratio_high: float | None = None
    """eps_high: the ratio is clipped above 1 + eps_high. gspo: 4e-4; dapo: 0.28."""
    clip_ratio_dual: float | None = None
    """Where the advantage is negative, also bound the ratio above by this (dual clip; 3 is common). None: off."""
    aggregation: Aggregation | None = None
    """How tokens are weighed: each sequence the same (the GSPO paper), each token the same, summed and divided by
    max_response_length (Dr. GRPO), or summed."""
    num_minibatches: int = 4
    """Optimizer steps on one rollout batch."""
    normalize_advantage_by_std: bool | None = None
    """Divide by the group's standard deviation (off: Dr. GRPO)."""
    advantage_level: Literal["sequence", "turn"] = "sequence"
    """What has an advantage of its own. turn: each turn of an episode, by what came from it on, compared with the turns
    of its number in the group; for losses that take one advantage a token."""
    entropy_coef: float | None = None
    """Of an entropy bonus in the loss."""
    old_logprobs: Literal["recomputed", "rollout", "first_minibatch"] = "recomputed"
    """What stands in the ratio's denominator. recomputed: a pass of the training engine; the first minibatch, whose
    weights are still the old ones, uses its own forward's (its ratio is 1) and is left out of the pass, unless the KL
    penalty is the reward's or routing is replayed or diagnosed. first_minibatch: the same, and those are refused.
    rollout: the log-probs that sampling gave; no pass, but its noise is then part of the ratio."""
    resampling_rounds: int | None = None
    """Most further rounds of fresh prompts in place of groups without signal (DAPO's dynamic sampling). 0: off."""
    overlong_buffer: int | None = None
    """Tokens below max_response_length in which the reward falls by up to overlong_penalty. 0: off. None: 0, but for
    dapo a fifth of max_response_length, as in its paper."""
    overlong_penalty: float = 1.0
    """What a response of max_response_length loses of its reward where overlong_buffer is on."""
    mask_truncated_completions: bool = False
    """Responses that were cut at max_response_length are compared with but not trained on (DAPO's overlong filtering;
    TRL's name). No denominator counts them: a mean over sequences is one over those that have a trained token."""
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
            require(
                value is None or value > 0,
                f"algorithm.{name}",
                value,
                "must be greater than 0",
                "The GSPO paper uses 3e-4 and 4e-4, GRPO 0.2.",
            )
        require(
            self.clip_ratio_low is None or self.clip_ratio_low < 1,
            "algorithm.clip_ratio_low",
            self.clip_ratio_low,
            "must be below 1",
            "The GSPO paper uses 3e-4, GRPO 0.2.",
        )
        high = 0.0 if self.clip_ratio_high is None else self.clip_ratio_high
        require(
            self.clip_ratio_dual is None or self.clip_ratio_dual > 1 + high,
            "algorithm.clip_ratio_dual",
            self.clip_ratio_dual,
            f"must be above 1 + clip_ratio_high = {1 + high:g}",
            "3 is common.",
        )
        for name in ("resampling_rounds", "overlong_buffer", "overlong_penalty", "entropy_coef"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"algorithm.{name}", value, "must be 0 or more", "Give 0 for none.")
        require(
            self.advantage_level == "sequence" or self.name in BY_TOKEN,
            "algorithm.advantage_level",
            self.advantage_level,
            f"gives each token an advantage of its own, and the loss of {self.name} takes none of groups",
            "Give algorithm.name gspo_token, or leave it out.",
        )
        require(
            not self.shuffle_advantages or self.name in GROUP_NORMALISED,
            "algorithm.shuffle_advantages",
            True,
            f"permutes within groups, and {self.name} does not compare within groups",
            "Leave it out, or choose a group-normalised algorithm.",
        )
        require(
            not self.resampling_rounds or self.name in GROUP_NORMALISED,
            "algorithm.resampling_rounds",
            self.resampling_rounds,
            f"is for groups without signal, and {self.name} does not compare within groups",
            "Give 0.",
        )
        require(
            self.old_logprobs != "rollout" or self.mismatch.correction == "none",
            "algorithm.mismatch.correction",
            self.mismatch.correction,
            "has nothing to correct where old_logprobs is rollout",
            "Give old_logprobs recomputed, or correction none.",
        )

    def resolved(self) -> "ResolvedAlgorithm":
        """Return it with the algorithm's own value in place of every None that stands for it."""
        own: dict[str, Any] = {}
        kl: dict[str, Any] = {}
        for name, value in ALGORITHMS[self.name].items():
            part, _, field_name = name.rpartition(".")
            (kl if part else own)[field_name] = value
        kl["estimator"] = "k1" if (self.kl.place or kl["place"]) == "reward" else "k3"
        return ResolvedAlgorithm(**{**_filled(self, own), "kl": ResolvedKl(**_filled(self.kl, kl))})


@dataclass(frozen=True)
class ResolvedAlgorithm(AlgorithmConfig):
    """In this AlgorithmConfig the algorithm's own values stand where the recipe gave none.

    overlong_buffer may still be None, which is a fifth of rollout.max_response_length.
    """

    clip_ratio_low: float = 3e-4
    clip_ratio_high: float = 4e-4
    aggregation: Aggregation = "sequence_mean"
    normalize_advantage_by_std: bool = True
    entropy_coef: float = 0.0
    resampling_rounds: int = 0
    kl: ResolvedKl = field(default_factory=ResolvedKl)


def _filled(given: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a dataclass, with the algorithm's own value where one is None."""
    values = {entry.name: getattr(given, entry.name) for entry in fields(given)}
    return {name: own.get(name) if value is None else value for name, value in values.items()}
