"""The recipe: dataclasses that validate themselves, before a process group or a model exists.

A recipe is a YAML file with the same nesting as `TrainConfig`; command-line overrides (`--optimizer.lr 1e-4`)
come on top. Each dataclass checks its own fields in __post_init__; what needs two parts of the recipe, the
model's shape or the world size is checked in `check.py`. Field names are Megatron-Core's where it has one.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict

from gspo_megatron.errors import ConfigError

STRICT = ConfigDict(extra="forbid")

# The padded vocabulary is a multiple of this in every layout, so tensor-parallel sizes must divide it. Padded ids are
# ordinary entries that training never sees: if one is sampled it decodes to nothing.
MAKE_VOCAB_SIZE_DIVISIBLE_BY = 64


def require(ok: bool, field_name: str, value: object, constraint: str, remedy: str) -> None:
    """Raise the one form of message that every bad value gets."""
    if not ok:
        raise ConfigError(f"{field_name} = {value!r}: {constraint}. {remedy}")


def positive(prefix: str, config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than 0", "Give a positive number.")


@dataclass(frozen=True)
class ModelConfig:
    """The policy network, from a Hugging Face config, and the parts of MoE routing that GSPO leaves alone."""

    __pydantic_config__ = STRICT
    hf_config: Path = Path("examples/models/qwen3_moe_tiny/config.json")
    """Hugging Face config.json of the model (model_type qwen3_moe). Its vocab_size is replaced by the tokenizer's."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights in forward and backward; the optimizer keeps fp32 master weights."""
    recompute: bool = False
    """Recompute every layer's activations in the backward pass (Megatron's recompute_granularity full)."""
    moe_router_dtype: Literal["fp32", "fp64"] = "fp32"
    """Type of the router's matrix product and softmax."""
    moe_aux_loss_coeff: float = 0.0
    """Load-balancing loss. 0 as GSPO trains; anything else changes the gradient and is warned about."""
    moe_expert_capacity_factor: float | None = None
    """Must stay unset: dropped tokens make the sequence ratio depend on the batch."""
    moe_input_jitter_eps: float | None = None
    """Must stay unset: jitter makes old and new log-probs differ at the same weights."""
    moe_router_bias_update_rate: float = 0.0
    """Must stay 0: Megatron would otherwise move expert_bias outside the gradient."""
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, neutral, why in (
            ("moe_expert_capacity_factor", None, "dropped tokens make the sequence ratio depend on the batch"),
            ("moe_input_jitter_eps", None, "jitter makes the ratio differ from 1 at equal weights"),
            ("moe_router_bias_update_rate", 0.0, "Megatron would move expert_bias outside the gradient"),
            ("hidden_dropout", 0.0, "dropout makes the ratio differ from 1 at equal weights"),
            ("attention_dropout", 0.0, "dropout makes the ratio differ from 1 at equal weights"),
        ):
            value = getattr(self, name)
            require(
                value == neutral, f"model.{name}", value, f"GSPO needs {neutral}: {why}", "Remove it from the recipe."
            )
        require(self.moe_aux_loss_coeff >= 0, "model.moe_aux_loss_coeff", self.moe_aux_loss_coeff,
                "must be 0 or more", "Leave it at 0 unless you want a load-balancing loss.")  # fmt: skip


@dataclass(frozen=True)
class ParallelConfig:
    """How the world is cut (Megatron-Core's names). None: chosen from the world size, see `check.resolve_layout`."""

    __pydantic_config__ = STRICT
    tensor_model_parallel_size: int | None = None
    """Tensor parallelism; sequence parallelism is always on with it (Megatron demands it for MoE)."""
    pipeline_model_parallel_size: int | None = None
    virtual_pipeline_model_parallel_size: int | None = None
    """Virtual stages a rank (interleaved schedule); None: off."""
    expert_model_parallel_size: int | None = None
    expert_tensor_parallel_size: int = 1
    use_distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
                     "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size"):  # fmt: skip
            value = getattr(self, name)
            require(
                value is None or value >= 1, f"parallel.{name}", value, "must be at least 1", "Give 1 to turn it off."
            )


@dataclass(frozen=True)
class TaskConfig:
    """One reasoning-gym task of the mixture."""

    __pydantic_config__ = STRICT
    weight: float = 1.0
    """Share of the prompts, relative to the other tasks' weights."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task generator, for example {min_word_len: 3}."""

    def __post_init__(self) -> None:
        positive("tasks.*", self, "weight")


@dataclass(frozen=True)
class DataConfig:
    """Prompts and tokenizer."""

    __pydantic_config__ = STRICT
    vocab_size: int = 320
    """Most entries of the byte-pair tokenizer that is trained on the tasks and saved with the run."""
    max_prompt_length: int = 96
    """Tokens, chat template included; a longer prompt is an error, never cut."""
    num_eval_prompts: int = 256
    """Held-out prompts, disjoint from the warm start's and the RL stream's."""
    eval_samples: int = 4
    """Responses a held-out prompt, sampled as in the rollouts; accuracy is their mean (pass@1)."""

    def __post_init__(self) -> None:
        positive("data", self, "max_prompt_length", "num_eval_prompts", "eval_samples")
        require(self.vocab_size >= 260, "data.vocab_size", self.vocab_size,
                "must be at least 260, the 256 bytes and the special tokens", "Give 320 or more.")  # fmt: skip


@dataclass(frozen=True)
class WarmStartConfig:
    """Supervised steps on gold answers, because the model starts from random weights. steps = 0: none."""

    __pydantic_config__ = STRICT
    steps: int = 200
    num_examples: int = 2048
    """Distinct labelled examples, gone over again and again. RL prompts are fresh instead."""
    batch_size: int = 128
    lr: float = 1e-3
    min_lr: float = 1e-5
    """End of the cosine decay."""
    warmup_steps: int = 10
    eval_interval: int = 50
    """Steps between evaluations on held-out prompts."""
    stop_accuracy: float = 1.0
    """End the warm start at the first evaluation with this accuracy: a solved task leaves RL nothing to add."""

    def __post_init__(self) -> None:
        positive("warm_start", self, "num_examples", "batch_size", "lr", "eval_interval")
        require(self.steps >= 0, "warm_start.steps", self.steps, "must be 0 or more", "Give 0 for no warm start.")
        require(0 < self.stop_accuracy <= 1, "warm_start.stop_accuracy", self.stop_accuracy,
                "must be above 0 and at most 1", "Give 1.0 to stop at a solved task only.")  # fmt: skip


@dataclass(frozen=True)
class KlConfig:
    """KL divergence to a frozen reference, the policy as RL found it. A coefficient of 0 needs no reference."""

    __pydantic_config__ = STRICT
    coef: float | None = None
    """None: the algorithm's own."""
    estimator: Literal["k1", "k2", "k3"] | None = None
    """k1: logp - ref; k2: half its square; k3: exp(ref - logp) - 1 + logp - ref (Schulman, 2020)."""
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
    """Values move at most this far from those at collection, in one rollout batch."""
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
          "kl.estimator": "k3", "kl.place": "loss", "resampling_rounds": 0, "overlong_buffer": 0}  # fmt: skip
_TOKEN = _GROUP | {"clip_ratio_low": 0.2, "clip_ratio_high": 0.2}
ALGORITHMS: dict[str, dict[str, Any]] = {
    "gspo": _GROUP | {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},  # arXiv 2507.18071, section 5.1
    "gspo_token": _GROUP | {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    "grpo": _TOKEN | {"kl.coef": 0.04},  # arXiv 2402.03300, section 4.2
    "dr_grpo": _TOKEN | {"aggregation": "constant_length", "normalize_advantage_by_std": False},  # arXiv 2503.20783
    "dapo": _TOKEN | {"clip_ratio_high": 0.28, "aggregation": "token_mean", "resampling_rounds": 3},  # arXiv 2503.14476
    "ppo": _TOKEN | {"aggregation": "token_mean", "entropy_coef": 0.001, "kl.coef": 0.01, "kl.estimator": "k1",
                     "kl.place": "reward"},
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
    """Tokens below max_response_length in which the reward falls by up to overlong_penalty. 0: off."""
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
        return replace(self, kl=replace(self.kl, **kl), **changes)


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling on the training model itself, with a key/value cache."""

    __pydantic_config__ = STRICT
    num_prompts: int = 32
    """Prompts a step, over all data-parallel ranks."""
    group_size: int = 8
    """G: responses a prompt."""
    max_response_length: int = 32
    temperature: float = 1.0
    """Also divides the logits in old and new log-probs."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this share of the probability; 1: all."""

    def __post_init__(self) -> None:
        positive("rollout", self, "num_prompts", "group_size", "max_response_length", "temperature", "top_p")
        require(
            self.top_p <= 1, "rollout.top_p", self.top_p, "must be at most 1", "Give 1.0 to sample from all tokens."
        )
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "must be 0 or more", "Give 0 to sample from all tokens.")


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam in RL (Megatron's optimizer; constant learning rate after a linear warm-up)."""

    __pydantic_config__ = STRICT
    lr: float = 1e-4
    warmup_steps: int = 8
    """Optimizer steps (minibatches), not rollout steps. Fresh Adam moves many routes at once without it."""
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    """Largest gradient norm."""

    def __post_init__(self) -> None:
        positive("optimizer", self, "lr", "adam_eps", "clip_grad")
        require(
            self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "must be 0 or more", "Give 0 for none."
        )


@dataclass(frozen=True)
class TrainConfig:
    """One training run: supervised warm start, then reinforcement learning on fresh prompts."""

    __pydantic_config__ = STRICT
    name: str = "moe_gspo"
    """The run folder is output_dir/name (a number is added where that exists)."""
    output_dir: Path = Path("runs")
    seed: int = 1
    """Of the initial weights, the prompts and the sampling. Layouts differ by rounding."""
    steps: int = 100
    """RL steps: rollouts, rewards, then num_minibatches optimizer steps."""
    eval_interval: int = 25
    """Steps between evaluations on held-out prompts; they also run before and after."""
    max_tokens_per_microbatch: int = 8192
    """Packing limit of one microbatch on one data-parallel rank."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where there is a GPU, else CPU with Gloo."""
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    tasks: dict[str, TaskConfig] = field(default_factory=lambda: {"spell_backward": TaskConfig()})
    """reasoning-gym tasks by name."""
    data: DataConfig = field(default_factory=DataConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        positive("train", self, "eval_interval", "max_tokens_per_microbatch")
        require(self.steps >= 0, "steps", self.steps, "must be 0 or more", "Give 0 to run the warm start alone.")
        require(
            len(self.tasks) > 0, "tasks", self.tasks, "must name at least one task", "For example spell_backward: {}."
        )
        require(self.rollout.group_size >= 2 or self.algorithm.name not in GROUP_NORMALISED, "rollout.group_size",
                self.rollout.group_size, f"{self.algorithm.name} compares the responses to one prompt, so it needs 2 "
                "or more", "The GSPO paper uses 8.")  # fmt: skip
