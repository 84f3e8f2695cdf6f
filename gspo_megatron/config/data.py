"""The recipe's `data` section says how long prompts may be, how many are held out, and how large the tokenizer is."""

from dataclasses import dataclass

from gspo_megatron.config.constraints import STRICT, at_most, positive, require


@dataclass(frozen=True)
class DataConfig:
    """Prompts and tokenizer."""

    __pydantic_config__ = STRICT
    vocab_size: int = 320
    """Most entries of the byte-pair tokenizer that is trained on the tasks and saved with the run."""
    max_prompt_length: int = 96
    """Tokens, chat template included; a longer prompt is an error, or left out (tasks.NAME.overlong), never cut."""
    num_eval_prompts: int = 256
    """Held-out prompts, disjoint from the warm start's and the RL stream's; at most as many as data have."""
    eval_samples: int = 4
    """Responses a held-out prompt, sampled as in the rollouts; accuracy is their mean (pass@1)."""

    def __post_init__(self) -> None:
        positive("data", self, "max_prompt_length", "num_eval_prompts", "eval_samples")
        at_most("data", self, num_eval_prompts=1_000_000, eval_samples=10_000, vocab_size=1_000_000)
        require(
            self.vocab_size >= 260,
            "data.vocab_size",
            self.vocab_size,
            "must be at least 260, the 256 bytes and the special tokens",
            "Give 320 or more.",
        )
