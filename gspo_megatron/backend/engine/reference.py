"""The frozen reference policy: a copy of the weights that trades places with the policy's for one forward pass.

One copy of this rank's shard is all it costs, in any layout, and the model is built once. Left out: keeping the copy in
host memory while a GPU trains.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


class FrozenReference:
    """The weights of `models` (unwrapped chunks) as they are now."""

    def __init__(self, models: Sequence[torch.nn.Module]):
        self.parameters = [p for model in models for p in model.parameters()]
        self.weights = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the models are the reference. Only forward passes; the policy's weights come back to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def load(self, weights: list[torch.Tensor]) -> None:
        """Take weights saved from `self.weights`."""
        for mine, saved in zip(self.weights, weights, strict=True):
            mine.copy_(saved)

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, weight in zip(self.parameters, self.weights, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(weight)
            weight.copy_(current)
