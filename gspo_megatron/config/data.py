"""The recipe's `tasks` and `data` sections say where prompts come from, and how large the tokenizer is."""

from dataclasses import dataclass, field
from typing import Any, Literal

import regex

from gspo_megatron.config.constraints import STRICT, at_most, positive, require
from gspo_megatron.errors import ConfigError


@dataclass(frozen=True)
class TaskConfig:
    """One reasoning-gym task of the mixture."""

    __pydantic_config__ = STRICT
    weight: float = 1.0
    """Share of the prompts, relative to the other tasks' weights."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the task generator, for example {min_word_len: 3}."""
    answer_extractor: Literal["none", "last_line", "answer_tag", "boxed", "regex"] = "none"
    """What of a response the scorer judges. none: all of it. The last line, the last `<answer>...</answer>`, the last
    `\\boxed{...}`, or the last match of answer_pattern; a response that has none gets no reward. Scorers of
    reasoning-gym take off for every word beside the answer, so a model that is to think before it answers needs one."""
    answer_pattern: str | None = None
    """For answer_extractor regex: a regular expression (of the package regex, as Python's re), for example
    '#### (.+)'. Its group is the answer, or all of the match where it has no group."""

    def __post_init__(self) -> None:
        positive("tasks.*", self, "weight")
        is_regex, pattern = self.answer_extractor == "regex", self.answer_pattern
        require(
            is_regex == (pattern is not None),
            "tasks.*.answer_pattern",
            pattern,
            f"belongs to answer_extractor regex, and that is {self.answer_extractor}",
            "Give both or neither.",
        )
        try:
            groups = regex.compile(pattern or "").groups
        except regex.error as error:
            raise ConfigError(
                f"tasks.*.answer_pattern = {pattern!r}: not a regular expression ({error}). Correct it."
            ) from None
        require(
            groups <= 1, "tasks.*.answer_pattern", pattern, "must have at most one group, the answer", "Write (?:...)."
        )


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
        at_most("data", self, num_eval_prompts=1_000_000, eval_samples=10_000, vocab_size=1_000_000)
        require(
            self.vocab_size >= 260,
            "data.vocab_size",
            self.vocab_size,
            "must be at least 260, the 256 bytes and the special tokens",
            "Give 320 or more.",
        )
