"""Routing in the passes of one policy: notes the old policy's routes, replays them where the recipe asks for it, proves
that they were taken, and counts what has changed.

Left out: the reference's and critic's, whose routing is always free. Generation records its routes itself, for R3
(rollout/megatron_engine.py).
"""

from collections.abc import Callable, Sequence

from gspo_megatron.backend.engine.network import Microbatch
from gspo_megatron.backend.engine.router_hooks import RouterTaps
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.batch import PackedBatch
from gspo_megatron.config import RoutingConfig
from gspo_megatron.errors import TrainingError
from gspo_megatron.routing.routes import RoutedTokens, Routes, RouteTrace
from gspo_megatron.routing.statistics import MinibatchRouting, RoutingStatistics

# At the weights that made them, a router chooses the replayed experts itself, but for what kernels that add in no fixed
# order flip (none on a CPU). Routes of another token agree by chance.
MOST_DIFFERENT = 0.05


class RoutingWatch:
    """Watches the routing of one Policy. Does nothing for a dense model, or where the recipe turns it off."""

    def __init__(self, config: RoutingConfig, chunks: Sequence[PackedModel], topology: Topology):
        """chunks: unwrapped model chunks of this rank."""
        model = chunks[0].config
        self.config, self._is_on = config, bool(model.num_moe_experts) and config.statistics
        self._taps = RouterTaps(chunks, topology)
        self._recomputes = model.recompute_granularity == "full"
        self._traces: list[tuple[PackedBatch, RouteTrace]] = []
        self.topk = model.moe_router_topk
        shape = (model.num_layers, model.num_moe_experts or 0)
        self.statistics = RoutingStatistics(shape, topology.dp_size, topology.dp_rank)

    @property
    def wants_rollout_routes(self) -> bool:
        """Generation is to record its routes."""
        return self._is_on and self.config.replay == "R3"

    def before_old(self, work: list[Microbatch]) -> None:
        """Trace a pass of the old policy, as Network.run's `before_forward`. With R3 a collective over all ranks."""
        self._trace(work, self._rollout_routes if self.config.replay == "R3" else None, counts=False)

    def after_old(self) -> None:
        """Keep the routes of that pass with its batches. With R3 a collective over all ranks."""
        if self._is_on and self.config.replay == "R3":
            _together(lambda: self._prove(passes=1, minibatch=0))
        for batch, trace in self._traces:
            batch.old_routes = trace.routes()

    def before_update(self, work: list[Microbatch]) -> None:
        """Trace an update, as `before_forward`. With replay a collective over all ranks."""
        self._trace(work, _old_routes if self.config.replay != "none" else None)

    def before_fixed(self, work: list[Microbatch]) -> None:
        """Trace a pass of the new policy along old routes, whatever the recipe says. A collective."""
        self._trace(work, _old_routes, counts=False)

    def after_fixed(self) -> None:
        """Prove that the routes were taken. A collective over all ranks."""
        _together(lambda: self._prove(passes=1, minibatch=None))

    def _trace(
        self,
        work: list[Microbatch],
        replay: Callable[[PackedBatch, RoutedTokens], Routes | None] | None,
        counts: bool = True,
    ) -> None:
        """Put a trace into each plan, which follows the microbatch from there."""
        self._traces = []
        if not self._is_on:
            return

        def trace_all() -> None:
            for micro in work:
                tokens = self._taps.tokens(micro.batch, micro.plan)
                given = replay(micro.batch, tokens) if replay else None
                micro.plan.trace = RouteTrace(tokens, self._taps.layers, given, counts)
                self._traces.append((micro.batch, micro.plan.trace))

        if replay:
            _together(trace_all)
        else:
            trace_all()

    def _rollout_routes(self, batch: PackedBatch, tokens: RoutedTokens) -> Routes:
        if batch.rollout_routes is None:
            raise TrainingError("routing replay: a microbatch has no routes of its rollout to replay.")
        experts = zip(batch.rollout_layers, batch.rollout_routes, strict=True)
        return Routes(tokens, {layer: chosen[tokens.place] for layer, chosen in experts})

    def after_update(self, minibatch: int) -> None:
        """Count, and with replay prove that the routes were taken; that is a collective over all ranks.

        Raises:
            TrainingError: they were not, by every layer, once in forward and once in recomputation, or, in the first
                minibatch, they are not those that its routers choose.
        """
        if not self._is_on:
            return
        if self.config.replay != "none":
            _together(lambda: self._prove(2 if self._recomputes else 1, minibatch))
        traces = [trace for _, trace in self._traces]
        # A first minibatch may have its old routes from this very pass.
        old = [batch.old_routes or (trace.routes() if minibatch == 0 else None) for batch, trace in self._traces]
        self.statistics.add(minibatch, traces, old, [batch.num_sequences for batch, _ in self._traces])
        self._traces = []

    def take(self) -> list[MinibatchRouting]:
        """See RoutingStatistics.take. A collective over all ranks."""
        return self.statistics.take()

    def _prove(self, passes: int, minibatch: int | None) -> None:
        for number, (_, trace) in enumerate(self._traces):
            if trace.replay is None:
                continue
            found = trace.problem(passes)
            if found is None and minibatch == 0:
                found = self._strange(trace)
            if found:
                raise TrainingError(f"routing replay, microbatch {number}: {found}. Train with routing.replay none.")

    def _strange(self, trace: RouteTrace) -> str | None:
        """What tells that routes belong to other tokens, at the weights that made them."""
        if not trace.layers or trace.tokens.counted.numel() == 0:
            return None
        by_layer = trace.strange()
        worst = int(by_layer.argmax())
        percent = 100 * float(by_layer[worst])
        if percent <= 100 * MOST_DIFFERENT:
            return None
        return (
            f"at the weights that made the routes, the routers of layer {trace.layers[worst]} would choose "
            f"{percent:.0f}% other experts, so the routes are shifted or of another batch"
        )


def _old_routes(batch: PackedBatch, tokens: RoutedTokens) -> Routes | None:
    """None where a batch has none: its own forward is the old pass (algorithm.old_logprobs first_minibatch)."""
    return batch.old_routes


def _together(fn: Callable[[], None]) -> None:
    """Run it, and raise on every rank what any of them raised."""
    error = None
    try:
        fn()
    except TrainingError as caught:
        error = caught
    raise_together(error)
