"""A rank's side of users' environments: episodes are opened, answered and rewarded in a process beside it.

Nothing that an environment does ends a run: what raises, gives no value that is one, hangs (faults.reward_timeout) or
ends its process fails its episode, which gets the recipe's `on_error`; an end of the process fails all that are open.
Where all episodes of a call fail, the run ends with the reason.
"""

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gspo_megatron.batch import Message, Response, Score
from gspo_megatron.config import FaultsConfig, TaskConfig
from gspo_megatron.errors import RolloutError
from gspo_megatron.tasks.dataset import Scorer
from gspo_megatron.tasks.reward_calls import GRACE, TAKING
from gspo_megatron.tasks.reward_worker import Lost
from gspo_megatron.tasks.task import Told, failed
from gspo_megatron.tasks.user_code import UserCode

PROGRAM = "gspo_megatron.tasks.environment_process"


@dataclass(frozen=True)
class Loaded:
    """A class as the process has found it."""

    is_game: bool
    has_reward: bool
    takes: tuple[str, ...] | None  # columns; None: all
    required: tuple[str, ...]
    tools: tuple[str, ...]
    schemas: tuple[dict[str, Any], ...]  # of the tools, for the chat template

    @classmethod
    def of(cls, told: dict[str, Any]) -> "Loaded":
        """Return it as the process tells it."""
        values: dict[str, Any] = {key: tuple(one) if isinstance(one, list) else one for key, one in told.items()}
        return cls(**values)


@dataclass(frozen=True)
class Observed:
    """What an environment answered at one episode."""

    observation: str | None = None  # of reset()
    messages: tuple[Message, ...] = ()  # that the model sees next
    done: bool = False
    reward: float | None = None
    error: str | None = None  # what went wrong; the episode is over

    @classmethod
    def of(cls, answer: dict[str, Any]) -> "Observed":
        """Return it as the process tells it."""
        messages = tuple(answer.pop("messages", ()))
        return cls(**answer, messages=messages)


class EnvironmentRunner:
    """The episodes of one task, in a process of their own that is started when it is needed, or by `start`.

    `name`: key of the recipe's table. The class's file is given by its absolute path.
    """

    def __init__(self, name: str, config: TaskConfig, faults: FaultsConfig):
        self.name, self.config, self._seconds = name, config, faults.reward_timeout
        field, targets = f"tasks.{name}.environment", [str(config.environment)]
        self._code = UserCode(field, targets, config, faults, PROGRAM, Loaded.of)
        self._is_clogged = False  # an episode hangs in a thread

    def start(self) -> None:
        """Returns at once; the process comes up in the background."""
        self._code.start()

    def check(self, columns: Collection[str]) -> list[str]:
        """Wait until the class is found, and return a sentence about it.

        Raises:
            ConfigError: it cannot be loaded, is no environment, wants a column that the data have not, or nothing
                rewards its episodes.
        """
        known = self.loaded()
        if absent := [name for name in known.required if name not in columns]:
            self._code.refuse(
                f"reset wants {', '.join(absent)}, and the columns of the data are {', '.join(columns)}. Give the "
                "parameter a default, or add the column."
            )
        if not known.is_game and not known.has_reward and not self.config.reward:
            self._code.refuse("it has no get_reward(), and there is no reward function. Add one of them.")
        what = "step(text)" if known.is_game else f"tools {', '.join(known.tools)}"
        by = ["get_reward()"] * known.has_reward + ["the turns' rewards"] * known.is_game
        rewarded = " and ".join(by) or "functions alone"
        return [f"{self.config.environment}: {what}, at most {self.config.max_turns} turns, rewarded by {rewarded}"]

    def loaded(self) -> Loaded:
        """Return the class; the process runs then, a new one where it had ended. Raises ConfigError."""
        return self._code.loaded()

    def open(self, rows: Mapping[int, dict[str, Any]], keep: Callable[[], None]) -> dict[int, Observed]:
        """Begin one episode a row, by number; those before are forgotten.

        Args:
            keep: called as answers come.

        Raises:
            ConfigError: the class cannot be loaded any more.
        """
        if self._is_clogged:
            self.close()
        known = self.loaded()
        takes = known.takes
        cut: dict[int, dict[str, Any]] = {}  # what reset takes of each row, once a row
        for row in rows.values():
            cut.setdefault(id(row), row if takes is None else {key: row[key] for key in takes if key in row})
        return self._asked("open", list(rows), [(place, cut[id(row)]) for place, row in rows.items()], keep)

    def turn(self, texts: Mapping[int, str], keep: Callable[[], None]) -> dict[int, Observed]:
        """Hand episodes a response each."""
        return self._asked("turn", list(texts), list(texts.items()), keep)

    def rewards(self, places: Collection[int], keep: Callable[[], None]) -> dict[int, Observed]:
        """Return what get_reward() gives for these episodes, nothing where the class has none."""
        known = self._code.known
        if known is None or not known.has_reward:
            return {place: Observed() for place in places}
        return self._asked("reward", list(places), list(places), keep)

    def close(self) -> None:
        """End the process and what it started."""
        self._code.close()
        self._is_clogged = False

    def _asked(
        self, request: str, places: Sequence[int], body: Sequence[Any], keep: Callable[[], None]
    ) -> dict[int, Observed]:
        """Every one of the places gets an answer, whatever happens in the process."""
        answers: dict[int, Observed] = {}
        process = self._code.process
        if not process.is_running:  # it ended in an earlier call
            return {place: Observed(error="ended its process") for place in places}
        try:
            process.send((request, body), TAKING)
            while len(answers) < len(places):
                for answer in process.answers(time.monotonic() + self._seconds + GRACE, self._seconds):
                    self._is_clogged |= answer.pop("late", False)
                    place = answer.pop("index")
                    answers[place] = Observed.of(answer)
                keep()
        except Lost as lost:
            for place in places:
                answers.setdefault(place, Observed(error=str(lost)))
        return answers


@dataclass(frozen=True)
class Environments:
    """All environments of a run."""

    runners: Mapping[str, EnvironmentRunner]  # by task
    max_prompt_length: int  # tokens that a prompt may have with what reset() says


class EpisodeScorer:
    """Scores episodes: what the environment gave, plus what reward functions give, where there are any."""

    def __init__(self, name: str, config: TaskConfig, functions: Scorer | None):
        self.name, self.config, self._functions = name, config, functions

    def score(self, responses: Sequence[Response], told: Told) -> list[Score]:
        """Return one score an episode, in their order.

        Raises:
            RolloutError: all of at least 2 failed, or one was never played (it is from a file without rewards).
        """
        unplayed = next((one.where for one in responses if one.outcome is None), None)
        if unplayed is not None:
            raise RolloutError(
                f"{unplayed}: has no reward, and its environment cannot be asked for one afterwards. Give rewards in "
                "the record."
            )
        others = self._functions.score(responses, told) if self._functions else [None] * len(responses)
        scores = [self._score(one, other) for one, other in zip(responses, others, strict=True)]
        errors = [score.error for score in scores if score.error]
        if len(scores) > 1 and len(errors) == len(scores):
            reason, count = Counter(errors).most_common(1)[0]
            raise RolloutError(f"tasks.{self.name}: {reason} in {count} of {len(scores)} episodes, and none was "
                               "rewarded. Correct it.")  # fmt: skip
        told(len(responses))
        return scores

    def close(self) -> None:
        """End what runs for the functions."""
        if self._functions:
            self._functions.close()

    def _score(self, response: Response, other: Score | None) -> Score:
        outcome = response.outcome
        assert outcome is not None  # score() has looked
        own = {"turns": float(outcome.turns)}
        own |= {} if outcome.reward is None else {"environment": outcome.reward}
        error = outcome.error
        if error is None and outcome.reward is None and other is None:
            error = "gave no reward: step() gives none as its third value, and there is no get_reward()"
        parts = own | (other.parts if other else {})
        if error is not None:
            return failed(self.config, parts, f"environment {str(self.config.environment).rpartition(':')[2]} {error}")
        if other is not None and other.error is not None:
            return failed(self.config, parts, other.error)
        return Score((outcome.reward or 0.0) + ((other.reward or 0.0) if other else 0.0), parts)
