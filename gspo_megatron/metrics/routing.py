"""route/* and ratio_parts/* of one RL step, from all ranks."""

import torch

from gspo_megatron.backend.policy import Policy, UpdateResult
from gspo_megatron.metrics.reduce import gather_rows, published
from gspo_megatron.routing.ratio_parts import log_ratio_parts, spread
from gspo_megatron.routing.statistics import change_beside_ratio, routing_metrics
from gspo_megatron.types import PackedBatch


def step_routing(policy: Policy, results: list[UpdateResult]) -> dict:
    """Routing counts of the updates in `results`, one a minibatch, joined with the published ratios and clip flags. A
    collective over all ranks; the same on every stage."""
    counted = policy.routing.take()
    metrics = routing_metrics(counted, policy.routing.topk)
    if len(counted) > 1:
        sequences = torch.cat([minibatch.sequences for minibatch in counted[1:]], dim=1).flatten(0, 1)
        table = published(results[1:], policy.topology.dp_group)
        metrics |= change_beside_ratio(sequences.to(table.values.device), table)
    return metrics


def ratio_parts(policy: Policy, batches: list[PackedBatch]) -> dict[str, float]:
    """ratio_parts/* of batches that have old log-probs and old routes, at the weights as they are: two passes. A
    collective over all ranks."""
    free, fixed = policy.log_probs(batches), policy.log_probs_along_old_routes(batches)
    found = {}  # on the last stage
    if policy.topology.is_last_stage:
        found = {
            id(batch): log_ratio_parts(batch.old_logprobs, *new)
            for batch, *new in zip(batches, free, fixed, strict=True)
        }
    columns: list[torch.Tensor] = []
    lengths = policy.sums_by_sequence(batches, lambda batch: torch.ones_like(batch.loss_mask))
    for part in range(3):
        columns.append(policy.sums_by_sequence(batches, lambda batch, part=part: found[id(batch)][part]))
        columns.append(policy.sums_by_sequence(batches, lambda batch, part=part: found[id(batch)][part].square()))
    rows = gather_rows(torch.stack([lengths, *columns], dim=1), policy.topology.dp_group)
    return spread(rows[:, 0], rows[:, 1::2], rows[:, 2::2])
