"""Group-limited routing of models whose groups Megatron would rank otherwise.

A token takes its experts from its best groups alone (DeepSeek-V2, arXiv 2405.04434, section 2.1.2, and V3). Megatron
ranks a group by the sum of its best moe_router_topk / moe_router_group_topk experts; DeepSeek-V2 does so by its best
expert, V3 and GLM-4.5 by their best two, whatever the two numbers are. A router asks its `router_replay` for the top-k,
which is where the rule is put in; router_hooks.py's tap goes in front of it.

Left out: Transformer Engine's fused router (moe_router_fusion), which asks nobody.
"""

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay

from gspo_megatron.models.architecture import Architecture


class RankedGroups(RouterReplay):
    """A router's `router_replay` that replays nothing. Groups are ranked by the sum of their `best` experts' scores."""

    def __init__(self, best: int):
        # Not Megatron's constructor: that would keep this object in a global list for ever.
        self.best = best

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """Choose with groups ranked so: scores [R, E] -> (values, indices) [R, k] each, as Megatron's."""
        return self.choose(scores, topk, num_groups, group_topk)

    def choose(
        self, scores: torch.Tensor, topk: int, num_groups: int, group_topk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose as Megatron's group_limited_topk does, but for the rank of a group."""
        by_group = scores.view(len(scores), num_groups, -1)  # [R, G, E / G]
        rank = by_group.topk(self.best, dim=-1).values.sum(-1)  # [R, G]
        kept = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(group_topk, dim=-1).indices, True)
        return by_group.masked_fill(~kept[:, :, None], -torch.inf).flatten(1).topk(topk, dim=-1)


def rank_groups(gpt: torch.nn.Module, arch: Architecture) -> None:
    """Give the routers of a model chunk the rule, where Megatron's own is another one."""
    if arch.router_groups == 1 or arch.num_experts_per_tok // arch.router_top_groups == arch.router_group_best:
        return
    for module in gpt.modules():
        if isinstance(module, TopKRouter):
            module.router_replay = RankedGroups(arch.router_group_best)
