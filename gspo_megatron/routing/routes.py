"""The experts that one rank's routers chose in one microbatch, and the same as an order to choose those again.

A pipeline stage routes in its own layers, a tensor-parallel rank its own slice of the tokens (sequence parallelism), a
context-parallel rank its own chunks: every rank keeps what it routed itself, and none of it ever crosses a rank.

Everything hangs on the microbatch's RouteTrace, which travels with the microbatch (layers/attention.py's plan) and not
in the routers: a pipeline has several microbatches in flight, and recomputation runs a layer of an earlier one again.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from gspo_megatron.errors import TrainingError

STORED = torch.int16  # of expert numbers


@dataclass(frozen=True)
class RoutedTokens:
    """R tokens that one rank routes, of the T of a microbatch."""

    place: torch.Tensor  # [R] int64, in the packed batch
    identity: torch.Tensor  # [R] int64, token id * 2^32 + position
    counted: torch.Tensor  # [n] int64, rows whose output predicts a trained token: the others move no ratio
    sequence: torch.Tensor  # [n] int64, whose they are
    real: torch.Tensor  # [R] bool, not in the padding segment

    def at(self, row: int) -> str:
        """Describe a token for people."""
        return f"token {int(self.identity[row]) >> 32} at position {int(self.identity[row]) & 0xFFFFFFFF}"


@dataclass(frozen=True)
class Routes:
    """Chosen experts of a microbatch, by this rank's MoE layers."""

    tokens: RoutedTokens
    # Layer number, from 1 over all stages -> [R, k] int16, as top-k ordered them; below 0: not known.
    experts: dict[int, torch.Tensor]


class RouteTrace:
    """One pass of a microbatch through this rank's routers: what they choose, and what they are made to take."""

    def __init__(self, tokens: RoutedTokens, layers: list[int], replay: Routes | None = None, counts: bool = True):
        """
        Args:
            layers: this rank's MoE layers.
            replay: what every one of their routers takes instead of its own choice.
            counts: for statistics, which take entropies; they cost as much as all the rest.

        Raises:
            TrainingError: those routes are of other tokens or layers.
        """
        self.tokens, self.layers, self.replay = tokens, layers, replay
        self.chosen: dict[int, torch.Tensor] = {}  # layer -> [R, k] int16: the routers' own choices
        self.entropy: dict[int, torch.Tensor] = {}  # layer -> [] summed over counted tokens, nats
        self._counts = counts
        self._told: dict[int, torch.Tensor] = {}  # layer -> [R, k] int64
        self._uses: Counter[int] = Counter()
        self._astray: dict[int, torch.Tensor] = {}  # layer -> [] int64, routes that Megatron did not take
        if replay is not None:
            _same_tokens(tokens, replay.tokens)
            _has_layers(layers, replay.experts)

    def routes(self) -> Routes:
        """Return where the tokens went."""
        return Routes(self.tokens, {layer: self.taken(layer) for layer in self.layers})

    def is_new(self, layer: int) -> bool:
        """Ask whether its entropy is wanted and not known yet; recomputation comes by again."""
        return self._counts and layer not in self.chosen

    def choose(self, layer: int, own: torch.Tensor) -> torch.Tensor | None:
        """Note a router's own choice [R, k]; returns the experts [R, k] int64 to take instead, None: its own."""
        self._uses[layer] += 1
        self.chosen[layer] = own.to(STORED)
        if self.replay is None:
            return None
        given = self.replay.experts[layer].long()
        self._told[layer] = torch.where(given < 0, own, given)  # routes that are not known are the router's own
        return self._told[layer]

    def confirm(self, layer: int, routing_map: torch.Tensor) -> None:
        """Compare what the router gave [R, E] bool with what it was made to take."""
        if self.replay is not None:
            wanted = self._told[layer]
            taken = routing_map.gather(1, wanted).sum()
            self._astray[layer] = wanted.numel() - taken + (routing_map.sum() - taken)

    def problem(self, times: int) -> str | None:
        """Say what is wrong with a finished replay: every layer must have taken its routes `times` times."""
        for layer in self.layers:
            if self._uses[layer] != times:
                return f"layer {layer} took its routes {self._uses[layer]} times and not {times}"
            if int(self._astray[layer]):
                return f"layer {layer} did not send {int(self._astray[layer])} tokens to the experts it was told"
        return None

    def taken(self, layer: int) -> torch.Tensor:
        """Return [R, k] int16, where the layer's tokens went."""
        return self.chosen[layer] if self.replay is None else self._told[layer].to(STORED)

    def strange(self) -> torch.Tensor:
        """Return [L], the share of the counted tokens' experts that the routers would not have chosen themselves."""
        taken = {layer: self.taken(layer) for layer in self.layers}
        changed = changed_experts(self.chosen, taken, self.layers, self.tokens.counted).double()  # [L, n]
        return changed.mean(1) / next(iter(taken.values())).size(1)


def changed_experts(
    new: dict[int, torch.Tensor], old: dict[int, torch.Tensor], layers: list[int], rows: torch.Tensor
) -> torch.Tensor:
    """Count [L, n] int64: of each row's k experts in `new` [R, k] a layer, those not in `old`, in whatever order."""
    ours, theirs = (torch.stack([chosen[layer][rows] for layer in layers]) for chosen in (new, old))  # [L, n, k]
    kept = (ours.unsqueeze(3) == theirs.unsqueeze(2)).any(3)
    return (~kept).sum(2)


def _same_tokens(ours: RoutedTokens, theirs: RoutedTokens) -> None:
    if ours.identity.shape != theirs.identity.shape:
        raise TrainingError(
            f"routing replay: the microbatch has {ours.identity.numel()} tokens on this rank and the routes to replay "
            f"are of {theirs.identity.numel()}. Old log-probs and update must use the same packing and layout."
        )
    wrong = (ours.identity != theirs.identity).nonzero()
    if wrong.numel():
        row = int(wrong[0])
        raise TrainingError(
            f"routing replay: row {row} of the microbatch is {ours.at(row)}, and its routes are those of "
            f"{theirs.at(row)}: they are shifted or of another batch. Old log-probs and update must use the same "
            "packing and layout."
        )


def _has_layers(layers: list[int], found: dict[int, torch.Tensor]) -> None:
    if sorted(layers) != sorted(found):
        raise TrainingError(
            f"routing replay: this rank has the MoE layers {sorted(layers)} and the routes to replay are of layers "
            f"{sorted(found)}. Old log-probs and update must use the same layout."
        )
