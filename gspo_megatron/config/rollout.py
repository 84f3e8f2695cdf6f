"""The recipe's `rollout` section says how responses are sampled."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gspo_megatron.config.constraints import STRICT, at_most, positive, require


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling on the training model itself, with a key/value cache, or groups from files."""

    __pydantic_config__ = STRICT
    num_prompts: int = 32
    """Prompts a step, over all data-parallel (and context-parallel) ranks."""
    group_size: int = 8
    """G: responses a prompt."""
    max_response_length: int = 32
    """Tokens, the one that ends it included; a longer response is cut."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides the tokenizer's eos_token, the one that its chat template writes behind an
    answer, and eos_token_id (one or several) of generation_config.json and config.json in model.load_hf."""
    stop: tuple[str, ...] = ()
    """Texts that end a response as soon as it has one, over the borders of tokens and with special tokens written out.
    Rewards see the text before it, as vLLM gives it; its tokens stay in the response and are trained on, because the
    model chose them."""
    temperature: float = 1.0
    """Also divides the logits in old and new log-probs."""
    top_k: int = 0
    """Sample among the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this share of the probability; 1: all."""
    save: int = 0
    """Steps between two that write their groups to rollouts/step_NNNNNN.jsonl in the run folder; 0: none does."""
    engine: Literal["megatron", "files"] = "megatron"
    """megatron: the training model samples. files: groups are read from path, which another engine or run wrote;
    evaluations still sample."""
    path: Path | None = None
    """A file of groups, or a folder whose *.jsonl and *.parquet files are read in the order of their names, for the
    engine files (docs/your_data.md has the form)."""

    def __post_init__(self) -> None:
        positive("rollout", self, "num_prompts", "group_size", "max_response_length", "temperature", "top_p")
        at_most("rollout", self, num_prompts=1_000_000, group_size=10_000, max_response_length=10_000_000)
        require(
            1e-3 <= self.temperature <= 1e3,
            "rollout.temperature",
            self.temperature,
            "must be between 0.001 and 1000: it divides the logits, in fp32",
            "Give 1.0; evaluations measure greedy accuracy besides.",
        )
        for token in self.stop_token_ids:
            require(token >= 0, "rollout.stop_token_ids", token, "must be 0 or more", "Give ids of the vocabulary.")
        require("" not in self.stop, "rollout.stop", "", "an empty text is in every response", "Leave it out.")
        require(
            self.top_p <= 1, "rollout.top_p", self.top_p, "must be at most 1", "Give 1.0 to sample from all tokens."
        )
        require(self.save >= 0, "rollout.save", self.save, "must be 0 or more", "Give 0 to write none.")
        require(self.top_k >= 0, "rollout.top_k", self.top_k, "must be 0 or more", "Give 0 to sample from all tokens.")
