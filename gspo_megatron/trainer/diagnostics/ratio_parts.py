"""Measures how much of the ratio's spread comes with changed routes, by two further passes of the policy."""

import torch

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.batch import PackedBatch
from gspo_megatron.metrics.reduce import gather_rows
from gspo_megatron.routing.ratio_parts import log_ratio_parts, spread


def ratio_parts(policy: Policy, batches: list[PackedBatch]) -> dict[str, float]:
    """Return ratio_parts/* of batches that have old log-probs and old routes, at the weights as they are: two passes. A
    collective over all ranks."""
    free, fixed = policy.log_probs(batches), policy.log_probs_along_old_routes(batches)
    found: list[list[torch.Tensor]] = []  # of each batch, on the last stage
    if policy.topology.is_last_stage:
        for batch, own, along_old in zip(batches, free, fixed, strict=True):
            assert own is not None and along_old is not None  # the last stage has them
            found.append(log_ratio_parts(batch.filled("old_logprobs"), own, along_old))

    def sums(part: int) -> list[torch.Tensor]:
        return [
            policy.sums_by_sequence(batches, lambda number: found[number][part]),
            policy.sums_by_sequence(batches, lambda number: found[number][part].square()),
        ]

    lengths = policy.sums_by_sequence(batches, lambda number: torch.ones_like(batches[number].loss_mask))
    columns = [column for part in range(3) for column in sums(part)]
    rows = gather_rows(torch.stack([lengths, *columns], dim=1), policy.topology.dp_group)
    return spread(rows[:, 0], rows[:, 1::2], rows[:, 2::2])
