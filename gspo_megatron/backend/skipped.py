"""Updates that were skipped because a number was not finite: told, counted, and too many in a row end the run.

Every rank comes to the same decision without asking, because each knows the gradient's norm over all ranks.
"""

from gspo_megatron.errors import TrainingError


class SkippedUpdates:
    """Of one network."""

    def __init__(self, limit: int, what: str):
        """limit: so many in a row are let pass (faults.max_skipped_updates). what: the policy, the critic."""
        self.limit, self.what = limit, what
        self.in_a_row = 0

    def passed(self) -> None:
        """An update was not skipped."""
        self.in_a_row = 0

    def skipped(self, reason: str) -> None:
        """One was. Raises TrainingError with the reason where it is one too many."""
        self.in_a_row += 1
        if self.in_a_row > self.limit:
            raise TrainingError(
                f"{self.in_a_row} updates of the {self.what} in a row were skipped (faults.max_skipped_updates = "
                f"{self.limit}). The last: {reason}"
            )
