"""The frozen reference policy: a copy of the weights that trades places with the policy's for one forward pass.

One copy of this rank's shard is all it costs, in any layout, and the model is built once. Left out: keeping the copy in
host memory while a GPU trains.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class FrozenReference:
    """The weights of `models` (unwrapped chunks) as they are now."""

    def __init__(self, models: list[torch.nn.Module]):
        self._parameters = [p for model in models for p in model.parameters()]
        self._weights = [p.detach().clone() for p in self._parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the models are the reference. Only forward passes; the policy's weights come back to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, weight in zip(self._parameters, self._weights, strict=True):
            current = parameter.detach().clone()
            parameter.copy_(weight)
            weight.copy_(current)
