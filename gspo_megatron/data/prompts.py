"""The stream of prompts has the questions of one split, through the chat template, as token ids.

Every rank builds the same stream from the same mixture, so prompts need no broadcast and the state of a stream is one
integer. The stream has no end: rows of data come again in another order. Left out: cutting a long prompt (it would ask
another question).
"""

import time
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from gspo_megatron.batch import Prompt, TaskItem, TrainSequence
from gspo_megatron.config import TaskConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.data.chat import example_tokens, question_tokens
from gspo_megatron.data.turns import episode_tokens
from gspo_megatron.errors import CheckpointError, RolloutError
from gspo_megatron.tasks.mixture import TaskMixture


class PromptSource:
    """Gives endless prompts of one split, in an order that the mixture's seed fixes.

    `tokenizer`: any Hugging Face tokenizer with a chat template. `max_prompt_length`: in tokens, template included.
    Raises ConfigError for a tokenizer that has none.
    """

    def __init__(self, mixture: TaskMixture, tokenizer: PreTrainedTokenizerBase, split: str, max_prompt_length: int):
        require(
            tokenizer.chat_template is not None,
            "tokenizer.chat_template",
            None,
            "prompts are built with it",
            "Use the instruction-tuned model's tokenizer, or set its chat_template.",
        )
        self.mixture = mixture
        self.tokenizer = tokenizer
        self.split = split
        self.max_prompt_length = max_prompt_length
        self.position = 0

    def next(self, n: int) -> list[Prompt]:
        """Return the following n prompts. Raises RolloutError, and stays where it is, when one is too long."""
        prompts = [self._prompt(uid) for uid in range(self.position, self.position + n)]
        self.position += n
        return prompts

    def fixed(self, n: int) -> list[Prompt]:
        """Return prompts 0 to n - 1, wherever the stream is: the same set at each evaluation. A row of data is there
        once, so there may be fewer."""
        items = [(uid, self.mixture.item(self.split, uid)) for uid in range(n)]
        return [Prompt(uid, item, self.encode_prompt(item)) for uid, item in items if item.epoch == 0]

    def look_ahead(self, uids: Iterable[int], seconds: float) -> None:
        """Draw prompts that will come, as far as they are drawn in that time, so that one that is too long is found now
        and not in the middle of a run. Raises RolloutError for it."""
        deadline = time.monotonic() + seconds
        for uid in uids:
            self._prompt(uid)
            if time.monotonic() > deadline:
                return

    def encode_prompt(self, item: TaskItem) -> list[int]:
        """Return token ids of a question up to where the response begins.

        Raises RolloutError for more than max_prompt_length tokens.
        """
        token_ids = self._encode(item)
        self._check_length(item, token_ids)
        return token_ids

    def length(self, item: TaskItem) -> int:
        """Return how many tokens a question has, whatever the limit."""
        return len(self._encode(item))

    def encode_example(self, item: TaskItem, stop_token_ids: tuple[int, ...]) -> TrainSequence:
        """Return a question and its gold answer, written as the task's extractor wants it, as a supervised example. Of
        a gold episode, the model's turns are trained, as they are.

        Raises RolloutError for a task that has a scorer but no gold answer, or a prompt that is too long.
        """
        where = f"tasks.{item.task}, answer {item.answer[:60]!r}"
        tokenizer, asked, options = self.tokenizer, item.conversation, item.template_kwargs
        mask: list[int] | None = None
        gold = self.mixture.gold_response(item)
        if item.episode:
            prompt, response, mask = episode_tokens(tokenizer, stop_token_ids, asked, item.episode, where, options)
        else:
            prompt, response = example_tokens(tokenizer, stop_token_ids, asked, gold, where, options)
        self._check_length(item, prompt)
        return TrainSequence(prompt + response, len(prompt), loss_mask=mask)

    def row_lengths(self, first: int = 0, every: int = 1) -> dict[tuple[str, int], int]:
        """Return how many tokens the prompt of each row of data has, by task and place in its every().

        Args:
            first, every: measure row `first` and each `every` rows after it: ranks share the work.
        """
        items = {(name, i): row.item for name, task in self.mixture.data.items() for i, row in enumerate(task.every())}
        mine = list(items)[first::every]
        return {key: self.length(self.mixture.as_asked(items[key])) for key in mine}

    def hold_to_limit(self, tasks: dict[str, TaskConfig], lengths: dict[tuple[str, int], int]) -> list[str]:
        """Leave out the rows that are too long where the recipe says so. Returns sentences for the user.

        Args:
            lengths: of all rows, as row_lengths gives them.

        Raises:
            ConfigError: a row is too long and the recipe does not say so, or no row is left.
        """
        notes, limit = [], self.max_prompt_length
        for name, task in self.mixture.data.items():
            rows = task.every()
            long = [place for place in range(len(rows)) if lengths[name, place] > limit]
            if not long:
                continue
            longest = max(lengths[name, place] for place in long)
            require(
                tasks[name].overlong == "drop",
                "data.max_prompt_length",
                limit,
                f"{len(long)} of {len(rows)} prompts of tasks.{name} have more tokens, the first of them "
                f"{rows[long[0]].where}",
                f"Give {longest} for the longest, or tasks.{name}.overlong drop.",
            )
            task.keep([lengths[name, place] <= limit for place in range(len(rows))])
            notes.append(f"tasks.{name}: {len(long)} of {len(rows)} prompts have more than {limit} tokens: left out")
        return notes

    def _encode(self, item: TaskItem) -> list[int]:
        return question_tokens(self.tokenizer, item.conversation, item.template_kwargs)

    def _check_length(self, item: TaskItem, token_ids: list[int]) -> None:
        if len(token_ids) > self.max_prompt_length:
            raise RolloutError(
                f"data.max_prompt_length = {self.max_prompt_length}: a prompt of tasks.{item.task} has "
                f"{len(token_ids)} tokens. Give data.max_prompt_length at least {len(token_ids)}, or "
                f"narrow tasks.{item.task}.options."
            )

    def state_dict(self) -> dict[str, int]:
        """Return where the stream is; the rest comes from the recipe."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind a saved position. Raises CheckpointError for a state of another kind."""
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise CheckpointError(
                f"prompt stream: position = {position!r} must be an integer of 0 or more. The "
                "checkpoint is damaged or of another program; resume from an earlier one."
            )
        self.position = position

    def _prompt(self, uid: int) -> Prompt:
        item = self.mixture.item(self.split, uid)
        return Prompt(uid=uid, item=item, token_ids=self.encode_prompt(item))
