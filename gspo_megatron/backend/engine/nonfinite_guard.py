"""Updates that are skipped because a number is not finite: described, counted, and too many in a row end the run.

Every rank comes to the same decision without asking, because each knows the gradient's norm over all ranks.
"""

from collections.abc import Sequence

import torch

from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.runtime import Runtime
from gspo_megatron.batch import PackedBatch
from gspo_megatron.data.validate import first_not_finite
from gspo_megatron.errors import TrainingError


class NonfiniteGuard:
    """The updates of one network that were skipped in a row."""

    def __init__(self, limit: int, what: str):
        """limit: so many in a row are let pass (faults.max_skipped_updates). what: the policy, the critic."""
        self.limit, self.what = limit, what
        self.in_a_row = 0

    def passed(self) -> None:
        """An update was not skipped."""
        self.in_a_row = 0

    def skipped(self, reason: str) -> None:
        """An update was skipped. Raises TrainingError with the reason where it is one too many."""
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            raise TrainingError(
                f"{self.in_a_row} updates of the {self.what} in a row were skipped (faults.max_skipped_updates = "
                f"{self.limit}). The last: {reason}"
            )


def describe_nonfinite(
    batches: Sequence[PackedBatch], logprobs: dict[int, torch.Tensor], grad_norm: float, rate: float, runtime: Runtime
) -> str:
    """The first number of any rank's batches that is not finite, in words; the same on every rank. A collective.

    Args:
        logprobs: [T] of each batch by its number, on the last stage.
        rate: learning rate of the update.
    """
    mine = None
    for number, values in sorted(logprobs.items()):
        where = first_not_finite(batches[number], values)
        if where and mine is None:
            mine = f"rank {runtime.rank}, microbatch {number} of {len(batches)}: {where}"
    return next(filter(None, gather_objects(mine)), None) or (
        f"the gradient's norm is {grad_norm} at learning rate {rate:g}, though every log-prob and advantage is "
        "finite. The weights are as before this step. Lower optimizer.lr (warm_start.lr in the warm start), or "
        "look at loss and ratio/* in the run's metrics.jsonl."
    )
