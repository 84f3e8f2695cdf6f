"""This computes route/* of one RL step: routing counts beside ratios and clip flags that the last stage published."""

import torch
import torch.distributed as dist

from gspo_megatron.batch import SequenceTable, UpdateResult
from gspo_megatron.metrics.reduce import published
from gspo_megatron.routing.statistics import MinibatchRouting, routing_metrics


def step_routing(
    counted: list[MinibatchRouting], topk: int, results: list[UpdateResult], group: dist.ProcessGroup
) -> dict:
    """Return routing metrics of the updates in `results`, one a minibatch. A collective; the same on every stage.

    Args:
        counted: sums over all ranks, by minibatch (RoutingStatistics.take).
        topk: experts a token.
        group: data-parallel ranks.
    """
    metrics = routing_metrics(counted, topk)
    if len(counted) > 1:
        sequences = torch.cat([minibatch.sequences for minibatch in counted[1:]], dim=1).flatten(0, 1)
        table = published(results[1:], group)
        metrics |= change_beside_ratio(sequences.to(table.values.device), table)
    return metrics


def change_beside_ratio(sequences: torch.Tensor, table: SequenceTable) -> dict[str, float]:
    """Tell whether routing change explains clipping, in the minibatches after the first, over all replicas.

    Args:
        sequences: [N, 2] fp64, changed and compared pairs.
        table: N rows, the same sequences as the last stage published them.

    Returns:
        route/changed_clipped, route/changed_unclipped: mean share of a sequence's (token, layer) pairs that changed,
        over sequences that lost gradient to the clip and over the others; route/change_ratio_correlation: Pearson's,
        of that share and |mean log-ratio|. What has no value is left out.
    """
    lengths, sums = table.column("num_tokens"), table.column("sum_log_ratio")
    known = (sequences[:, 1] > 0) & (lengths > 0) & torch.isfinite(sums)
    share = (sequences[:, 0] / sequences[:, 1])[known]
    distance = (sums / lengths).abs()[known]
    clipped = ((table.column("clipped_low_tokens") + table.column("clipped_high_tokens")) > 0)[known]
    metrics = {}
    for name, chosen in (("clipped", share[clipped]), ("unclipped", share[~clipped])):
        if chosen.numel():
            metrics[f"route/changed_{name}"] = float(chosen.mean())
    if share.numel() > 2 and float(share.std()) > 0 and float(distance.std()) > 0:
        metrics["route/change_ratio_correlation"] = float(torch.corrcoef(torch.stack([share, distance]))[0, 1])
    return metrics
