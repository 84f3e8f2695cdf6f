"""All experts of a layer in a handful of operations: one product an expert and direction, the rest for all tokens at
once.

Megatron's SequentialMLP runs a module an expert, those without tokens too: at 128 experts most of a step was that. Its
parameters, their names, cuts and places in checkpoints stay; the forward is ours. What Megatron does with an expert's
output bias (added before the reduction over expert tensor ranks) is kept.

Left out: Transformer Engine's grouped products on GPUs (builder.py takes its layers there), and weights stacked into
one tensor, which would be a copy of all of them.
"""

from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig


class PackedExperts(SequentialMLP):
    """SequentialMLP whose experts are computed together."""

    def forward(self, hidden: torch.Tensor, tokens_per_expert: torch.Tensor, probs: torch.Tensor):
        """Compute the experts of this rank.

        Args:
            hidden: [n, H], the tokens of the first expert, then those of the second, ...
            tokens_per_expert: [experts] int64, their sum is n.
            probs: [n], by which outputs are weighed.

        Returns:
            [n, H], before the reduction over expert tensor ranks, and None: a bias is in it already.
        """
        counts = tokens_per_expert.tolist()
        first, second = ([getattr(one, name) for one in self.local_experts] for name in ("linear_fc1", "linear_fc2"))
        inner = gated_linear_unit(_linear(hidden, counts, first), self.config)
        inner = (inner * probs.unsqueeze(-1)).to(hidden.dtype)
        out = ExpertProducts.apply(inner, counts, *(one.weight for one in second))
        if self.config.add_bias_linear:
            out = out + _bias(counts, second) * probs.unsqueeze(-1)
        return out.to(hidden.dtype), None


def gated_linear_unit(both: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Compute the gated linear unit, clamped and offset where the model has that (GPT-OSS): [n, 2 F] -> [n, F]."""
    gate, up = both.chunk(2, dim=-1)
    if (most := config.activation_func_clamp_value) is not None:
        gate, up = gate.clamp(max=most), up.clamp(min=-most, max=most)
    return config.activation_func(gate) * (up + config.glu_linear_offset if config.glu_linear_offset else up)


def pack_experts(model: torch.nn.Module) -> None:
    """Let the experts of a model be computed together. Transformer Engine's stay as they are.

    Their class is changed where they stand (as torch's fully_shard does): the versions of Megatron that are supported
    name it in different places.
    """
    for module in model.modules():
        if type(module) is SequentialMLP:
            module.__class__ = PackedExperts


class ExpertProducts(torch.autograd.Function):
    """x_e W_e' of each expert e: [n, I] -> [n, O], tokens of an expert next to each other. An expert without tokens
    costs nothing, forward and backward; its weight has no gradient then."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, counts: Sequence[int], *weights: torch.Tensor) -> torch.Tensor:
        """Multiply. weights: [O, I] each, one an expert."""
        ctx.counts = counts
        ctx.save_for_backward(x, *weights)
        out = x.new_empty(x.size(0), weights[0].size(0))
        for rows, weight in zip(_rows(counts), weights, strict=True):
            if rows:
                torch.mm(x[rows.start : rows.stop], weight.t(), out=out[rows.start : rows.stop])
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        """Multiply back: two products an expert."""
        x, *weights = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor | None] = [None] * len(weights)
        for number, rows in enumerate(_rows(ctx.counts)):
            if not rows:
                continue
            mine = grad[rows.start : rows.stop]
            if grad_x is not None:
                torch.mm(mine, weights[number], out=grad_x[rows.start : rows.stop])
            if ctx.needs_input_grad[2 + number]:
                grads[number] = mine.t() @ x[rows.start : rows.stop]
        return grad_x, None, *grads


def _linear(x: torch.Tensor, counts: Sequence[int], layers: Sequence[torch.nn.Module]) -> torch.Tensor:
    out = ExpertProducts.apply(x, counts, *(layer.weight for layer in layers))
    return out if layers[0].bias is None else out + _bias(counts, layers)


def _bias(counts: Sequence[int], layers: Sequence[torch.nn.Module]) -> torch.Tensor:
    """[n, O]: of each token its expert's."""
    bias = torch.stack([layer.get_parameter("bias") for layer in layers])
    return bias.repeat_interleave(torch.tensor(counts, device=bias.device), dim=0)


def _rows(counts: Sequence[int]) -> list[range]:
    """The rows of each expert's tokens."""
    found, start = [], 0
    for count in counts:
        found.append(range(start, start + count))
        start += count
    return found
