"""Counts which experts Megatron's routers choose. Routing is only watched, never changed.

Left out: comparing old and new routes, and replaying them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter


class ExpertLoad:
    """Tokens sent to each expert in each layer, over all ranks."""

    def __init__(self, chunks: list[torch.nn.Module]):
        """chunks: unwrapped model chunks of this rank."""
        self._counting = False
        config = chunks[0].config
        shape = (config.num_layers, config.num_moe_experts or 0)
        self._tokens = torch.zeros(shape, dtype=torch.float64, device=next(chunks[0].parameters()).device)
        self._moe_layers = torch.tensor(config.moe_layer_freq, dtype=torch.bool)
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    module.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, inputs: tuple, output: tuple) -> None:
        if self._counting:
            # output: (probs, routing_map [tokens of this rank, E] bool); layer_number counts from 1 over all stages
            self._tokens[router.layer_number - 1] += output[1].sum(0)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside; not in generation, and not where recomputation would run a router twice."""
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def take(self) -> torch.Tensor:
        """[MoE layers, E] fp64 counts since the last call, the same on every rank. A collective over all ranks.

        With tensor parallelism each rank routes its own part of the tokens, so a plain sum counts each token once.
        """
        dist.all_reduce(self._tokens)
        total = self._tokens.cpu()[self._moe_layers]
        self._tokens.zero_()
        return total
