"""What each rank of a launch runs: `torchrun --nproc-per-node N -m tools.validation.parity.worker FOLDER`.

FOLDER has plan.pt (a list of cases, and whether this launch computes the truths first) and gets one line of JSON a case
in results.N.jsonl, by rank 0, as soon as the case is done.

Left out: going on after a case that raised. Its rank's error ends the launch, because the others may wait for it.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel import runtime
from tools.validation.parity import run
from tools.validation.parity.cases import Case
from tools.validation.parity.formula import Truth


def run_cases(
    cases: Iterable[Case], truths: dict[tuple, Truth], done: Callable[[Case, run.Errors], None]
) -> dict[str, run.Errors]:
    """All cases of this world size, one after the other on ranks that stay up; done() is called on each rank."""
    found = {}
    for case in cases:
        if case.layout.ranks == dist.get_world_size():
            found[case.name] = run.run_case(case, truths[run.truth_key(case)])
            done(case, found[case.name])
    return found


def main(folder: Path) -> None:
    started = runtime.init_process_group("cpu")
    cases = torch.load(folder / "plan.pt", weights_only=False)
    stored = folder / "truths.pt"
    if not stored.exists():  # the first launch has one rank
        torch.save(run.truths(cases), stored)
    truths = torch.load(stored, weights_only=False)
    with (folder / f"results.{started.world_size}.jsonl").open("a") as lines:

        def done(case: Case, errors: run.Errors) -> None:
            if started.is_main:
                print(json.dumps({"case": case.name} | dataclasses.asdict(errors)), file=lines, flush=True)

        run_cases(cases, truths, done)
    dist.barrier()  # a rank that leaves early closes connections which others still read from
    runtime.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
