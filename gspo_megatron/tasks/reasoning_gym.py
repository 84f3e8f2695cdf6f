"""A task of reasoning-gym: its questions by number, and its own scorer.

Left out: curricula (a task's options are fixed for a run), and any dedupe: two indices may hold the same question when
a task has few, but never across splits.

Source of tasks and scorers: reasoning-gym (github.com/open-thought/reasoning-gym); the tables below were found by
running every task of version 0.1.25.
"""

import dataclasses
import difflib
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from reasoning_gym.factory import DATASETS, create_dataset

from gspo_megatron.batch import Response, Score, TaskItem
from gspo_megatron.config import TaskConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.errors import ConfigError, GspoError, RolloutError
from gspo_megatron.tasks import walls
from gspo_megatron.tasks.answers import AnswerExtractor
from gspo_megatron.tasks.isolation import ScorerError, ScoringProcess
from gspo_megatron.tasks.splits import hash64, split_of
from gspo_megatron.tasks.task import Told

log = logging.getLogger(__name__)

# (14/16)^256 = 1e-15: a task that has questions in every split does not fail by bad luck.
MAX_DRAWS = 256

# reasoning-gym seeds a question with seed + index, so the size costs nothing but in the tasks of TABLE_TASKS,
# which build a list of that length (or refuse a longer one).
VIRTUAL_SIZE = 2**31 - 1
TABLE_TASKS = ("acre", "gsm_symbolic", "list_functions", "word_ladder")
TABLE_SIZE = 10_000

# Their scorers hand the response to eval() or to sympy's parse_expr, which is eval() on a transformed string: that is
# done in a process of its own alone (isolation.py, evaluation.py).
EVAL_TASKS = (
    "binary_matrix",
    "countdown",
    "intermediate_integration",
    "n_queens",
    "polynomial_multiplication",
    "puzzle24",
    "simple_integration",
    "spiral_matrix",
    "string_insertion",
)
# Their generators iterate over sets of strings, whose order follows Python's hash seed.
HASH_ORDER_TASKS = ("codeio", "isomorphic_strings", "knight_swap", "ransom_note", "word_ladder")

HOPELESS_RESPONSE = "\x00"  # no task's answer: a scorer that likes it likes anything
BELOW_FULL = math.nextafter(1.0, 0.0)
ROUNDING = 1e-9  # of partial credits that are added up
LARGEST_REWARD = 1e30  # whose square and fp32 form are still finite
LIST_ALL = 'List them with: python -c "from gspo_megatron.tasks.reasoning_gym import task_names; print(*task_names())"'


def task_names() -> list[str]:
    """List the names that a recipe's `tasks` table may use, sorted."""
    return sorted(set(DATASETS) - {"composite"})


def is_correct(score: float) -> bool:
    """Ask whether a reward is full marks, 1 or more. Some tasks give partial credit below 1 for answers that are wrong,
    some a bonus above it."""
    return score >= 1.0


class ReasoningGymTask:
    """Questions of one generator, drawn by hashes; the number of them has no end.

    `seed`: any integer; another seed is another order of questions within the same splits. `process`: where the scorer
    runs; None: in this one, for text that no model wrote. Raises ConfigError for a name, option or scorer that cannot
    be used.
    """

    def __init__(self, name: str, config: TaskConfig, seed: int, process: ScoringProcess | None = None):
        self._name, self._seed = name, seed
        self._spec = _spec(name, config.options, seed)
        self._dataset = _build(self._spec, config.options)
        self._extractor = AnswerExtractor.of(config)
        self._process: ScoringProcess | None = None
        self._has_warned = False
        require(
            name not in EVAL_TASKS or walls.has_seccomp(),
            f"tasks.{name}",
            name,
            "its scorer evaluates what the model wrote, and this kernel takes no seccomp filter to confine that",
            "Take the task out of the recipe, or train on Linux (x86_64, aarch64) with seccomp.",
        )
        self._check_scorer()
        self._process = process  # from here on; the checks score no model's text

    def size(self, split: str) -> int | None:
        """Return None: there is no end."""
        return None

    def item(self, split: str, index: int) -> TaskItem:
        """Return question number `index` of a split.

        Raises:
            ConfigError: the task has no question in this split.
            RolloutError: its generator always fails.
        """
        return self._draw(split, index)

    def score(self, responses: Sequence[Response], told: Told) -> list[Score]:
        """Return scores by the task's own scorer.

        0 where the task's extractor finds no answer, and where the scorer raises or takes too long on this one but not
        on the gold answer: it met text that it cannot parse.

        Raises:
            RolloutError: a response is no string, a scorer always raises, a score is no finite number.
        """
        scores = []
        for done, response in enumerate(responses, 1):
            try:
                scores.append(Score(self._reward(response.item, response.text)))
            except GspoError as error:
                raise RolloutError(f"{response.where}: {error}" if response.where else str(error)) from error
            told(done)
        return scores

    def close(self) -> None:
        """Do nothing: the process is shared by all tasks."""

    def _reward(self, item: TaskItem, text: str) -> float:
        if self._name in EVAL_TASKS and self._process is None:
            raise ValueError(f"tasks.{self._name}: its scorer runs the response as code, so it needs a ScoringProcess.")
        answer = self._extractor.find(text) if isinstance(text, str) else text
        return 0.0 if answer is None else self._score(item, answer)

    def _score(self, item: TaskItem, response_text: str) -> float:
        if not isinstance(response_text, str):
            raise RolloutError(
                f"tasks.{item.task}: a response of type {type(response_text).__name__} cannot be scored, "
                "it must be str. Decode the token ids first."
            )
        try:
            value = self._ask(item, response_text)
        except Exception as error:
            self._excuse(item, response_text, error)
            return 0.0
        if not abs(value) <= LARGEST_REWARD:
            raise RolloutError(
                f"tasks.{item.task}: the scorer gave {value} for the response {response_text[:80]!r}, a "
                f"score must be finite, and within {LARGEST_REWARD:g}. Take the task out of the recipe."
            )
        # spell_backward adds up 1/n a letter; at n = 9, 11, 18, ... the right letters followed by more text reach
        # 1 + 2e-16, and only an exact answer may count as correct. A bonus is more than that.
        return BELOW_FULL if 1.0 < value <= 1.0 + ROUNDING else value

    def _ask(self, item: TaskItem, text: str) -> float:
        if self._process is not None:
            return self._process.score(self._spec, text, item.entry)
        return float(self._dataset.score_answer(text, item.entry))

    def _draw(self, split: str, index: int) -> TaskItem:
        name, dataset = self._name, self._dataset
        failures: list[Exception] = []
        for attempt in range(MAX_DRAWS):
            position = hash64("draw", self._seed, split, index, attempt) % len(dataset)
            try:
                entry = dataset[position]
                question, answer = entry["question"], entry["answer"]
            except Exception as error:  # a few generators (maze) give up now and then; the next draw is as good
                failures.append(error)
                continue
            if split_of(question) == split:
                # Some tasks have a scorer but no gold answer; the entry keeps the None.
                return TaskItem(
                    name, question, "" if answer is None else str(answer), entry, has_answer=answer is not None
                )
        if len(failures) == MAX_DRAWS:
            raise RolloutError(
                f"tasks.{name}.options: {MAX_DRAWS} draws gave no question, the generator failed each time, last with "
                f"{type(failures[-1]).__name__}: {failures[-1]}. Change the options."
            ) from failures[-1]
        raise ConfigError(
            f"tasks.{name}.options: {MAX_DRAWS} draws held no question of the split {split!r}, so the task "
            "has too few distinct questions. Widen its options."
        )

    def _excuse(self, item: TaskItem, response_text: str, error: Exception) -> None:
        """Return if the scorer can score at all; raise the error of a broken scorer otherwise."""
        try:
            self._ask(item, item.answer)
        except Exception:
            raise RolloutError(
                f"tasks.{item.task}: the scorer raised {_in_words(error)} on the response "
                f"{response_text[:80]!r}, and raises on the gold answer too. Take the task out of "
                "the recipe."
            ) from error
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "tasks.%s: the scorer raised %s on %r; such responses score 0 (told once).",
                item.task,
                _in_words(error),
                response_text[:80],
            )

    def _check_scorer(self) -> None:
        name, item = self._name, self._draw("train", 0)
        if item.has_answer:
            gold = self._score(item, item.answer)
            require(
                is_correct(gold),
                f"tasks.{name}",
                gold,
                "the scorer does not give the gold answer full marks",
                "Take the task out of the recipe.",
            )
            if self._extractor.name != "regex":  # which may want words that are not known here
                self._extractor.write(item.answer, f"tasks.{name}")
        nonsense = self._score(item, HOPELESS_RESPONSE)
        require(
            not is_correct(nonsense),
            f"tasks.{name}",
            nonsense,
            "the scorer gives full marks to nonsense",
            "Take the task out of the recipe: nothing can be learned from this reward.",
        )


def _spec(name: str, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Arguments of create_dataset for one task. Raises ConfigError for a wrong name or an unknown option."""
    require(name != "composite", "tasks", name, "is not supported", "Name its parts in the recipe's table instead.")
    require(
        name in DATASETS, "tasks", name, "is no task of reasoning-gym", _did_you_mean(name, task_names()) + LIST_ALL
    )
    valid = _options(name)
    for option, value in options.items():
        require(
            option not in ("seed", "size"),
            f"tasks.{name}.options.{option}",
            value,
            "is set by the mixture",
            "Remove it; the recipe's seed rules the questions, and their number has no limit.",
        )
        require(
            option in valid,
            f"tasks.{name}.options.{option}",
            value,
            "is no option of this task",
            f"{_did_you_mean(option, valid)}Valid options: {', '.join(valid)}.",
        )
    hash_seed = os.environ.get("PYTHONHASHSEED", "random")
    require(
        name not in HASH_ORDER_TASKS or hash_seed != "random",
        f"tasks.{name}: PYTHONHASHSEED",
        hash_seed,
        "this task's questions follow Python's hash seed, so processes would disagree",
        "Set PYTHONHASHSEED=0 in the environment of every rank.",
    )
    size = TABLE_SIZE if name in TABLE_TASKS else VIRTUAL_SIZE
    return {"name": name, "seed": hash64("dataset", seed) % 2**31, "size": size} | options


def _options(name: str) -> list[str]:
    return [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]


def _build(spec: dict[str, Any], options: dict[str, Any]):
    """The reasoning-gym dataset of one task. Raises ConfigError for options that it refuses."""
    try:
        return create_dataset(**spec)
    except Exception as error:  # the tasks check their options with assert, which may as well end in a TypeError
        raise ConfigError(
            f"tasks.{spec['name']}.options = {options!r}: the task refuses it ({_in_words(error)}). "
            f"Valid options: {', '.join(_options(spec['name']))}."
        ) from error


def _in_words(error: Exception) -> str:
    """What was raised; a ScorerError tells that itself."""
    return str(error) if isinstance(error, ScorerError) else f"{type(error).__name__}: {error}"


def _did_you_mean(word: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=3)
    return f"Did you mean {' or '.join(close)}? " if close else ""
