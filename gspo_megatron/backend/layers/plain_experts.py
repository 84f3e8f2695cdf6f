"""Feed-forward layers in generation, without Megatron's modules: dense ones, and experts without a token dispatcher.

Where the ranks that hold a layer's experts are the tensor ranks of one replica, all of them have all tokens already:
each computes its own experts, and one sum over tensor ranks does for experts, their tensor parallelism and shared
experts alike. In other layouts the tokens of all ranks that hold the experts together are gathered, each rank computes
what its experts give, and the sums are scattered back.

Left out: prefilling in parts. Each rank has room for all token-expert pairs of a pass at once, those of other ranks'
experts among them.

Routers are asked as Megatron's forward asks them, so what notes their choices (router_hooks.py) sees these too.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import group_limited_topk
from megatron.core.transformer.moe.router import TopKRouter

from gspo_megatron.backend.layers.attention import CachePlan
from gspo_megatron.backend.layers.experts import gated_linear_unit
from gspo_megatron.backend.parallel.shares import gathered, gathered_over, share_of, summed, tokens_of_share
from gspo_megatron.backend.parallel.topology import Topology


class PlainMLP:
    """Megatron's MLP on whole hidden states."""

    def __init__(self, module: MLP, topology: Topology):
        self.module, self.topology = module, topology

    def __call__(self, x: torch.Tensor, plan: CachePlan) -> torch.Tensor:
        """Compute the layer: [T, H] -> [T, H], whole on every tensor rank."""
        return summed(self.partial(x), self.topology)

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """Compute this tensor rank's part of the sum."""
        first, second = self.module.linear_fc1, self.module.linear_fc2
        return F.linear(gated_linear_unit(F.linear(x, first.weight), self.module.config), second.weight)


class PlainExperts:
    """Megatron's MoELayer on whole hidden states."""

    def __init__(self, module: MoELayer, topology: Topology):
        self.module, self.topology, self.router = module, topology, module.router
        self.shared = PlainMLP(module.shared_experts, topology) if module.shared_experts is not None else None
        self.first, self.count = module.local_expert_indices[0], len(module.local_expert_indices)
        self.group = topology.groups.tp_ep
        self.is_whole = holds_all_tokens(topology)

    def __call__(self, x: torch.Tensor, plan: CachePlan) -> torch.Tensor:
        """Compute the layer: [T, H] -> [T, H], whole on every tensor rank. A collective over the ranks that hold the
        experts, in which one without tokens takes part."""
        if hasattr(self.router.router_replay, "trace"):  # a tap (router_hooks.py)
            self.router.router_replay.trace = plan.trace
        if self.is_whole:
            out = self._routed(x, *chosen(self.router, x))
            return summed(out if self.shared is None else out + self._shared(x), self.topology)
        out = self._dispatched(x, plan)
        return out if self.shared is None else out + summed(self._shared(x), self.topology)

    def _dispatched(self, x: torch.Tensor, plan: CachePlan) -> torch.Tensor:
        share = share_of(x, self.topology, plan.share)
        weights, experts = chosen(self.router, share)
        everyone = (gathered_over(part, self.group) for part in (share, weights, experts))
        out = self._routed(*everyone)
        if self.group.size() > 1:
            mine = torch.empty_like(share)
            dist.reduce_scatter_tensor(mine, out, group=self.group)
            out = mine
        return gathered(out, self.topology)[: x.size(0)]

    def _routed(self, x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """What this rank's experts give to tokens [n, H] with weights and experts [n, k] -> [n, H]."""
        order = experts.flatten().argsort(stable=True)  # of token-expert pairs
        counts = torch.bincount(experts.flatten(), minlength=self.router.config.num_moe_experts)
        begin = int(counts[: self.first].sum())
        counts = counts[self.first : self.first + self.count]
        pairs = order[begin : begin + int(counts.sum())]
        out, _ = self.module.experts(x[pairs // experts.size(1)], counts, weights.flatten()[pairs])
        # Not index_add: in which order that adds is not fixed on a GPU.
        placed = x.new_zeros(experts.numel(), x.size(1)).index_copy_(0, pairs, out)
        return placed.view(*experts.shape, x.size(1)).sum(1)

    def _shared(self, x: torch.Tensor) -> torch.Tensor:
        """This tensor rank's part of what the shared experts give."""
        assert self.shared is not None
        out, gate = self.shared.partial(x), self.shared.module.gate_weight
        return out if gate is None else out * F.linear(x, gate).sigmoid()


def holds_all_tokens(topology: Topology) -> bool:
    """The ranks that hold a layer's experts together are the tensor ranks of one replica."""
    return topology.ep_size * topology.etp_size == topology.tp_size


def share_over_experts(count: int, topology: Topology, device: torch.device) -> int:
    """Return how many tokens each tensor rank's share of a pass has: the most of all replicas where experts span them,
    a collective then. (Of all: tensor ranks of one replica may hold experts with different other replicas.)

    Args:
        count: tokens of this replica in the pass.
    """
    own = tokens_of_share(count, topology)
    if not topology.experts_span_replicas:
        return own
    share = torch.tensor(own, device=device)
    dist.all_reduce(share, op=dist.ReduceOp.MAX, group=topology.dp_cp_group)
    return int(share)


def chosen(router: TopKRouter, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and numbers of the experts of each token, [T, k] each, as Megatron's router has them.

    Source: topk_routing_with_score_function of megatron.core.transformer.moe.moe_utils.
    """
    config, k = router.config, router.topk
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(config.moe_router_dtype, x.dtype)
    bias = None if router.bias is None else router.bias.to(dtype)
    logits = F.linear(x.to(dtype), router.weight.to(dtype), bias)
    if config.moe_router_score_function == "sigmoid":
        scores = logits.float().sigmoid().to(dtype)
        corrected = scores if router.expert_bias is None else scores + router.expert_bias.float()
        _, experts = _topk(router, corrected)
        weights = scores.gather(1, experts).to(dtype)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if k > 1 else weights
    elif config.moe_router_pre_softmax:
        weights, experts = _topk(router, logits.softmax(-1, dtype=torch.float32).to(dtype))
    else:
        best, experts = _topk(router, logits)
        weights = best.softmax(-1, dtype=torch.float32).to(dtype)
    scale = config.moe_router_topk_scaling_factor
    return weights if scale is None else weights * scale, experts


def _topk(router: TopKRouter, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, E] -> values and experts [T, k], by whatever rule the router has."""
    config = router.config
    groups, top_groups = config.moe_router_num_groups, config.moe_router_group_topk

    def by_megatron(scores, topk, num_groups=None, group_topk=None):
        if not group_topk:
            return scores.topk(topk, dim=1)
        return group_limited_topk(scores, topk, scores.size(0), scores.size(1), num_groups, group_topk)

    if router.router_replay is None:
        return by_megatron(scores, router.topk, groups, top_groups)
    return router.router_replay.get_replay_topk(scores, router.topk, groups, top_groups, by_megatron)
