"""Attention of one layer in generation, without Megatron's modules: plain functions of their parameters.

Of a token, Megatron's modules cost more than its arithmetic where few tokens are in a pass. Every tensor rank has whole
hidden states [T, H] here and not a share of the tokens, so a layer needs one sum over tensor ranks. Whatever attends is
the plan (attention.py), as in the packed forward.

Left out: plain functions of latent and of linear attention, whose modules are called.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention

from gspo_megatron.backend.layers.attention import CachePlan, softmax_of
from gspo_megatron.backend.parallel.shares import gathered, share_of, summed, tokens_of_share
from gspo_megatron.backend.parallel.topology import Topology


@dataclass(frozen=True)
class Rotary:
    """Rotary angles of the tokens of a pass. Halves of a head are turned into each other."""

    cos: torch.Tensor  # [T, 1, r]
    sin: torch.Tensor  # [T, 1, r], negative in the first half

    @classmethod
    def of(cls, angles: torch.Tensor, dtype: torch.dtype) -> "Rotary":
        """Make it of angles [T, r] fp32, both halves of which are the same."""
        sin = angles.sin()
        first, second = sin.chunk(2, -1)
        sin = torch.cat([-first, second], -1)
        return cls(*(x.unsqueeze(1).to(dtype) for x in (angles.cos(), sin)))

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate the first r dimensions: [T, n, d] -> the same."""
        turned = x[..., : self.cos.size(-1)]
        first, second = turned.chunk(2, -1)
        turned = torch.addcmul(turned * self.cos, torch.cat([second, first], -1), self.sin)
        if turned.size(-1) == x.size(-1):
            return turned
        return torch.cat([turned, x[..., turned.size(-1) :]], -1)


class PlainAttention:
    """Megatron's SelfAttention on whole hidden states."""

    def __init__(self, module: SelfAttention, topology: Topology):
        self.module, self.config, self.topology = module, module.config, topology
        self.groups = module.num_query_groups_per_partition
        self.heads = module.num_attention_heads_per_partition // self.groups  # queries of a group
        core = module.core_attention
        self.softmax = softmax_of(self.config, core.layer_number, core.softmax_offset, core.softmax_scale)

    def __call__(self, x: torch.Tensor, rotary: Rotary | None, plan: CachePlan) -> torch.Tensor:
        """Attend: [T, H] -> [T, H], whole on every tensor rank."""
        assert rotary is not None  # latent attention alone has none
        module = self.module
        query, gate, key, value = self._projected(x)
        if module.q_layernorm is not None:
            query, key = (
                module.q_layernorm(query.unsqueeze(1)).squeeze(1),
                module.k_layernorm(key.unsqueeze(1)).squeeze(1),
            )
        out = plan.attend(module.layer_number, rotary.turn(query), rotary.turn(key), value, self.softmax)
        if gate is not None:
            out = (out * gate.float().sigmoid()).to(out.dtype)
        out = summed(F.linear(out.flatten(1), module.linear_proj.weight), self.topology)
        return out if module.linear_proj.bias is None else out + module.linear_proj.bias

    def _projected(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Query [T, n, d], its gate where there is one, key and value [T, g, d]. Rows of the weight are by group."""
        linear = self.module.linear_qkv
        by_group = F.linear(x, linear.weight, linear.bias).view(x.size(0), self.groups, -1, self.config.kv_channels)
        gates = [self.heads] if self.config.attention_output_gate else []
        query, *gate, key, value = by_group.split([self.heads, *gates, 1, 1], 2)
        return query.flatten(1, 2), gate[0].flatten(1, 2) if gate else None, key.squeeze(2), value.squeeze(2)


class ModuleAttention:
    """An attention module that has no plain form, called on this tensor rank's share of the tokens."""

    def __init__(self, module: torch.nn.Module, topology: Topology):
        self.module, self.topology = module, topology

    def __call__(self, x: torch.Tensor, rotary: Rotary | None, plan: CachePlan) -> torch.Tensor:
        """Attend: [T, H] -> [T, H], whole on every tensor rank."""
        share = share_of(x, self.topology, tokens_of_share(x.size(0), self.topology))
        out, _ = self.module(share.unsqueeze(1), None, packed_seq_params=plan)
        return gathered(out.squeeze(1), self.topology)[: x.size(0)]
