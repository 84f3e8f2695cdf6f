"""The forward of a model chunk in generation.

`PlainForward` is plain functions of the parameters of Megatron's modules (plain_attention.py, plain_experts.py): a step
of decoding has few tokens, and the modules cost more than these. `ModuleForward` calls the modules, which is what
Transformer Engine's layers need (not run by us yet: it needs a GPU). Both are one network with the packed forward of
training, on the same parameters: there is no second copy of a weight.

Hidden states that travel between stages are whole on every tensor rank with PlainForward, shares with ModuleForward.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from gspo_megatron.backend.layers.attention import CachePlan
from gspo_megatron.backend.layers.plain_attention import ModuleAttention, PlainAttention, Rotary
from gspo_megatron.backend.layers.plain_experts import PlainExperts, PlainMLP, holds_all_tokens, share_over_experts
from gspo_megatron.backend.model.builder import PolicyModel
from gspo_megatron.backend.parallel.shares import place_of_share, summed, tokens_of_share
from gspo_megatron.backend.parallel.topology import Topology


class Forward(Protocol):
    """The forward of one virtual stage."""

    def begin(self, plan: CachePlan) -> slice:
        """Make ready for a pass; return which of its tokens this rank's routers see, padding among them. A collective
        where experts span replicas."""

    def num_rows(self, plan: CachePlan) -> int:
        """Return how many rows of hidden states travel between stages."""

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: CachePlan, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute a pass.

        Args:
            tokens: [T] int64.
            positions: [T] int64.
            hidden: [rows, H] from the stage before; None on the first.

        Returns:
            [rows, H] for the next stage; on the last one something of which `logits` makes logits.
        """

    def logits(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Return logits [n, V / TP] fp32 (or wider) of tokens `wanted` [n] int64 of the last stage's output."""


def forward_of(model: PolicyModel, topology: Topology) -> Forward:
    """Return the forward of a chunk: plain functions where its layers are Megatron's local ones."""
    return ModuleForward(model, topology) if model.uses_transformer_engine else PlainForward(model, topology)


class PlainForward:
    """A chunk's layers as plain functions."""

    def __init__(self, model: PolicyModel, topology: Topology):
        self.model, self.topology = model, topology
        self.layers = [PlainLayer(layer, topology) for layer in model.decoder.layers]
        self.gathers = bool(model.config.num_moe_experts) and not holds_all_tokens(topology)

    def begin(self, plan: CachePlan) -> slice:
        """Agree on the size of shares, where experts are gathered for. See Forward."""
        if not self.gathers:
            return slice(None)
        plan.share = share_over_experts(plan.num_tokens, self.topology, plan.positions.device)
        return place_of_share(plan.share, self.topology)

    def num_rows(self, plan: CachePlan) -> int:
        """Return the tokens of the pass. See Forward."""
        return plan.num_tokens

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: CachePlan, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute a pass: [T, H]. See Forward."""
        x = self._embedded(tokens) if hidden is None else hidden
        rotary = self._rotary(positions, plan, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, plan)
        return x

    def logits(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Normalise and multiply with the head's rows of this rank. See Forward."""
        return self.model.logits_of(self.model.decoder.final_layernorm(out[wanted]))

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, H]: each tensor rank looks up its part of the vocabulary, and has zeros of the rest."""
        table = self.model.embedding.word_embeddings
        if self.topology.tp_size == 1:
            return F.embedding(tokens, table.weight)
        first, end = table.vocab_start_index, table.vocab_end_index
        is_mine = (tokens >= first) & (tokens < end)
        found = F.embedding((tokens - first) * is_mine, table.weight)
        return summed(found.masked_fill_(~is_mine.unsqueeze(1), 0.0), self.topology)

    def _rotary(self, positions: torch.Tensor, plan: CachePlan, dtype: torch.dtype) -> Rotary | None:
        """The angles of the pass; latent attention takes them, those of filled-up shares among them, with the plan."""
        if self.model.angle_table is None:
            return Rotary.of(self.model.angles_at(positions), dtype)
        size = tokens_of_share(positions.numel(), self.topology) * self.topology.tp_size
        plan.angles = self.model.angle_table.at(F.pad(positions, (0, size - positions.numel())))
        return None


class PlainLayer:
    """One layer: attention and feed-forward, each on normalised hidden states and added to them."""

    def __init__(self, layer: TransformerLayer, topology: Topology):
        attention, mlp = layer.self_attention, layer.mlp
        self.layer = layer
        self.attention = (PlainAttention if type(attention) is SelfAttention else ModuleAttention)(attention, topology)
        self.mlp = (PlainExperts if isinstance(mlp, MoELayer) else PlainMLP)(mlp, topology)

    def __call__(self, x: torch.Tensor, rotary: Rotary | None, plan: CachePlan) -> torch.Tensor:
        """Compute the layer: [T, H] -> [T, H]."""
        if x.size(0):  # a replica without tokens takes part in experts alone
            x = x + self.attention(self.layer.input_layernorm(x), rotary, plan)
        return x + self.mlp(self.layer.pre_mlp_layernorm(x), plan)


class ModuleForward:
    """A chunk through Megatron's modules, tokens cut over tensor ranks (sequence parallelism)."""

    def __init__(self, model: PolicyModel, topology: Topology):
        self.model, self.topology = model, topology

    def begin(self, plan: CachePlan) -> slice:
        """Return this tensor rank's share. See Forward."""
        return place_of_share(self.num_rows(plan), self.topology)

    def num_rows(self, plan: CachePlan) -> int:
        """Return the size of a share; a replica without tokens still runs its experts. See Forward."""
        return tokens_of_share(plan.num_tokens, self.topology)

    def __call__(
        self, tokens: torch.Tensor, positions: torch.Tensor, plan: CachePlan, hidden: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute a pass: [T / TP, H], logits on the last stage. See Forward."""
        padding = self.num_rows(plan) * self.topology.tp_size - tokens.numel()
        tokens, positions = F.pad(tokens, (0, padding)), F.pad(positions, (0, padding))
        if hidden is not None:
            self.model.set_input_tensor(hidden.unsqueeze(1))
        out = self.model(tokens.unsqueeze(0), positions.unsqueeze(0), None, packed_seq_params=plan)
        return out if self.model.post_process else out.squeeze(1)

    def logits(self, out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Choose among the logits. See Forward."""
        return out[wanted]
