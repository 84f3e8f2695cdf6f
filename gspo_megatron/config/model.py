"""The recipe's `model` section has the policy network, and the parts of MoE routing that GSPO leaves alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gspo_megatron.config.constraints import STRICT, require

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
    """Must stay 0: dropout makes the ratio differ from 1 at equal weights."""
    attention_dropout: float = 0.0
    """Must stay 0, likewise."""

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
        require(
            self.logprob_chunk_tokens >= 0,
            "model.logprob_chunk_tokens",
            self.logprob_chunk_tokens,
            "must be 0 or more",
            "Give 0 to hold all logits of a microbatch, or 1024.",
        )
        require(
            self.moe_aux_loss_coeff >= 0,
            "model.moe_aux_loss_coeff",
            self.moe_aux_loss_coeff,
            "must be 0 or more",
            "Leave it at 0 unless you want a load-balancing loss.",
        )
