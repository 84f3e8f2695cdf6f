"""The recipe: dataclasses that validate themselves, before a process group or a model exists.

A recipe is a YAML file with the same nesting as `TrainConfig`; command-line overrides (`--optimizer.lr 1e-4`)
come on top. Each dataclass checks its own fields in __post_init__; what needs two parts of the recipe, the
model's shape or the world size is checked in `check.py`. Field names are Megatron-Core's where it has one.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gspo_megatron.config_algorithm import GROUP_NORMALISED, AlgorithmConfig
from gspo_megatron.config_faults import FaultsConfig
from gspo_megatron.config_routing import RoutingConfig
from gspo_megatron.requirements import STRICT, positive, require

# The padded vocabulary is a multiple of this in every layout, so tensor-parallel sizes must divide it. Padded ids are
# ordinary entries that training never sees: if one is sampled it decodes to nothing.
MAKE_VOCAB_SIZE_DIVISIBLE_BY = 64


@dataclass(frozen=True)
class ModelConfig:
    """The policy network, from a Hugging Face config, and the parts of MoE routing that GSPO leaves alone."""

    __pydantic_config__ = STRICT
    hf_config: Path = Path("examples/models/qwen3_moe_tiny/config.json")
    """Hugging Face config.json of a model to train from random weights. Its vocab_size is replaced by that of a
    tokenizer which is trained on the tasks."""

    load_hf: Path | None = None
    """Hugging Face folder to start from: its config.json stands in for hf_config, and its weights and tokenizer are
    used as they are."""

    load_hf_drop_mtp: bool = False
    """Leave out the folder's layers that predict further tokens (MTP). They are an error otherwise."""
    params_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights in forward and backward; the optimizer keeps fp32 master weights."""
    recompute: bool = False
    """Recompute every layer's activations in the backward pass (Megatron's recompute_granularity full)."""
    logprob_chunk_tokens: int = 0
    """Tokens whose logits are held at once when log-probs are computed; 0: those of a whole microbatch. A large
    vocabulary needs it: fp32 logits of 8192 tokens and 150,000 words are 5 GB. The backward makes them again."""
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
        require(self.logprob_chunk_tokens >= 0, "model.logprob_chunk_tokens", self.logprob_chunk_tokens,
                "must be 0 or more", "Give 0 to hold all logits of a microbatch, or 1024.")  # fmt: skip
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
    """Shard the optimizer state over data-parallel ranks (ZeRO-1); over context-parallel ones too."""
    context_parallel_size: int | None = None
    """Ranks that share the tokens of every sequence in training. Each sequence is padded to a multiple of twice this
    size and cut into that many chunks; a rank computes one from the front and its mirror image from the back, so that
    causal attention costs all the same. Rollouts use these ranks as further data-parallel ones. None: 1, off."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Where stages are to be of unequal length: the first has the embedding besides. None: as the others."""
    num_layers_in_last_pipeline_stage: int | None = None
    """The last one has the LM head and the loss besides. None: as the others."""

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
                     "expert_tensor_parallel_size", "virtual_pipeline_model_parallel_size",
                     "context_parallel_size", "num_layers_in_first_pipeline_stage",
                     "num_layers_in_last_pipeline_stage"):  # fmt: skip
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
class RolloutConfig:
    """Sampling on the training model itself, with a key/value cache."""

    __pydantic_config__ = STRICT
    num_prompts: int = 32
    """Prompts a step, over all data-parallel (and context-parallel) ranks."""
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
class CheckpointConfig:
    """When a run writes what it needs to go on, and what it keeps of that. One is always written at the end."""

    __pydantic_config__ = STRICT
    interval: int = 25
    """Steps between checkpoints, in the warm start too; 0: only at the end."""
    keep_last: int = 2
    """The newest so many are kept."""
    keep_every: int = 0
    """Those of every so many steps are kept as well; 0: none."""
    keep_best: bool = True
    """The one with the highest eval/accuracy is kept as well, of those written at a step with an evaluation."""
    asynchronous: bool = True
    """Training goes on while a thread of each rank writes; that takes a copy of what the rank writes in host memory."""

    def __post_init__(self) -> None:
        for name in ("interval", "keep_every"):
            value = getattr(self, name)
            require(value >= 0, f"checkpoint.{name}", value, "must be 0 or more", "Give 0 for none.")
        positive("checkpoint", self, "keep_last")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: supervised warm start, then reinforcement learning on fresh prompts, or DPO on pairs."""

    __pydantic_config__ = STRICT
    name: str = "moe_gspo"
    """The run folder is output_dir/name. Where that exists: see resume."""
    output_dir: Path = Path("runs")
    resume: Literal["auto", "never"] = "auto"
    """auto: go on with the newest run of this name, if it is unfinished, has a checkpoint and the same recipe (only
    steps, intervals, layout and device may differ); otherwise, and with never, a new folder with a number added."""
    seed: int = 1
    """Of the initial weights, the prompts and the sampling. Layouts differ by rounding."""
    steps: int = 100
    """RL steps: rollouts, rewards, then num_minibatches optimizer steps. dpo: optimizer steps."""

    save_hf: bool = False
    """Write the final policy as a Hugging Face folder too: hf/ in the run folder, with its tokenizer."""
    eval_interval: int = 25
    """Steps between evaluations on held-out prompts (dpo: pairs); they also run before and after."""
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
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)

    def __post_init__(self) -> None:
        positive("train", self, "eval_interval", "max_tokens_per_microbatch")
        require(self.steps >= 0, "steps", self.steps, "must be 0 or more", "Give 0 to run the warm start alone.")
        require(
            len(self.tasks) > 0, "tasks", self.tasks, "must name at least one task", "For example spell_backward: {}."
        )
        require(self.rollout.group_size >= 2 or self.algorithm.name not in GROUP_NORMALISED, "rollout.group_size",
                self.rollout.group_size, f"{self.algorithm.name} compares the responses to one prompt, so it needs 2 "
                "or more", "The GSPO paper uses 8.")  # fmt: skip
