"""A run folder notes which data the run was started on, so that a start on other data is told."""

import json
from pathlib import Path

from gspo_megatron.tasks.mixture import TaskMixture
from gspo_megatron.utils import plain_json
from gspo_megatron.utils.small_files import replace

DATA_FILE = "data.json"


def note_data(run_dir: Path, mixture: TaskMixture) -> list[str]:
    """Write what the run's tasks have read, where they have read anything. On rank 0.

    Returns sentences about tasks whose data are not those of the start before. The run goes on at the same place of
    the stream all the same: which rows are there is another matter.

    Raises OSError.
    """
    here = {name: task.fingerprint() for name, task in mixture.data.items()}
    if not here:
        return []
    path = run_dir / DATA_FILE
    try:
        there = plain_json.read_object(path)
    except (OSError, ValueError):  # the first start, or damaged: nothing is known
        there = {}
    replace(path, (json.dumps(here, indent=1) + "\n").encode())
    return [
        f"tasks.{name}: the data have changed since the run was last started ({_rows(there[name])} rows then, "
        f"{_rows(found)} now), so other rows follow from here"
        for name, found in here.items()
        if name in there and there[name] != found
    ]


def _rows(found: object) -> object:
    return found.get("rows", "?") if isinstance(found, dict) else "?"
