"""Hold finished runs to the learning criteria: `python tools/check_learning.py runs/a runs/b --control runs/c`.

Exit status: 0 all pass, 1 a criterion fails (named on stderr with both numbers), 2 bad input.
The numbers and the criteria are in gspo_megatron/metrics/learning.py.
"""

import sys
from pathlib import Path
from typing import Annotated

import tyro

from gspo_megatron.errors import GspoError
from gspo_megatron.metrics.learning import failures, markdown_table, summarise_all


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    control: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    min_rise: float = 0.20,
    max_control_rise: float = 0.05,
) -> int:
    """Did these runs learn? Prints one row a run and the criteria that failed.

    Args:
        runs: Run folders, each with a metrics.jsonl.
        control: A run with shuffled advantages (algorithm.shuffle_advantages), which must not learn. May be repeated.
        min_rise: Least rise in held-out accuracy from before RL to the end, as a share.
        max_control_rise: Largest rise a control may show.
    """
    if not runs:
        print("error: give at least one run folder", file=sys.stderr)
        return 2
    try:
        reports = summarise_all(runs, control)
    except GspoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = [failures(report, min_rise, max_control_rise) for report in reports]
    print(markdown_table(reports, ["FAIL" if found else "pass" for found in failed]))
    for sentence in sum(failed, []):
        print(f"FAIL {sentence}", file=sys.stderr)
    return 1 if any(failed) else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
