"""What a recipe says of rollouts from files, held against the files before ranks start: nothing here imports torch.

Here the files are found and counted, and the first of them is looked into; every group is judged once there is a
tokenizer (rollout/record_files.py).
"""

from pathlib import Path

from gspo_megatron.config import TrainConfig
from gspo_megatron.config.constraints import require
from gspo_megatron.tasks.data_files import count_rows, first_row

SETTING = "rollout.path"
SUFFIXES = (".jsonl", ".parquet")
GROUP_FIELDS = ("uid", "task", "prompt", "prompt_ids", "version", "tokenizer", "sampling", "responses")
FORM = "Write one group a line, as docs/your_data.md says under Rollouts from files."
LONGEST = 1 << 28  # bytes of a line: a group of 16 responses of 128 thousand tokens has 60 million
KINDS = "Give a .jsonl or .parquet file, or a folder with such files."


def record_files(path: Path) -> list[Path]:
    """Return the files that groups are read from, in their order.

    Raises:
        ConfigError: there is none.
    """
    require(path.exists(), SETTING, str(path), "is not there", KINDS)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        require(len(found) > 0, SETTING, str(path), "is a folder without a .jsonl or .parquet file", KINDS)
        return found
    known = path.suffix.lower() in SUFFIXES
    require(known, SETTING, str(path), f"has the unknown suffix {path.suffix!r}", KINDS)
    return [path]


def count_groups(path: Path, needed: int) -> list[tuple[Path, int]]:
    """Return the files with the number of groups in each, as far as it takes to have as many as are needed.

    Raises:
        ConfigError: a file cannot be read.
    """
    found, total = [], 0
    for file in record_files(path):
        if total >= needed:
            break
        found.append((file, count_rows(file, SETTING)))
        total += found[-1][1]
    return found


def check_rollouts(config: TrainConfig) -> None:
    """Refuse a recipe whose engine is `files` and cannot work, or one that gives files for nothing.

    Raises:
        ConfigError: with the field and the remedy.
    """
    rollout, reads = config.rollout, config.rollout.engine == "files"
    has_rollouts = config.algorithm.name != "dpo"
    require(has_rollouts or not reads, "rollout.engine", rollout.engine, "dpo has no rollouts", "Give megatron.")
    require(has_rollouts or not rollout.save, "rollout.save", rollout.save, "dpo has no rollouts", "Give 0.")
    if not reads:
        remedy = "Give rollout.engine files, or leave it out."
        require(rollout.path is None, SETTING, str(rollout.path), "is read by rollout.engine files alone", remedy)
        return
    require(rollout.path is not None, SETTING, None, "rollout.engine is files, which reads groups from it", KINDS)
    assert rollout.path is not None  # as just required
    require(not rollout.save, "rollout.save", rollout.save, "the groups are in rollout.path already", "Give 0.")
    require(
        config.routing.replay != "R3",
        "routing.replay",
        config.routing.replay,
        "takes the experts that the rollout chose, and rollouts from files tell none (rollout.engine is files)",
        "Give R2 or none.",
    )
    if config.steps:
        _check_files(config, rollout.path)


def _check_files(config: TrainConfig, path: Path) -> None:
    size = config.rollout.num_prompts
    needed = config.steps * size
    files = count_groups(path, needed)
    found = sum(count for _, count in files)
    require(
        found >= needed,
        "steps",
        config.steps,
        f"take {size} groups each (rollout.num_prompts), {needed} in all, and {path} has {found}",
        f"Give steps {found // size}, or more groups.",
    )
    file = next(file for file, count in files if count)
    row = first_row(file, SETTING, FORM, LONGEST)
    missing = [name for name in GROUP_FIELDS if name not in row.columns]
    require(not missing, SETTING, row.where, f"{', '.join(missing)} missing", FORM)
