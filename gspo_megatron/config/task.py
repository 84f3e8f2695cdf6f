"""The recipe's `tasks` table says where prompts come from and what rewards the responses."""

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import regex

from gspo_megatron.config.constraints import STRICT, at_most, positive, require
from gspo_megatron.errors import ConfigError

TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
BUILT_IN = ("math_verify",)  # rewards that are named without a file
# Of tasks with `data` alone.
OF_DATA = (
    "eval_data", "prompt_key", "answer", "bad_rows", "overlong", "reward", "environment", "max_turns",
    "rewritten_history", "on_error", "isolate", "concurrency",
)  # fmt: skip


@dataclass(frozen=True)
class RewardConfig:
    """One reward function, and how much of the reward its score is."""

    __pydantic_config__ = STRICT
    function: str
    """"file.py:function", "package.module:function", or math_verify."""
    weight: float = 1.0
    """The score is multiplied by it; the reward is the sum."""

    def __post_init__(self) -> None:
        file, colon, name = self.function.rpartition(":")
        require(
            self.function in BUILT_IN or bool(colon and file and name.isidentifier()),
            "tasks.*.reward",
            self.function,
            'must be "file.py:function" or "module:function"',
            f"For example my_rewards.py:exact_number, or {', '.join(BUILT_IN)}.",
        )

    @property
    def name(self) -> str:
        """Return the function's own name, by which its scores are logged."""
        return self.function.rpartition(":")[2]


@dataclass(frozen=True)
class AnswerConfig:
    """Where a row of data has its gold answer."""

    __pydantic_config__ = STRICT
    column: str | None = None
    """The column: a text or a number, or messages of a whole episode in an environment. None: verl's
    reward_model.ground_truth, or TRL's `solution` or `answer`, if there is one."""
    after: str | None = None
    """The answer is what follows the last one of this text, for example "####" in GSM8K. None: all of the column."""


@dataclass(frozen=True)
class TaskConfig:
    """One task of the mixture: a data set of yours with reward functions, or a generator of reasoning-gym."""

    __pydantic_config__ = STRICT
    weight: float = 1.0
    """Share of the prompts, relative to the other tasks' weights."""
    options: dict[str, Any] = field(default_factory=dict)
    """reasoning-gym: keyword arguments of the task generator, for example {min_word_len: 3}."""
    answer_extractor: Literal["none", "last_line", "answer_tag", "boxed", "regex"] = "none"
    """What of a response the scorer judges. none: all of it. The last line, the last `<answer>...</answer>`, the last
    `\\boxed{...}`, or the last match of answer_pattern; a response that has none gets no reward. Scorers of
    reasoning-gym take off for every word beside the answer, so a model that is to think before it answers needs one."""
    answer_pattern: str | None = None
    """For answer_extractor regex: a regular expression (of the package regex, as Python's re), for example
    '#### (.+)'. Its group is the answer, or all of the match where it has no group."""
    data: Path | None = None
    """Your data: a JSONL or Parquet file, or a folder that a Hugging Face data set was saved to (save_to_disk)."""
    eval_data: Path | None = None
    """Held-out rows in the same form. None: an eighth of `data` is held out, by a hash of the prompt."""
    prompt_key: str = "prompt"
    """The column with the prompt: a text, or messages with role and content. TRL's and verl's data have `prompt`."""
    answer: AnswerConfig = field(default_factory=AnswerConfig)
    """Gold answers, for the warm start, where rows have any."""
    bad_rows: Literal["error", "drop"] = "error"
    """A row that cannot be used ends the start and is named, or is left out and counted."""
    overlong: Literal["error", "drop"] = "error"
    """The same for a prompt of more than data.max_prompt_length tokens."""
    system_prompt: str | None = None
    """Put before every conversation that does not begin with a system message of its own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Handed to the chat template, for example {enable_thinking: false}."""
    reward: tuple[RewardConfig, ...] = ()
    """What rewards the responses: "file.py:function", or a list of {function: ..., weight: ...}. TRL's
    `f(prompts, completions, **columns)` and verl's `compute_score(data_source, solution_str, ground_truth)` are
    known by their parameters (docs/your_data.md)."""
    environment: str | None = None
    """"file.py:Class" or "module:Class": what answers the model, turn by turn, and may reward it. The class has
    `reset(**columns)`, and `step(text) -> (observation, done)` or public methods that are tools
    (docs/environments.md)."""
    max_turns: int = 8
    """Responses of the model in one episode, at most; rollout.max_response_length holds for all of it together."""
    rewritten_history: Literal["error", "keep"] = "error"
    """Where the chat template writes an earlier turn otherwise than the model did (Qwen3 drops its thinking): error
    refuses the template; keep goes on from the tokens as they are, so the model sees what it will not see where the
    template is used."""
    on_error: float | Literal["drop"] = 0.0
    """The reward where a function raised, gave no number or took longer than faults.reward_timeout; drop: the response
    is not trained on, and its group is compared without it."""
    correct_at: float = 1.0
    """A reward of this or more counts as right in eval/accuracy."""
    isolate: Literal["none", "process"] = "none"
    """none: reward functions are trusted with network and files, in a process of their own that is ended when they take
    too long. process: behind walls as well, for functions that evaluate what the model wrote (docs/security.md)."""
    concurrency: int = 64
    """Responses that an async reward function is called for at the same time, on each rank that scores."""

    def __post_init__(self) -> None:
        positive("tasks.*", self, "weight", "concurrency", "max_turns")
        at_most("tasks.*", self, concurrency=10_000, max_turns=10_000)
        self._check_pattern()
        if self.data is None:
            self._check_generated()
            return
        require(
            not self.options,
            "tasks.*.options",
            self.options,
            "is for tasks of reasoning-gym, not for data",
            "Remove it.",
        )
        require(
            len(self.reward) > 0 or self.environment is not None,
            "tasks.*.reward",
            None,
            "responses to data of your own need one",
            "Give my_rewards.py:my_function, math_verify, or an environment that rewards.",
        )
        _check_environment(self.environment)
        names = [one.name for one in self.reward]
        require(
            len(set(names)) == len(names),
            "tasks.*.reward",
            names,
            "has one name twice, by which scores are logged",
            "Rename one of the functions.",
        )

    def _check_generated(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            require(
                entry.name not in OF_DATA or value == default,
                f"tasks.*.{entry.name}",
                value,
                "is for a task with data of its own",
                "Give data as well, or remove it.",
            )

    def _check_pattern(self) -> None:
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


def _check_environment(target: str | None) -> None:
    file, colon, name = (target or "file.py:Class").rpartition(":")
    require(
        bool(colon and file and name.isidentifier()),
        "tasks.*.environment",
        target,
        'must be "file.py:Class" or "module:Class"',
        "For example my_environment.py:Retry.",
    )
