"""Questions, what a model wrote to them, and what a task thinks of it."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]  # role and content; name, of a tool


@dataclass(frozen=True)
class TaskItem:
    """A task item is one question of one task, with what its scorer needs."""

    task: str  # key of the recipe's `tasks` table
    question: str  # as people read it; of a conversation, its texts
    answer: str  # a gold answer, "" where there is none; the scorer may accept others
    entry: dict  # the task's own record, handed back to its scorer: the generator's, or the row's columns
    has_answer: bool = True
    messages: tuple[Message, ...] = ()  # the conversation that the prompt is; (): the question alone, as the user's
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # for the chat template
    episode: tuple[Message, ...] = ()  # a gold answer of several turns: the model's messages, others' between them
    epoch: int = 0  # how often the task had given all its rows before this one; 0 where it has no end

    @property
    def conversation(self) -> tuple[Message, ...]:
        """Return the messages of the prompt."""
        return self.messages or ({"role": "user", "content": self.question},)


@dataclass(frozen=True)
class Outcome:
    """An outcome is what came of an episode in an environment."""

    turns: int  # responses of the model
    messages: tuple[Message, ...]  # all behind the prompt, the model's and the environment's
    reward: float | None = None  # get_reward() and the turns' rewards, added; None: the environment gives none
    error: str | None = None  # what went wrong


@dataclass(frozen=True)
class Response:
    """A response is what a model wrote to an item, as a scorer gets it."""

    item: TaskItem
    text: str
    token_ids: list[int]
    where: str = ""  # for messages: which response to which prompt
    outcome: Outcome | None = None  # of an episode


@dataclass(frozen=True)
class Score:
    """A score is what a task thinks of a response."""

    reward: float | None  # any finite number; None: there is none, and the response is left out
    parts: dict[str, float] = field(default_factory=dict)  # by the names of reward functions, before weights
    error: str | None = None  # what went wrong, where `reward` is the recipe's on_error


@dataclass(frozen=True)
class Prompt:
    """A prompt is a tokenized question. `uid` is its position in the prompt stream, unique within a run and a split."""

    uid: int
    item: TaskItem
    token_ids: list[int]  # already through the chat template, ends where the response begins
