"""`gspo-megatron check-learning` holds finished runs to the learning criteria.

Exit status: 0 all pass, 1 a criterion fails (named on stderr with both numbers), 2 bad input.
The numbers and the criteria are in metrics/learning.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from gspo_megatron.config.constraints import require
from gspo_megatron.config.options import check_options
from gspo_megatron.metrics.learning import failures, markdown_table, summarise_all

PROGRAM = "gspo-megatron check-learning"


@dataclass(frozen=True)
class Options:
    """Did these runs learn? Prints one row a run and the criteria that failed."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders, each with a metrics.jsonl."""

    control: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """A run with shuffled advantages (algorithm.shuffle_advantages), which must not learn. May be repeated."""

    min_rise: float = 0.20
    """Least rise in held-out accuracy from before RL to the end, as a share."""

    max_control_rise: float = 0.05
    """Largest rise a control may show."""


def main(argv: list[str]) -> int:
    """Run the command. Returns the exit status.

    Raises:
        ConfigError: no run was given.
        MetricsError: a run has no metrics that can be read.
    """
    options = tyro.cli(Options, prog=PROGRAM, args=argv)
    check_options(options, runs="RUN")
    require(len(options.runs) > 0, "RUN", [], "is missing", "Give at least one run folder.")
    reports = summarise_all(options.runs, options.control)
    failed = [failures(report, options.min_rise, options.max_control_rise) for report in reports]
    print(markdown_table(reports, ["FAIL" if found else "pass" for found in failed]))
    for sentence in sum(failed, []):
        print(f"FAIL {sentence}", file=sys.stderr)
    return 1 if any(failed) else 0
