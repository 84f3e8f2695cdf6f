"""The groups of rollout.path, read file by file: one is held at a time, whole, so many files cost no memory.

Every group of the steps to come is judged when a run starts, and again when it is read. Left out: a file that grows
while a run reads it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from gspo_megatron.config.constraints import require
from gspo_megatron.recipe.rollout_files import FORM, LONGEST, SETTING, count_groups
from gspo_megatron.rollout.record_limits import Limits
from gspo_megatron.rollout.records import GroupRecord
from gspo_megatron.tasks.data_files import BadRow, Row, read_table

ROLLOUTS = "rollouts"  # of a run folder, what rollout.save writes


def step_file(run_dir: Path, step: int) -> Path:
    """Return where a run writes the groups of a step."""
    return run_dir / ROLLOUTS / f"step_{step:06d}.jsonl"


class Judged(NamedTuple):
    """What groups of several files must agree in, or not share; of one that is good by itself."""

    uid: int
    has_logprobs: bool
    where: str


@dataclass(frozen=True)
class Part:
    """One file: its groups are those from number `first` on."""

    path: Path
    first: int
    count: int


class RecordFiles:
    """Groups by number, in the order of the files.

    `path`: rollout.path. `needed`: the number of groups that the run takes in all. `limits`: what they must fit.
    Raises ConfigError for a file that cannot be read.
    """

    def __init__(self, path: Path, needed: int, limits: Limits):
        self._limits, self._needed = limits, needed
        self._parts: list[Part] = []
        self._held: tuple[Path, list[Row]] | None = None
        first = 0
        for file, count in count_groups(path, needed):
            self._parts.append(Part(file, first, count))
            first += count

    def judge(self, start: int, number: int = 0, every: int = 1) -> list[Judged]:
        """Judge the groups from `start` on, all that a run will take.

        Args:
            number, every: judge the files `number`, `number + every`, ...: ranks share the work.

        Raises:
            ConfigError: with the file, the line and what is wrong with the first bad group.
        """
        parts = [part for part in self._parts if part.count and part.first + part.count > start]
        found = []
        for part in parts[number::every]:
            for row in self._rows(part, max(start, part.first), self._needed):
                group = self._group(row)
                found.append(Judged(group.uid, group.responses[0].logprobs is not None, row.where))
        return found

    def read(self, start: int, stop: int) -> list[GroupRecord]:
        """Return the groups with these numbers.

        Raises:
            ConfigError: as judge(), or a file has changed since.
        """
        parts = [part for part in self._parts if part.first < stop and part.first + part.count > start]
        return [self._group(row) for part in parts for row in self._rows(part, start, stop)]

    def _rows(self, part: Part, start: int, stop: int) -> Iterator[Row]:
        if self._held is None or self._held[0] != part.path:
            self._held = None  # before the next one is read, so that one is in memory
            self._held = (part.path, read_table(part.path, SETTING, "error", FORM, LONGEST).rows)
        rows = self._held[1]
        require(
            len(rows) == part.count,
            SETTING,
            str(part.path),
            f"has {len(rows)} groups, and had {part.count} when the run was started",
            "Leave the files as they are while a run reads them; start the same command to go on.",
        )
        yield from rows[max(start - part.first, 0) : max(stop - part.first, 0)]

    def _group(self, row: Row) -> GroupRecord:
        try:
            group = GroupRecord.read(row.columns)
            self._limits.check(group)
        except BadRow as error:
            error.refuse(SETTING, row.where)
        return group


def check_together(groups: Iterable[Judged]) -> None:
    """Refuse groups that are good one by one and not together.

    Args:
        groups: in the order of the files.

    Raises:
        ConfigError: two have one uid, or one has log-probs and another none.
    """
    places: dict[int, str] = {}
    first: Judged | None = None
    for group in groups:
        first = first or group
        require(
            group.uid not in places,
            SETTING,
            group.where,
            f"uid = {group.uid} is that of {places.get(group.uid)} too",
            "Give each group a number of its own.",
        )
        require(
            group.has_logprobs == first.has_logprobs,
            SETTING,
            group.where,
            f"has {'' if group.has_logprobs else 'no '}logprobs, other than {first.where}",
            "Give them in all groups or in none.",
        )
        places[group.uid] = group.where
