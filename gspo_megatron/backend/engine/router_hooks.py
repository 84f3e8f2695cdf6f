"""What is attached to Megatron's routers: a tap that notes what they choose, and gives them what they are to take.

Routing is left free unless a RouteTrace carries routes to replay. Megatron's own replay (moe/router_replay.py) keeps
its state in the routers and takes it up in the order of the calls, which recomputation under pipeline parallelism
changes; here a router asks the trace of the microbatch that is passing through, which its layer finds in
`packed_seq_params`. Only the interface is Megatron's: a router asks its `router_replay` for the top-k.

Left out: Transformer Engine's fused router (moe_router_fusion), which asks nobody.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay
from megatron.core.transformer.transformer_layer import TransformerLayer

from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.layers.expert_groups import RankedGroups
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch
from gspo_megatron.ops.sequence_ratio_reference import sequence_ids
from gspo_megatron.routing.rollout_routes import RolloutRecorder
from gspo_megatron.routing.routes import RoutedTokens, RouteTrace


class RouterTap(RouterReplay):
    """A router's `router_replay`. Its `trace` is that of the microbatch in its layer; None: nothing is noted."""

    def __init__(self, router: TopKRouter):
        # Not Megatron's constructor: that would keep this object, and its model, in a global list for ever.
        self.router, self.layer = router, router.layer_number
        self._untapped: RankedGroups | None = router.router_replay  # the router's own rule, where it is not Megatron's
        self.trace: RouteTrace | RolloutRecorder | None = None

    def get_replay_topk(self, scores, topk, num_groups=None, group_topk=None, default_compute_topk=None):
        """Choose as Megatron does, or as told: scores [R, E] -> (values, indices) [R, k] each."""
        compute_topk = default_compute_topk if self._untapped is None else self._untapped.choose
        values, own = compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        trace = self.trace
        if trace is None:
            return values, own
        if isinstance(trace, RouteTrace) and trace.is_new(self.layer):
            trace.entropy[self.layer] = self._entropy(scores.detach(), trace.tokens.counted)
        told = trace.choose(self.layer, own)
        return (values, own) if told is None else (scores.gather(1, told), told)

    def _entropy(self, scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[]: sum over rows of -sum_e p_e ln p_e. Sigmoid scores (without their selection bias) are normalised."""
        scores, config = scores[rows], self.router.config
        if self.router.score_function == "softmax":
            share = scores if config.moe_router_pre_softmax else scores.softmax(1)
        else:
            bias = self.router.expert_bias
            own = scores if bias is None else scores - bias
            share = own / own.sum(1, keepdim=True)
        return torch.special.entr(share).sum()

    def confirm(self, router: TopKRouter, inputs: tuple, output: tuple) -> None:
        """Show the trace what the router gave. A forward hook; output: (probs, routing_map [R, E] bool)."""
        if self.trace is not None:
            self.trace.confirm(self.layer, output[1])


class RouterTaps:
    """The taps of all MoE layers of this rank."""

    def __init__(self, chunks: Sequence[torch.nn.Module], topology: Topology):
        """chunks: unwrapped model chunks of this rank."""
        self._topology = topology
        self.layers: list[int] = []  # numbers, from 1 over all stages
        for chunk in chunks:
            for layer in chunk.modules():
                if isinstance(layer, TransformerLayer) and isinstance(getattr(layer.mlp, "router", None), TopKRouter):
                    self._tap(layer)

    def _tap(self, layer: TransformerLayer) -> None:
        router = layer.mlp.router
        tap = router.router_replay = RouterTap(router)

        def enter(layer: TransformerLayer, args: tuple, kwargs: dict) -> None:
            tap.trace = getattr(kwargs.get("packed_seq_params"), "trace", None)

        layer.register_forward_pre_hook(enter, with_kwargs=True)
        router.register_forward_hook(tap.confirm)
        self.layers.append(router.layer_number)

    def tokens(self, batch: PackedBatch, plan: PackedPlan) -> RoutedTokens:
        """Return the tokens that this rank's routers see, in their order."""
        place = torch.arange(batch.num_tokens, device=batch.tokens.device) if plan.rows is None else plan.rows
        # Sequence parallelism cuts them over tensor ranks.
        place = place.tensor_split(self._topology.tp_size)[self._topology.tp_rank]
        end = int(batch.cu_seqlens[batch.num_sequences])
        # The output at a place predicts the next token; the first of a sequence is never trained.
        following = (place + 1).clamp(max=batch.num_tokens - 1)
        trained = (batch.loss_mask[following] > 0) & (place + 1 < batch.num_tokens)
        counted = trained.nonzero().squeeze(1)
        ids = sequence_ids(batch.cu_seqlens[: batch.num_sequences + 1], batch.num_tokens)
        return RoutedTokens(
            place=place,
            identity=(batch.tokens[place] << 32) | batch.position_ids[place],
            counted=counted,
            sequence=ids[place[counted]],
            real=place < end,
        )
