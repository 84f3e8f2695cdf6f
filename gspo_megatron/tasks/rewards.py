"""Rewards of responses to rows of data, by the user's own functions.

The functions run in a process beside the rank (reward_process.py). The reward of a response is the sum of weight times
score over the functions that apply to it: None leaves one out. Where a function fails at a response (it raises, returns
no finite number, takes longer than faults.reward_timeout, or ends its process), the response gets the recipe's
`on_error` and the others go on (reward_calls.py); where all responses of a call fail, the run ends with the reason.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

from gspo_megatron.batch import Response, Score
from gspo_megatron.config import FaultsConfig, TaskConfig
from gspo_megatron.errors import ConfigError, RolloutError
from gspo_megatron.tasks.answers import AnswerExtractor
from gspo_megatron.tasks.reward_calls import TAKING, Asking, Loaded
from gspo_megatron.tasks.reward_functions import COLUMNS, MATH, Row, delimited
from gspo_megatron.tasks.reward_worker import PROGRAM, RewardProcess
from gspo_megatron.tasks.task import Told, failed
from gspo_megatron.tasks.user_code import UserCode

PAUSE = 0.1  # seconds between two words on how far it is
LARGEST = 1e30  # a reward whose square and fp32 form are still finite
WITH_WORDS = ("none", "last_line")  # extractors that do not leave the answer alone


class RewardRunner:
    """The reward functions of one task, in a process of their own that is started when it is needed, or by `start`.

    `name`: key of the recipe's table. The file of a function is given by its absolute path.
    """

    def __init__(self, name: str, config: TaskConfig, faults: FaultsConfig):
        self.name, self.config, self._seconds = name, config, faults.reward_timeout
        targets = [reward.function for reward in config.reward]
        self._code = UserCode(f"tasks.{name}.reward", targets, config, faults, PROGRAM, self._functions)

    def start(self) -> None:
        """Returns at once; the process comes up in the background."""
        self._code.start()

    def check(self, columns: Collection[str] | None = None) -> list[str]:
        """Wait until the functions are found, and return a sentence on each one's form.

        Args:
            columns: of the data; None: not known yet.

        Raises:
            ConfigError: one cannot be loaded, has no form that is known, or wants a column that the data have not.
        """
        functions = self._code.loaded()
        if columns is not None:
            self._check_columns(functions, columns)
        return [function.note(self.config.concurrency) for function in functions]

    def score(self, responses: Sequence[Response], told: Told) -> list[Score]:
        """Return one score a response, in their order.

        Raises:
            ConfigError: as check().
            RolloutError: all of at least 2 responses failed.
        """
        if not responses:
            return []
        functions = self._code.loaded()
        rows = _rows(responses, functions, self.config)
        self._check_columns(functions, list(dict.fromkeys(name for one in responses for name in one.item.entry)))
        held = 0  # number of the process that has the rows

        def ready() -> RewardProcess:
            nonlocal held
            self._code.loaded()
            process = self._code.process
            if process.number != held:
                process.send(("take", rows), TAKING)
                process.answers(time.monotonic() + TAKING, TAKING)
                held = process.number
            return process

        call = _Call(self.name, self.config, functions, len(rows), told)
        try:
            for function in functions:
                Asking(function, self._seconds, self.config.concurrency, ready, call.taker(function)).run(call.left())
        except BaseException:
            self.close()  # its next answers would be of this call
            raise
        return call.scores()

    def close(self) -> None:
        """End the process and what it started."""
        self._code.close()

    def _functions(self, told: list[dict[str, Any]]) -> list[Loaded]:
        return [
            Loaded(number, reward.function, reward.name, reward.weight, **one)
            for number, (reward, one) in enumerate(zip(self.config.reward, told, strict=True))
        ]

    def _check_columns(self, functions: Sequence[Loaded], columns: Collection[str]) -> None:
        for function in functions:
            missing = [name for name in function.required if name not in columns]
            if missing:
                raise ConfigError(
                    f"tasks.{self.name}.reward = {function.target!r}: it wants {', '.join(missing)}, and the columns "
                    f"of the data are {', '.join(columns)}. Give the parameter a default, or add the column."
                )


class _Call:
    """What is known by now of the responses of one call of `score`."""

    def __init__(self, name: str, config: TaskConfig, functions: Sequence[Loaded], count: int, told: Told):
        self._name, self._config, self._functions, self._count, self._told = name, config, functions, count, told
        self._scores: list[dict[str, float | None]] = [{} for _ in range(count)]  # by function
        self._extra: list[dict[str, float]] = [{} for _ in range(count)]
        self._failed: dict[int, tuple[str, str]] = {}  # place -> the function, and why
        self._answers, self._next_word = 0, 0.0

    def left(self) -> list[int]:
        """Return the responses at which no function has failed."""
        return [place for place in range(self._count) if place not in self._failed]

    def taker(self, function: Loaded) -> Callable[[int, dict[str, Any]], None]:
        """Return what takes a function's answers."""

        def take(place: int, answer: dict[str, Any]) -> None:
            if "error" in answer:
                self._failed[place] = (function.target, answer["error"])
            else:
                self._scores[place][function.name] = answer["score"]
                self._extra[place] |= {f"{function.name}/{key}": v for key, v in answer.get("extra", {}).items()}
            self._answers += 1
            if time.monotonic() >= self._next_word:
                self._told(self._answers // len(self._functions))
                self._next_word = time.monotonic() + PAUSE

        return take

    def scores(self) -> list[Score]:
        """Return the scores of all. Raises RolloutError where all of at least 2 responses failed."""
        rewards = [self._reward(place) for place in range(self._count)]
        if self._count > 1 and len(self._failed) == self._count:
            raise RolloutError(self._why_all())
        self._told(self._count)
        return [self._score(place, reward) for place, reward in enumerate(rewards)]

    def _reward(self, place: int) -> float:
        """The weighted sum over the functions that apply; notes a failure where there is none."""
        scores = self._scores[place]
        applied = [f.weight * value for f in self._functions if (value := scores.get(f.name)) is not None]
        reward = sum(applied)
        if not applied or not abs(reward) <= LARGEST:
            limit = f"gave {reward:g}, and a reward is at most {LARGEST:g}"
            targets = ", ".join(function.target for function in self._functions)
            self._failed.setdefault(place, (targets, limit if applied else "returned None, so nothing rewards it"))
        return reward

    def _score(self, place: int, reward: float) -> Score:
        parts = {name: value for name, value in self._scores[place].items() if value is not None} | self._extra[place]
        if place not in self._failed:
            return Score(reward, parts)
        target, reason = self._failed[place]
        return failed(self._config, parts, f"reward {target.rpartition(':')[2]} {reason}")

    def _why_all(self) -> str:
        (target, reason), count = Counter(self._failed.values()).most_common(1)[0]
        on = f"on each of {count} responses"
        if count < self._count:
            on = f"on {count} of {self._count} responses, and the others failed as well"
        return f"tasks.{self._name}: reward {target!r} {reason} {on}. Correct it."


def _rows(responses: Sequence[Response], functions: Sequence[Loaded], config: TaskConfig) -> list[Row]:
    """What the process gets of each response: no column that no function takes. Columns of one item are one object."""
    taken = {name for function in functions for name in COLUMNS.get(function.form, function.takes or ())}
    takes_all = any(function.takes is None and function.form not in COLUMNS for function in functions)
    has_ids = takes_all or "completion_ids" in taken
    has_math = any(function.form == MATH for function in functions)
    extractor = AnswerExtractor.of(config)
    columns: dict[int, dict[str, Any]] = {}
    rows = []
    for response in responses:
        item = response.item
        if id(item.entry) not in columns:
            names = item.entry if takes_all else taken
            columns[id(item.entry)] = {name: item.entry[name] for name in names if name in item.entry}
        answer = extractor.find(response.text) if has_math else None
        if answer is not None and extractor.name not in WITH_WORDS:
            answer = delimited(answer)
        rows.append(
            Row(
                item.entry.get(config.prompt_key, item.question),
                response.text,
                response.token_ids if has_ids else [],
                item.task,
                item.answer if item.has_answer else None,
                columns[id(item.entry)],
                answer,
                response.outcome.messages if response.outcome else (),
            )
        )
    return rows
