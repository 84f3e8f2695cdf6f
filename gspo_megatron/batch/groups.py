"""Sampled responses, and groups of them to one prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from gspo_megatron.batch.items import Outcome, Prompt, Score, TaskItem
from gspo_megatron.routing.rollout_routes import SequenceRoutes

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Turns:
    """These are the turns of the model in a response; what others wrote in between has loss_mask 0."""

    starts: tuple[int, ...]  # the place of each turn's first token in the response; the first is 0
    rewards: tuple[float, ...]  # one a turn, 0 where it has none; the response's reward contains them

    def fault(self, length: int) -> str | None:
        """Say what is wrong with them for a response of so many tokens; None where nothing is."""
        if not self.starts or self.starts[0] != 0:
            return f"starts = {list(self.starts)[:8]} must begin with 0, the first turn's first token"
        wrong = next((i for i, (a, b) in enumerate(pairwise((*self.starts, length))) if a >= b), None)
        if wrong is not None:
            return (
                f"starts[{wrong}] = {self.starts[wrong]} must be below the next one and {length}, the response's tokens"
            )
        if len(self.rewards) != len(self.starts):
            return f"{len(self.rewards)} rewards for {len(self.starts)} starts, must be one a turn"
        wrong = next((i for i, value in enumerate(self.rewards) if not math.isfinite(value)), None)
        return None if wrong is None else f"rewards[{wrong}] = {self.rewards[wrong]} must be finite"


@dataclass(frozen=True)
class Completion:
    """A completion is one sampled response; the token that ended it, when one did, is its last token."""

    token_ids: list[int]
    logprobs: list[float] | None  # log p under the sampling policy at the rollout temperature, one a token
    truncated: bool  # cut at max_response_length: neither a stop token nor a stop string ended it
    routes: SequenceRoutes | None = None  # of prompt and response, this stage's layers; where the engine records them
    loss_mask: list[int] | None = None  # 0 or 1 a token: what others wrote (a tool) is 0; None: all are trained
    outcome: Outcome | None = None  # of an episode
    versions: tuple[int, ...] = ()  # of the weights that sampled it: batches of RL learned from; (): not known
    turns: Turns | None = None  # of an episode; None: it is one

    @property
    def finish_reason(self) -> FinishReason:
        """Return why it ended, in the word that inference engines have for it."""
        return "length" if self.truncated else "stop"


@dataclass
class RolloutGroup:
    """A group is G responses to one prompt with their scores (`group_size` of the recipe)."""

    prompt: Prompt
    completions: list[Completion]
    scores: list[Score] = field(default_factory=list)  # the task's own, before any penalty
    texts: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        prompt_ids: list[int],
        responses: list[list[int]],
        rewards: Sequence[float | None],
        logprobs: Sequence[list[float]] | None = None,
        loss_masks: Sequence[list[int]] | None = None,
        truncated: Sequence[bool] | None = None,
        task: str = "task",
        uid: int = -1,
        turns: Sequence[Turns | None] | None = None,
    ) -> "RolloutGroup":
        """Return a group of what another system has.

        Args:
            prompt_ids: tokens up to where the responses begin.
            responses: their tokens, the one that ended a response with it.
            rewards: one each; None leaves a response out.
            logprobs: that the sampling engine gave, one a token, at the recipe's temperature.
            loss_masks: 0 at tokens that somebody else wrote, else 1.
            truncated: cut at the limit.
            task: for metrics.
            uid: a number of 0 or more that no other group of the step has; -1: its place in the step.
            turns: for algorithm.advantage_level: turn; None: each response is one.

        Raises:
            ValueError: lists that differ in length.
        """
        given = {
            "rewards": rewards,
            "logprobs": logprobs,
            "loss_masks": loss_masks,
            "truncated": truncated,
            "turns": turns,
        }
        for name, values in given.items():
            if values is not None and len(values) != len(responses):
                raise ValueError(f"{name} has {len(values)} entries for {len(responses)} responses: give one each.")
        completions = [
            Completion(
                ids,
                logprobs[i] if logprobs else None,
                bool(truncated[i]) if truncated else False,
                loss_mask=loss_masks[i] if loss_masks else None,
                turns=turns[i] if turns else None,
            )
            for i, ids in enumerate(responses)
        ]
        prompt = Prompt(uid, TaskItem(task, "", "", {}), prompt_ids)
        return cls(prompt, completions, [Score(reward) for reward in rewards], [""] * len(responses))

    @property
    def rewards(self) -> list[float]:
        """Return the rewards, 0 for a response that has none."""
        return [score.reward or 0.0 for score in self.scores]

    @property
    def is_kept(self) -> list[bool]:
        """Tell of each response whether it has a reward; those without are neither trained on nor compared with."""
        return [score.reward is not None for score in self.scores]

    @property
    def has_signal(self) -> bool:
        """Tell whether the task's rewards differ: an answer was better than another."""
        return len({score.reward for score in self.scores if score.reward is not None}) > 1
