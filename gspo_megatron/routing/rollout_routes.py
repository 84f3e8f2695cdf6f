"""The experts that generation chose, token by token, so that training can take the same (R3, arXiv 2510.11370).

A pipeline stage has those of its own layers. The last token of a response is never fed in generation, so it has none;
nothing that training trains on depends on it.
"""

from dataclasses import dataclass

import torch

from gspo_megatron.routing.routes import STORED

UNKNOWN = -1


@dataclass(frozen=True)
class SequenceRoutes:
    """The routes of one prompt + response of n tokens."""

    layers: tuple[int, ...]  # this stage's MoE layers
    experts: torch.Tensor  # [L, n, k] int16, UNKNOWN where the token was not fed

    def padded(self, length: int) -> torch.Tensor:
        """Return [L, length, k], filled up with UNKNOWN."""
        short = length - self.experts.size(1)
        return torch.nn.functional.pad(self.experts, (0, 0, 0, short), value=UNKNOWN)


class RolloutRecorder:
    """What routers of one stage choose while a wave of responses is generated. Stands where a RouteTrace does."""

    def __init__(self, rows: int, max_len: int):
        """rows: responses of the wave."""
        self.experts: dict[int, torch.Tensor] = {}  # layer -> [rows, max_len, k] int16
        self._shape = (rows, max_len)
        self._rows = self._positions = torch.empty(0, dtype=torch.int64)

    def at(self, rows: torch.Tensor, positions: torch.Tensor) -> "RolloutRecorder":
        """Say who the tokens of the next pass are, in the order in which this rank's routers see them.

        Args:
            rows: [n, G] int64, the responses that share a token.
            positions: [n] int64. Tokens behind these n are padding.
        """
        self._rows, self._positions = rows, positions.unsqueeze(1)
        return self

    def choose(self, layer: int, own: torch.Tensor) -> None:
        """Note a router's choice [tokens, k]; it stands."""
        if layer not in self.experts:
            self.experts[layer] = torch.full((*self._shape, own.size(1)), UNKNOWN, dtype=STORED, device=own.device)
        self.experts[layer][self._rows, self._positions] = own[: self._rows.size(0)].to(STORED).unsqueeze(1)

    def confirm(self, layer: int, routing_map: torch.Tensor) -> None:
        """Do nothing: no router was told what to take."""
