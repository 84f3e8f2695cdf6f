"""How routing changes from the policy that sampled (old) to the one being trained (new), and how experts are loaded.

A token's routes count where its output predicts a trained token: no other token's move a ratio. A route has changed
where an expert is among the k of the new policy and not among those of the old one; a token of a layer has changed
where any of its experts has (the SET differs). The first minibatch of a rollout batch is trained at the weights that
made the old routes, so nothing changes there, and shares over a whole step are over the minibatches after it.

Under replay "new" is what the routers would have chosen; what was taken is the old.

Left out: which expert took over from which.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from gspo_megatron.routing.routes import Routes, RouteTrace, changed_experts

COLUMNS = (
    "tokens",  # trained
    "compared",  # trained, of which the old routes are known
    "changed_tokens",
    "changed_experts",
    "entropy",  # of the router's distribution, summed, nats
)


@dataclass(frozen=True)
class MinibatchRouting:
    """One optimizer step's counts, of one rank (its layers, its tokens) or summed over all. All fp64."""

    layers: torch.Tensor  # [L, len(COLUMNS)], every layer of the model; 0 where a layer is dense or elsewhere
    load: torch.Tensor  # [L, E] tokens of each expert, prompts included
    sequences: torch.Tensor  # [S, 2]: changed and compared (token, layer) pairs; summed: [replicas, S, 2]

    def column(self, name: str) -> torch.Tensor:
        """Return one kind of count, [L] fp64."""
        return self.layers[:, COLUMNS.index(name)]


def count(
    traces: list[RouteTrace], old: list[Routes | None], sizes: list[int], shape: tuple[int, int]
) -> MinibatchRouting:
    """Count one rank's part of one optimizer step.

    Args:
        traces, old: of each microbatch, the passes of the update and the routes of the old policy, where known.
        sizes: sequences of each microbatch.
        shape: (layers, experts) of the model.
    """
    device = traces[0].tokens.place.device
    layers = torch.zeros(shape[0], len(COLUMNS), dtype=torch.float64, device=device)
    load = torch.zeros(shape, dtype=torch.float64, device=device)
    sequences = []
    for trace, before, size in zip(traces, old, sizes, strict=True):
        sequences.append(torch.zeros(size, 2, dtype=torch.float64, device=device))
        if not trace.layers:  # a stage of dense layers
            continue
        mine, tokens = torch.tensor(trace.layers, device=device) - 1, trace.tokens
        rows = layers.new_zeros(len(mine), len(COLUMNS))
        rows[:, 0] = tokens.counted.numel()
        rows[:, 4] = torch.stack([trace.entropy[layer] for layer in trace.layers])
        if before is not None:
            changed = changed_experts(trace.chosen, before.experts, trace.layers, tokens.counted)  # [mine, n]
            sets = changed > 0
            rows[:, 1], rows[:, 2], rows[:, 3] = tokens.counted.numel(), sets.sum(1), changed.sum(1)
            pairs = torch.stack([sets.sum(0), torch.full_like(tokens.counted, len(mine))], dim=1).double()
            sequences[-1].index_add_(0, tokens.sequence, pairs)
        layers[mine] += rows
        for layer in trace.layers:
            load[layer - 1] += torch.bincount(trace.taken(layer)[tokens.real].flatten().long(), minlength=shape[1])
    return MinibatchRouting(layers, load, torch.cat(sequences))


class RoutingStatistics:
    """Counts of the minibatches since the last `take`, of this rank."""

    def __init__(self, shape: tuple[int, int], replicas: int, replica: int):
        """
        Args:
            shape: (layers, experts) of the model.
            replicas, replica: data-parallel size and rank.
        """
        self.shape, self._replicas, self._replica = shape, replicas, replica
        self._minibatches: dict[int, MinibatchRouting] = {}

    def add(self, minibatch: int, traces: list[RouteTrace], old: list[Routes | None], sizes: list[int]) -> None:
        """Keep a minibatch's counts; one of the same number, of a step that nobody asked about, is forgotten."""
        self._minibatches[minibatch] = count(traces, old, sizes, self.shape)

    def take(self) -> list[MinibatchRouting]:
        """Sum over all ranks, by minibatch. One collective over all ranks, of 16 bytes a sequence.

        With tensor or context parallelism each rank routes its own part of the tokens, and every layer is on one
        stage: a plain sum counts everything once.
        """
        mine = [self._minibatches[number] for number in sorted(self._minibatches)]
        self._minibatches.clear()
        if not mine:
            return []
        parts: list[torch.Tensor] = []
        for counted in mine:
            sequences = counted.sequences.new_zeros(self._replicas, *counted.sequences.shape)
            sequences[self._replica] = counted.sequences
            parts += [counted.layers, counted.load, sequences]
        total = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(total)
        split = total.cpu().split([part.numel() for part in parts])
        shaped = [values.view(part.shape) for values, part in zip(split, parts, strict=True)]
        return [
            MinibatchRouting(layers, load, sequences)
            for layers, load, sequences in zip(shaped[::3], shaped[1::3], shaped[2::3], strict=True)
        ]


def routing_metrics(minibatches: list[MinibatchRouting], topk: int) -> dict:
    """Make route/* of one step; lists are by layer (null: a dense one) or by minibatch."""
    if not minibatches:
        return {}
    load = torch.stack([counted.load for counted in minibatches]).sum(0)
    total = torch.stack([counted.layers for counted in minibatches]).sum(0)  # [L, columns]
    moe = total[:, 0] > 0
    if not bool(moe.any()):
        return {}
    entropy = total[:, COLUMNS.index("entropy")] / total[:, 0]
    imbalance = load.max(1).values / load.mean(1).clamp(min=1e-9)
    metrics = {
        "route/load_imbalance": float(imbalance[moe].mean()),
        "route/load_imbalance_max": float(imbalance[moe].max()),
        "route/dead_experts": float((load[moe] == 0).sum()),
        "route/entropy": float(entropy[moe].mean()),
        "route/by_layer/entropy": _by_layer(entropy, moe),
        "route/by_layer/load_imbalance": _by_layer(imbalance, moe),
    }
    return metrics | _change_metrics(minibatches[1:], topk, moe)


def _change_metrics(later: list[MinibatchRouting], topk: int, moe: torch.Tensor) -> dict:
    """Of the minibatches after the first."""
    later = [counted for counted in later if float(counted.column("compared").sum()) > 0]
    if not later:
        return {}
    total = torch.stack([counted.layers for counted in later]).sum(0)
    compared, tokens, experts = (
        total[:, COLUMNS.index(name)] for name in ("compared", "changed_tokens", "changed_experts")
    )
    shares = [
        float(counted.column("changed_experts").sum() / counted.column("compared").sum() / topk) for counted in later
    ]
    return {
        "route/changed_tokens": float(tokens.sum() / compared.sum()),
        "route/changed_experts": float(experts.sum() / compared.sum() / topk),
        "route/changed_experts_one_update": shares[0],
        "route/by_layer/changed_tokens": _by_layer(tokens / compared, moe),
        "route/by_layer/changed_experts": _by_layer(experts / compared / topk, moe),
        "route/by_minibatch/changed_experts": shares,
    }


def _by_layer(values: torch.Tensor, moe: torch.Tensor) -> list[float | None]:
    return [float(value) if is_moe else None for value, is_moe in zip(values, moe, strict=True)]
