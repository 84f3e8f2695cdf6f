"""A weighted mixture of tasks: random access to questions, three disjoint splits, scores.

Nothing here keeps a position: `item(split, index)` is a pure function of the mixture's seed, the data and its
arguments, so every rank can draw any prompt and a resumed run needs one integer. Left out: tokenization and the order
of prompts (data/prompts.py).
"""

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gspo_megatron.batch import Response, Score, TaskItem
from gspo_megatron.config import TaskConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.errors import RolloutError
from gspo_megatron.tasks.answers import AnswerExtractor
from gspo_megatron.tasks.dataset import DatasetTask, Scorer
from gspo_megatron.tasks.environments import EnvironmentRunner
from gspo_megatron.tasks.isolation import ScoringProcess
from gspo_megatron.tasks.reasoning_gym import ReasoningGymTask
from gspo_megatron.tasks.splits import SPLITS, hash64
from gspo_megatron.tasks.task import Task, Told


class TaskMixture:
    """Questions of several tasks, drawn by weight.

    `tasks`: the recipe's table. `seed`: any integer; another seed is another order of questions within the same splits.
    `process`: where reasoning-gym's scorers run; None: in this one, for text that no model wrote. `rewards`: what
    scores responses to data, `environments`: what answers them turn by turn, both by the task's name. Raises
    ConfigError for a task that cannot be used.
    """

    def __init__(
        self,
        tasks: dict[str, TaskConfig],
        seed: int,
        process: ScoringProcess | None = None,
        rewards: Mapping[str, Scorer] | None = None,
        environments: Mapping[str, EnvironmentRunner] | None = None,
    ):
        require(len(tasks) > 0, "tasks", tasks, "must name at least one task", "For example spell_backward: {}.")
        self.seed = seed
        self.environments = dict(environments or {})
        self.schemas: dict[str, tuple[dict, ...]] = {}  # of tools, by task; `use_tools` gives them
        self.names = sorted(tasks)  # so that the order of lines in a recipe does not matter
        self._configs = tasks
        self._weights: list[tuple[int, list[float]]] = []  # from which question on, and sums up to each task
        self.weights_were([])
        self._extractors = {name: AnswerExtractor.of(tasks[name]) for name in self.names}
        self._turns: defaultdict[str, _Turns] = defaultdict(_Turns)
        self.tasks: dict[str, Task] = {}
        for name in self.names:
            if tasks[name].data is None:
                self.tasks[name] = ReasoningGymTask(name, tasks[name], seed, process)
            else:
                self.tasks[name] = DatasetTask(name, tasks[name], seed, (rewards or {}).get(name))

    @property
    def data(self) -> dict[str, DatasetTask]:
        """Return the tasks whose prompts are rows of data, by name."""
        return {name: task for name, task in self.tasks.items() if isinstance(task, DatasetTask)}

    def use_tools(self, schemas: Mapping[str, tuple[dict, ...]]) -> None:
        """From here on, prompts of these tasks tell of such tools."""
        self.schemas = dict(schemas)

    def weights_were(self, earlier: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Draw prompts by other weights up to some places of the stream, and by the recipe's behind the last of them.

        Questions of the other splits are drawn by the first weights: held-out ones stay the same.

        Args:
            earlier: the number of the question up to which weights held, and the weights by task; in order.
        """
        starts = [0, *(end for end, _ in earlier)]
        weights = [*(one for _, one in earlier), {name: task.weight for name, task in self._configs.items()}]
        self._weights = [
            (start, list(itertools.accumulate(one[name] for name in self.names)))
            for start, one in zip(starts, weights, strict=True)
        ]

    def item(self, split: str, index: int) -> TaskItem:
        """Return question number `index` >= 0 of "train", "warm_start" or "eval": the same one at every call and rank.

        Raises ConfigError when the task has no question in this split, RolloutError when its generator always fails.
        """
        if split not in SPLITS or index < 0:
            raise ValueError(f"item({split!r}, {index}): split must be one of {list(SPLITS)} and index 0 or more.")
        place = self._place(split, index)
        task = self.tasks[self.names[place]]
        if task.size(split) is None:
            item = task.item(split, index)
        else:  # its rows follow each other, whatever other tasks are drawn between them
            item = task.item(split, self._turns[split].before(index, lambda at: self._place(split, at)))
        return self.as_asked(item)

    def as_asked(self, item: TaskItem) -> TaskItem:
        """Return a task's item with the recipe's system prompt and template arguments."""
        config = self._configs[item.task]
        messages = item.messages
        if config.system_prompt is not None and item.conversation[0]["role"] != "system":
            messages = ({"role": "system", "content": config.system_prompt}, *item.conversation)
        return replace(item, messages=messages, template_kwargs=self.template_kwargs(item.task))

    def template_kwargs(self, name: str) -> dict[str, Any]:
        """Return what the chat template is given for a task: the recipe's arguments, and the tools."""
        tools = {"tools": list(schemas)} if (schemas := self.schemas.get(name)) else {}
        return self._configs[name].chat_template_kwargs | tools

    def score(self, item: TaskItem, response_text: str) -> float | None:
        """Return one reward, as score_all does; token ids are not known."""
        return self.score_all([Response(item, response_text, [])])[0].reward

    def score_all(self, responses: Sequence[Response], told: Told = lambda done: None) -> list[Score]:
        """Return what the tasks think of responses, in their order. Full marks are `correct_at` of their task.

        Args:
            told: called with the number of responses that have a score.

        Raises:
            RolloutError: a scorer always fails, or gave no finite number.
        """
        scores: dict[int, Score] = {}

        def tell(done: int) -> None:
            told(len(scores) + done)

        for name in self.names:
            places = [place for place, response in enumerate(responses) if response.item.task == name]
            found = self.tasks[name].score([responses[place] for place in places], tell)
            scores |= zip(places, found, strict=True)
        return [scores[place] for place in range(len(responses))]

    def is_correct(self, item: TaskItem, reward: float | None) -> bool:
        """Tell whether a reward is full marks of its task: `correct_at` or more."""
        return reward is not None and reward >= self._configs[item.task].correct_at

    def gold_response(self, item: TaskItem) -> str:
        """Return a response with the gold answer as the task's extractor finds it; of a gold episode the last message.

        Raises:
            ConfigError: as AnswerExtractor.write, or the extractor finds no answer in an episode's last message.
            RolloutError: the task has no gold answer.
        """
        if not item.has_answer:
            raise RolloutError(
                f"tasks.{item.task}: this task has no gold answer to learn from. Set warm_start.steps = 0 "
                "or take the task out of the recipe."
            )
        extractor, where = self._extractors[item.task], f"tasks.{item.task}"
        if not item.episode:
            return extractor.write(item.answer, where)
        last = item.episode[-1]["content"]
        require(
            bool(extractor.find(last)),
            f"{where}.answer_extractor",
            extractor.name,
            f"finds no answer in {last[-200:]!r}, the last message of a gold episode",
            "Write the answer there as the extractor reads it, or choose another one.",
        )
        return last

    def close(self) -> None:
        """End what runs for the tasks."""
        for task in self.tasks.values():
            task.close()
        for runner in self.environments.values():
            runner.close()

    def _place(self, split: str, index: int) -> int:
        """The number of the task that gives this question."""
        held = [sums for start, sums in self._weights if start <= index] if split == "train" else [self._weights[0][1]]
        point = hash64("task", self.seed, split, index) / 2**64 * held[-1][-1]
        return min(bisect_right(held[-1], point), len(self.names) - 1)  # the quotient may round up to 1


class _Turns:
    """Counts how often each task was drawn before a question, as far as it was asked for; a hash a question."""

    def __init__(self) -> None:
        self._numbers: list[int] = []  # of each question: how many of the same task came before
        self._totals: defaultdict[int, int] = defaultdict(int)

    def before(self, index: int, place_of: Callable[[int], int]) -> int:
        for at in range(len(self._numbers), index + 1):
            drawn = place_of(at)
            self._numbers.append(self._totals[drawn])
            self._totals[drawn] += 1
        return self._numbers[index]
