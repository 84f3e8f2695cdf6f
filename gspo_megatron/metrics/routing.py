"""route/* of one RL step: the routing counts of all ranks, joined with the published ratios and clip flags."""

import torch

from gspo_megatron.backend.policy import Policy, UpdateResult
from gspo_megatron.metrics.reduce import published
from gspo_megatron.routing.statistics import change_beside_ratio, routing_metrics


def step_routing(policy: Policy, results: list[UpdateResult]) -> dict:
    """Metrics of the updates in `results`, one a minibatch. A collective over all ranks; the same on every stage."""
    counted = policy.routing.take()
    metrics = routing_metrics(counted, policy.routing.topk)
    if len(counted) > 1:
        sequences = torch.cat([minibatch.sequences for minibatch in counted[1:]], dim=1).flatten(0, 1)
        table = published(results[1:], policy.topology.dp_group)
        metrics |= change_beside_ratio(sequences.to(table.values.device), table)
    return metrics
