"""A task whose prompts are rows of a data set: every row is judged when a run starts, and named if it is wrong.

Training goes through epochs of seeded permutations. An item is a function of the data, the seed and its number, so
nothing is saved for a resumed run. Left out: rewards (a Scorer is handed in), and any search for prompts that are alike
but not equal.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from gspo_megatron.batch import Response, Score, TaskItem
from gspo_megatron.config import TaskConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.tasks.data_files import BadRow, check_left, read_table
from gspo_megatron.tasks.rows import item_of
from gspo_megatron.tasks.splits import SPLITS, hash64, split_of
from gspo_megatron.tasks.task import Told

SHOWN = 3  # bad rows that are told in full


class Scorer(Protocol):
    """Scores responses to rows."""

    def score(self, responses: Sequence[Response], told: Told) -> list[Score]:
        """Return one score a response, in their order."""

    def close(self) -> None:
        """End what runs for it."""


class Placed(NamedTuple):
    """A row's item, and the file and line that it is from."""

    item: TaskItem
    where: str  # of its row


class DatasetTask:
    """Prompts from a data set.

    `name`: key of the recipe's table. `seed`: 0 or more; another seed is another order of the rows to train on.
    `rewards`: None where nothing is scored. Raises ConfigError for a file or row that cannot be used.
    """

    def __init__(self, name: str, config: TaskConfig, seed: int, rewards: Scorer | None):
        if config.data is None:
            raise ValueError(f"tasks.{name} has no data, so it is no DatasetTask.")
        after = config.answer.after
        require(after != "", f"tasks.{name}.answer.after", after, "must not be empty", "Leave it out.")
        self.name = name
        self._config = config
        self._rewards = rewards
        self._order = lru_cache(maxsize=2)(partial(_permutation, seed, hash64(name)))
        self._notes: list[str] = []
        train, digest = self._read(config.data, "data")
        eval_digest = None
        if config.eval_data is None:
            train, held_out = self._shared_out(train)
        else:
            held_out, eval_digest = self._read(config.eval_data, "eval_data")
        self._take(train, held_out)
        self._notes += self._notes_on_prompts()
        self._fingerprint = {"rows": len(train) + len(held_out), "digest": digest, "eval_digest": eval_digest}

    def size(self, split: str) -> int:
        """Return how many rows a split has; 0 of "warm_start" where no row has an answer."""
        return len(self._rows[split])

    def item(self, split: str, index: int) -> TaskItem:
        """Return item number `index` >= 0 of "train", "warm_start" or "eval": the same one at every call and rank.

        After the last row comes the next epoch. Raises ConfigError for a warm start where no row has an answer.
        """
        item = self._placed(split, index).item
        return replace(item, epoch=index // self.size(split))

    def where(self, split: str, index: int) -> str:
        """Return the file and line, or row, of an item. Raises as item()."""
        return self._placed(split, index).where

    def score(self, responses: Sequence[Response], told: Told) -> list[Score]:
        """Return one score a response, in their order. Raises ValueError where the task was built without rewards."""
        if self._rewards is None:
            raise ValueError(f"tasks.{self.name} was built without its rewards, so it cannot score.")
        return self._rewards.score(responses, told)

    def close(self) -> None:
        """End what runs for the rewards."""
        if self._rewards is not None:
            self._rewards.close()

    def every(self) -> list[Placed]:
        """Return all rows, those to train on first, in the order of their files."""
        return [*self._rows["train"], *self._rows["eval"]]

    def keep(self, fits: Sequence[bool]) -> int:
        """Leave out the rows that do not fit, for example because the prompt is too long, and return their number.

        Args:
            fits: of each of every().

        Raises:
            ConfigError: no row to train on, or no held-out one, is left.
        """
        kept, place = {}, 0
        for split in ("train", "eval"):
            rows = self._rows[split]
            kept[split] = [row for row, fit in zip(rows, fits[place:], strict=False) if fit]
            place += len(rows)
            setting, path = self._source(split)
            constraint = f"no prompt is left for {split}, all {len(rows)} are left out"
            require(len(kept[split]) > 0, setting, str(path), constraint, "Raise data.max_prompt_length.")
        left_out = sum(self.size(split) - len(rows) for split, rows in kept.items())
        self._take(kept["train"], kept["eval"])
        return left_out

    def notes(self) -> list[str]:
        """Return what a user should know of the data as they were read."""
        return list(self._notes)

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells these data from others: the number of rows that can be used, and hashes of the files."""
        return dict(self._fingerprint)

    def _take(self, train: list[Placed], held_out: list[Placed]) -> None:
        answered = [row for row in train if row.item.has_answer]
        self._rows = {"train": train, "warm_start": answered, "eval": held_out}

    def _placed(self, split: str, index: int) -> Placed:
        if split not in SPLITS or index < 0:
            raise ValueError(f"item({split!r}, {index}): split must be one of {list(SPLITS)} and index 0 or more.")
        rows = self._rows[split]
        require(
            len(rows) > 0,
            f"tasks.{self.name}.answer.column",
            self._config.answer.column,
            "no row to train on has a gold answer, which the warm start learns from",
            "Name the column, or set warm_start.steps = 0.",
        )
        epoch, place = divmod(index, len(rows))
        return rows[int(self._order(epoch, len(rows))[place]) if split == "train" else place]

    def _source(self, split: str) -> tuple[str, Path | None]:
        """The setting that a split's rows come from, and its value."""
        if split == "eval" and self._config.eval_data is not None:
            return f"tasks.{self.name}.eval_data", self._config.eval_data
        return f"tasks.{self.name}.data", self._config.data

    def _read(self, path: Path, field: str) -> tuple[list[Placed], str]:
        """The rows that can be used, and the digest of the file."""
        setting = f"tasks.{self.name}.{field}"
        table = read_table(path, setting, self._config.bad_rows)
        rows, bad = [], list(table.bad)
        for row in table.rows:
            try:
                rows.append(Placed(item_of(row.columns, self.name, self._config), row.where))
            except BadRow as error:
                if self._config.bad_rows == "error":
                    error.refuse(setting, row.where)
                bad.append(f"{row.where}: {error}")
        check_left(len(rows), bad, path, setting, f"Correct them, or what tasks.{self.name} says of its columns.")
        self._notes.append(f"{setting}: {len(rows):,} rows of {path}.")
        if bad:
            told = "; ".join(bad[:SHOWN])
            self._notes.append(f"{setting}: {len(bad):,} bad rows left out (bad_rows: drop), the first: {told}.")
        return rows, table.digest

    def _shared_out(self, rows: list[Placed]) -> tuple[list[Placed], list[Placed]]:
        """The rows to train on, and those that are held out. Rows with one prompt are on one side."""
        train: list[Placed] = []
        held_out: list[Placed] = []
        for row in rows:
            side = held_out if split_of(row.item.question) == "eval" else train
            side.append(row)
        require(
            len(train) > 0 and len(held_out) > 0,
            f"tasks.{self.name}.eval_data",
            None,
            f"an eighth of {self._config.data} is held out by a hash of the prompt, and of its {len(rows)} rows "
            f"that leaves {len(train)} to train on and {len(held_out)} held out",
            "Give eval_data, a file of held-out rows.",
        )
        self._notes.append(
            f"tasks.{self.name}.eval_data: not given, so {len(held_out):,} of the rows are held out, by a hash of the "
            "prompt."
        )
        return train, held_out

    def _notes_on_prompts(self) -> list[str]:
        prompts = {row.item.question for row in self._rows["train"]}
        notes = []
        repeated = self.size("train") - len(prompts)
        if repeated:
            notes.append(f"tasks.{self.name}.data: {repeated:,} rows to train on have the prompt of an earlier one.")
        both = [row.where for row in self._rows["eval"] if row.item.question in prompts]
        if both:
            notes.append(
                f"tasks.{self.name}.eval_data: {len(both):,} of its prompts are in data too, so that the evaluation is "
                f"not of new questions alone; the first is {both[0]}."
            )
        return notes


def _permutation(seed: int, task: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, task, epoch)).permutation(size)
