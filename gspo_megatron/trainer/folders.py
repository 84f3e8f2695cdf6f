"""Which run folder a start takes.

Among the folders of the recipe's name (output_dir/name, name-2, name-3, ...) that hold a run of the same recipe, the
one that got furthest and that nobody trains in goes on. A folder is chosen and held in one go, so that two starts at
the same moment, on one machine or on two that share a file system, never take the same one.

Left out: going on with another recipe, and folders that were moved to another output_dir (name them there).
"""

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gspo_megatron.config import TrainConfig
from gspo_megatron.errors import CheckpointError, ConfigError
from gspo_megatron.metrics.sink import LEFT
from gspo_megatron.metrics.tracker import METRICS_FILE, SAMPLES_FILE
from gspo_megatron.process.folder_lock import LOCK, Hold, held, holder
from gspo_megatron.recipe import changes
from gspo_megatron.recipe.changes import Change
from gspo_megatron.recipe.load import read_saved
from gspo_megatron.trainer.data_record import DATA_FILE
from gspo_megatron.trainer.resume import (
    CONFIG_FILE,
    Progress,
    finished_epochs,
    finished_step,
    newest_first,
    survey,
)

# What a start leaves that ended before its first step.
OF_A_START = {LOCK, CONFIG_FILE, DATA_FILE, "tokenizer", METRICS_FILE, SAMPLES_FILE, "checkpoints"} | LEFT
TOLD = 8  # differences that are refused; who sees more reads none
NEW_RUN = "Give --resume never for a new run."
NOTHING_TO_CHANGE = (
    "resume = 'change': no run named {!r} in {} can go on with this recipe. Give the values that it has where they may "
    "not change (docs/resuming.md), or another name and --resume auto for a new run."
)


@dataclass(frozen=True)
class Plan:
    """Says what a start will do. Made on rank 0 alone."""

    folder: Path
    checkpoints: tuple[Path, ...] = ()  # to be tried in this order, newest first; none: a new run
    notes: tuple[str, ...] = ()  # for the user
    is_finished: bool = False  # nothing is left to do


@dataclass(frozen=True)
class Found:
    """A folder of the recipe's name, as a start finds it."""

    folder: Path
    checkpoints: dict[Path, Progress]
    damage: tuple[str, ...]  # sentences about its checkpoints and its config.yaml
    finished: int | None  # the step of its mark
    other: str | None  # why it does not go on with this recipe, in words; "" where nobody knows
    changes: tuple[Change, ...] = ()  # what the recipe has otherwise

    @property
    def order(self) -> tuple[bool, int]:
        """Later in a run is larger; below all others where no checkpoint can be read."""
        return max((progress.order for progress in self.checkpoints.values()), default=(False, -1))


def take(config: TrainConfig) -> tuple[Plan, Hold | None]:
    """Choose the folder of this start and hold it: an unfinished run's, or a new one. A finished one is not held.

    Raises:
        CheckpointError: an unfinished run cannot go on (no checkpoint of it can be read; its config.yaml is damaged;
            its folder cannot be written), or no new folder can be made.
        ConfigError: the recipe asks for a change, and no run can take it.
    """
    notes: list[str] = []
    finished = None
    if config.resume != "never":
        found = sorted(_of_this_name(config), key=lambda one: one.order, reverse=True)  # equal ones: as numbered
        if config.resume == "change":
            found = _of_the_very_recipe(found) or found
        finished = next((one for one in found if _is_over(one, config)), None)
        for one in found:
            if (taken := _go_on(one, config, notes)) is not None:
                return taken
        if unknown := next((one for one in found if one.other == "" and one.finished is None), None):
            raise CheckpointError(f"{unknown.damage[-1]} So it is unknown whether that run can go on. {NEW_RUN}")
    if finished is not None:
        notes += [f"{change}: no step is left for it" for change in finished.changes]
        return Plan(finished.folder, notes=tuple(notes), is_finished=True), None
    if config.resume == "change":
        raise ConfigError("\n".join([NOTHING_TO_CHANGE.format(config.name, config.output_dir), *notes]))
    return _new(config, notes)


def _of_the_very_recipe(found: list[Found]) -> list[Found]:
    return [one for one in found if one.other is None and not one.changes and (one.checkpoints or one.finished)]


def _go_on(one: Found, config: TrainConfig, notes: list[str]) -> tuple[Plan, Hold] | None:
    """Take this folder if its run can go on; where not, a note says why."""
    if one.other:
        if one.order >= (False, 0) and (one.finished is None or config.resume == "change"):
            hint = "" if changes.refusals(one.changes) else ". --resume change goes on there with what differs"
            notes.append(f"{one.folder} is of another recipe ({one.other}): passed over{hint}")
        return None
    if one.other == "" or _is_over(one, config):
        return None
    if not one.checkpoints and not one.damage:
        if not is_empty(one.folder):
            notes.append(f"{one.folder} has no checkpoint to go on from: passed over")
        return None
    hold = held(one.folder)
    if hold is None:
        notes.append(f"{one.folder} is being trained by another process{holder(one.folder)}: passed over")
        return None
    now = look(one.folder, config)  # it may have gone on, or ended, before it was ours
    if now is None or now.other is not None or _is_over(now, config):
        hold.close()
        return None
    if not now.checkpoints:
        raise CheckpointError("\n".join([*now.damage, f"no checkpoint of {one.folder} is intact. {NEW_RUN}"]))
    said = (*notes, *now.damage, *hold.notes)
    return Plan(one.folder, newest_first(now.checkpoints), said), hold


def _new(config: TrainConfig, notes: list[str]) -> tuple[Plan, Hold]:
    """Make the next free folder; one that a start left empty is as good."""
    for number in itertools.count(1):
        folder = config.output_dir / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not is_empty(folder):
                continue
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be made ({error.strerror}). Give another output_dir.") from None
        hold = held(folder)
        if hold is not None and is_empty(folder):
            said = [f"a new run starts in {folder}"] if notes else []
            return Plan(folder, notes=(*notes, *said, *hold.notes)), hold
        if hold is not None:
            hold.close()
    raise AssertionError("numbers do not end")


def is_empty(folder: Path) -> bool:
    """Tell whether a start that ended before its first step, or nobody, has left this folder: nothing is lost with
    it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    is_ours = not names or bool(names & {LOCK, CONFIG_FILE})  # which a start makes first
    whole = [path for path in (folder / "checkpoints").glob("*") if path.suffix != ".unfinished"]
    if not is_ours or names - OF_A_START or whole:
        return False
    metrics = folder / METRICS_FILE
    return not metrics.exists() or metrics.stat().st_size == 0


def discard_if_empty(folder: Path) -> None:
    """Remove the folder of a start that ended before its first step."""
    try:
        if is_empty(folder):
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # gone, or no longer to be read: the end of a run has nothing to say about it


def _of_this_name(config: TrainConfig) -> Iterator[Found]:
    """Look at every folder of the recipe's name, by its number."""
    pattern = re.compile(re.escape(config.name) + r"(?:-(\d+))?")
    try:
        names = [found for path in config.output_dir.iterdir() if (found := pattern.fullmatch(path.name))]
    except FileNotFoundError:
        return
    except OSError as error:
        raise CheckpointError(f"output_dir = {str(config.output_dir)!r}: {error.strerror}. Give another one.") from None
    for name in sorted(names, key=lambda found: int(found[1] or 1)):
        if (one := look(config.output_dir / name[0], config)) is not None:
            yield one


def look(folder: Path, config: TrainConfig) -> Found | None:
    """Return what a folder of the recipe's name holds; None where it is no run's, or one of another name."""
    if not folder.is_dir():
        return None
    checkpoints, damage = survey(folder)
    finished = finished_step(folder, config.save_hf)
    problems: list[str] = []
    there = None
    for place in (folder, *newest_first(checkpoints)):  # a checkpoint has a copy of the recipe
        try:
            there = read_saved(place / CONFIG_FILE)
            break
        except ConfigError as error:
            problems.append(str(error))
    if there is None:
        if not checkpoints and not damage:
            return Found(folder, {}, (), finished, None)
        return Found(folder, checkpoints, (*damage, problems[0]), finished, "")
    if folder.name != config.name and there.get("name") != config.name:
        return None
    if problems:
        damage = [*damage, f"{problems[0]} Its copy in {place} is read instead."]
    differing = tuple(changes.differences(config, there))
    if config.resume == "change":
        refused = changes.refusals(differing)
        why = refused[:TOLD] + [f"and {len(refused) - TOLD} more"] * (len(refused) > TOLD)
    else:
        why = [str(change) for change in differing[:1]]
    return Found(folder, checkpoints, tuple(damage), finished, "; ".join(why) or None, differing)


def _is_over(one: Found, config: TrainConfig) -> bool:
    """The run has made all steps, and what follows the last one."""
    last = max(one.order[1], one.finished or 0)
    if one.other is not None or one.finished != last:
        return False
    # How many steps the epochs are is known once the data are read; a run that ended with as many has made them.
    return finished_epochs(one.folder) >= config.num_epochs if config.num_epochs else last >= config.steps
