"""What each data-parallel replica saw becomes the numbers of the whole step, by collectives over data parallelism.

Sums and extremes are taken over the gathered rows; a mean of the ranks' means would weigh ranks, not responses.
"""

import math

import torch
import torch.distributed as dist

from gspo_megatron.batch import SequenceTable, UpdateResult


def gather_rows(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather [n, k] of each rank in rank order; n may differ."""
    size = dist.get_world_size(group)
    if size == 1:
        return rows
    counts = torch.zeros(size, dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows.size(0)], device=rows.device), group=group)
    numbers = counts.tolist()
    filled = rows.new_zeros(max(numbers), rows.size(1))
    filled[: rows.size(0)] = rows
    gathered = rows.new_empty(size * filled.size(0), rows.size(1))
    dist.all_gather_into_tensor(gathered, filled, group=group)
    return torch.cat([part[:number] for part, number in zip(gathered.split(filled.size(0)), numbers, strict=True)])


def global_loss(results: list[UpdateResult], group: dist.ProcessGroup) -> float:
    """Return the mean over optimizer steps of the whole step's loss, of which each replica has its share. A
    collective."""
    device = results[0].stats.table.values.device
    loss = torch.tensor([result.stats.loss for result in results], dtype=torch.float64, device=device)
    dist.all_reduce(loss, group=group)
    return float(loss.mean())


def optimizer_metrics(results: list[UpdateResult], group: dist.ProcessGroup) -> dict[str, float]:
    """Return loss, gradient norm and learning rate of one or more updates; how many changed nothing. A collective.

    update/not_finite counts those that were skipped for a number that is not finite; the rest is of the others.
    """
    finite = _finite(results)
    return {
        "loss": global_loss(finite, group) if finite else math.nan,
        "grad_norm": sum(r.grad_norm for r in finite) / len(finite) if finite else math.nan,
        "lr": results[-1].learning_rate,
        "update/skipped": float(sum(not r.stepped for r in finite)),
        "update/not_finite": float(len(results) - len(finite)),
    }


def _finite(results: list[UpdateResult]) -> list[UpdateResult]:
    return [result for result in results if result.not_finite is None]


def published(results: list[UpdateResult], group: dist.ProcessGroup) -> SequenceTable:
    """Return the sequences of several updates, of all replicas in rank order. A collective over data parallelism."""
    return SequenceTable(gather_rows(torch.cat([result.stats.table.values for result in results]), group))


def _noise_floor(first: UpdateResult, group: dist.ProcessGroup) -> dict[str, float]:
    """Return ratio/noise_floor: rms of log s in the first minibatch, whose weights are those of the old log-probs. It
    is 0 but for noise, which must stay far below the clip range."""
    table = published([first], group)
    log_ratio = table.column("sum_log_ratio") / table.column("num_tokens").clamp(min=1)
    log_ratio = log_ratio[(table.column("num_tokens") > 0) & torch.isfinite(log_ratio)]
    return {"ratio/noise_floor": float(log_ratio.square().mean().sqrt())} if log_ratio.numel() else {}


def update_metrics(results: list[UpdateResult], group: dist.ProcessGroup) -> dict[str, float]:
    """Return ratio, clipping, KL and optimizer metrics of one rollout batch (all its minibatches).

    Args:
        results: one a minibatch, of this replica.
        group: data-parallel ranks.
    """
    metrics = optimizer_metrics(results, group)
    if not _finite(results):
        return metrics
    metrics |= _noise_floor(results[0], group)
    table = published(_finite(results), group)
    counted = SequenceTable(table.values[table.column("num_tokens") > 0])
    if counted.values.numel() == 0:
        return metrics
    lengths = counted.column("num_tokens")
    tokens = lengths.sum()
    ratio = (counted.column("sum_log_ratio") / lengths).exp()
    mismatch = (counted.column("sum_mismatch") / lengths).abs()
    low, high = counted.column("clipped_low_tokens"), counted.column("clipped_high_tokens")
    return metrics | {
        "ratio/mean": float(ratio.mean()),
        "ratio/std": float(ratio.std(correction=0)),
        "ratio/min": float(ratio.min()),
        "ratio/max": float(ratio.max()),
        "ratio/max_abs_token_log_ratio": float(counted.column("max_abs_log_ratio").max()),
        "clip/seq_low": float((low > 0).double().mean()),
        "clip/seq_high": float((high > 0).double().mean()),
        "clip/token": float((low + high).sum() / tokens),
        "kl/k1": float(-counted.column("sum_log_ratio").sum() / tokens),
        "kl/k3": float(counted.column("sum_k3").sum() / tokens),
        "kl/ref": float(counted.column("sum_ref_kl").sum() / tokens),
        # Of a sequence's mean log-prob, rollout against training: noise of the engines, apart from ratio/*, which is
        # how far the policy has moved since.
        "mismatch/mean": float(mismatch.mean()),
        "mismatch/max": float(mismatch.max()),
        "entropy": float(counted.column("sum_entropy").sum() / tokens),
    }
