"""Gated DeltaNet (arXiv 2412.06464; Qwen3-Next's linear attention) over packed and cached sequences.

Parameters, their cuts over tensor ranks and their place in checkpoints are those of Megatron's GatedDeltaNet. Its
forward takes neither packed sequences nor a cache and needs the package fla, so the forward is ours: packed sequences
become rows of equal length, so that neither convolution nor memory reaches from one into the next, and the rule is
delta_rule.py's, in fp32 or wider. Every tensor rank has whole heads: nothing crosses ranks between the projections.

Left out: context parallelism (check.py refuses it: the memory goes through all tokens of a sequence), biases, and fused
kernels.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from gspo_megatron.backend import cpu_shim
from gspo_megatron.backend.layers import delta_rule
from gspo_megatron.backend.layers.attention import CachePlan, PackedPlan
from gspo_megatron.backend.layers.norms import RMSNorm
from gspo_megatron.backend.layers.ragged import LengthGroup
from gspo_megatron.models.architecture import Architecture

cpu_shim.allow_gated_delta_net()


class PackedGatedDeltaNet(GatedDeltaNet):
    """`packed_seq_params` is a PackedPlan or a CachePlan. A cache has two tensors of a layer: the last inputs of the
    convolution [rows, K - 1, C] and the memory [rows, heads, k, v]."""

    def forward(self, hidden_states: torch.Tensor, attention_mask=None, *, packed_seq_params, **kwargs):
        """Compute the layer: hidden_states [T (/ TP), 1, H] -> the same, and no bias."""
        plan = packed_seq_params
        projected, _ = self.in_proj(hidden_states)
        rows = (self.conv_dim, self.v_dim, self.num_value_heads, self.num_value_heads)
        mixed, gate, rate, step = projected.squeeze(1).split([n // self.tp_size for n in rows], -1)
        wide = torch.promote_types(mixed.dtype, torch.float32)
        log_decay = -self.A_log.to(wide).exp() * F.softplus(step.to(wide) + self.dt_bias.to(wide))
        tokens = (mixed, log_decay, rate.to(wide).sigmoid())
        out = self._cached(plan, tokens) if isinstance(plan, CachePlan) else self._packed(plan, tokens)[0]
        gate = gate.unflatten(-1, (-1, self.value_head_dim))  # [T, heads, v]
        out = self.out_norm(out.to(mixed.dtype)).to(wide) * F.silu(gate.to(wide))
        return self.out_proj(out.to(mixed.dtype).flatten(1).unsqueeze(1))

    def _packed(
        self, plan: PackedPlan, tokens: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequences from their beginning: [T, heads, v], and what a cache holds behind the last token of each."""
        found = [
            self._of_group(group, parts)
            for group, *parts in zip(plan.ragged.groups, *(plan.ragged.parts(x) for x in tokens), strict=True)
        ]
        out, last, memory = zip(*found, strict=True)
        return plan.ragged.joined(out), plan.ragged.by_sequence(last), plan.ragged.by_sequence(memory)

    def _of_group(
        self, group: LengthGroup, tokens: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of the sequences of a group."""
        # Padding has rate and log-decay 0, so the memory is that of the last token.
        mixed, log_decay, rate = (group.grid(x) for x in tokens)
        taps = self.conv_kernel_dim
        mixed, joined = self._convolve(mixed, mixed.new_zeros(mixed.size(0), taps - 1, mixed.size(2)))
        memory = rate.new_zeros(rate.size(0), rate.size(2), self.key_head_dim, self.value_head_dim)
        query, key, value = self._heads(mixed, rate.dtype)
        out, memory = delta_rule.chunked(query, key, value, log_decay, rate, memory)
        last = group.lengths.unsqueeze(1) + torch.arange(taps - 1, device=mixed.device)  # of `joined`
        rows = torch.arange(joined.size(0), device=mixed.device).unsqueeze(1)
        return group.flat(out), joined[rows, last], memory

    def _cached(self, plan: CachePlan, tokens: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """[T, heads, v]; padding rows come back as zeros."""
        n, total, states = plan.num_tokens, tokens[0].size(0), plan.cache.layers
        mixed, log_decay, rate = (x[:n] for x in tokens)
        if plan.prompt is not None:
            assert plan.rows is not None  # comes with the prompts
            out, last, memory = self._packed(plan.prompt, (mixed, log_decay, rate))
            copies = plan.rows[plan.prompt.cu_seqlens_q[1:].long() - 1]  # [prompts, G] cache rows
            last, memory = (self._copied(x, copies, plan.cache.rows) for x in (last, memory))
            states[self.layer_number] = (last, memory)
        elif n == 0:  # every response here has finished, but other replicas still need this rank's experts
            out = rate.new_zeros(0, rate.size(1), self.value_head_dim)
        else:
            before, memory = states[self.layer_number]
            mixed, joined = self._convolve(mixed.unsqueeze(1), before)
            query, key, value = (x.squeeze(1) for x in self._heads(mixed, rate.dtype))
            out, memory = delta_rule.step(query, key, value, log_decay, rate, memory)
            states[self.layer_number] = (joined[:, 1:], memory)
        return F.pad(out, (0, 0, 0, 0, 0, total - n))

    @staticmethod
    def _copied(state: torch.Tensor, copies: torch.Tensor, rows: int) -> torch.Tensor:
        """A prompt's state for each of its responses: [prompts, ...] -> [rows, ...]."""
        found = state.new_empty(rows, *state.shape[1:])
        found[copies] = state.unsqueeze(1).expand(-1, copies.size(1), *state.shape[1:])
        return found

    def _convolve(self, mixed: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return delta_rule.causal_convolution(mixed, self.conv1d.weight.squeeze(1), before)

    def _heads(self, mixed: torch.Tensor, wide: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[n, L, C] -> query, key [n, L, heads, k], value [n, L, heads, v]; heads are those of the values."""
        keys, shared = self.qk_dim // self.tp_size, self.num_value_heads // self.num_key_heads
        query, key, value = mixed.to(wide).split((keys, keys, self.v_dim // self.tp_size), -1)
        query, key = (delta_rule.unit(x.unflatten(-1, (-1, self.key_head_dim))) for x in (query, key))
        query, key = (x.repeat_interleave(shared, dim=2) for x in (query * self.key_head_dim**-0.5, key))
        return query, key, value.unflatten(-1, (-1, self.value_head_dim))


def place(
    block: TransformerBlockSubmodules, config: TransformerConfig, arch: Architecture, use_te: bool, vp_stage: int | None
) -> None:
    """Put it into the linear layers among those of a block's spec."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    for number, layer in enumerate(block.layer_specs):
        if arch.is_linear(first + number):  # a new spec, because layers share theirs
            names = dict(layer.submodules.sharded_state_dict_keys_map)
            if not use_te:  # as builder.py's _te_names
                names["input_layernorm."] = "self_attention.in_proj.layer_norm_"
            parts = replace(layer.submodules, self_attention=spec(use_te), sharded_state_dict_keys_map=names)
            block.layer_specs[number] = replace(layer, submodules=parts)


def spec(use_te: bool) -> ModuleSpec:
    """Return what fills Megatron's self_attention slot. (Transformer Engine's: not run by us yet, it needs a GPU.)"""
    if use_te:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider as Provider

        in_proj = Provider().column_parallel_layer_norm_linear()
    else:
        from megatron.core.models.backends import LocalSpecProvider as Provider

        in_proj = Provider().column_parallel_linear()
    # Published weights of this norm are not centred at zero as the others are; Megatron's would take them for it.
    norm = ModuleSpec(RMSNorm, {"zero_centred": False})
    parts = GatedDeltaNetSubmodules(in_proj=in_proj, out_norm=norm, out_proj=Provider().row_parallel_linear())
    return ModuleSpec(module=PackedGatedDeltaNet, submodules=parts)
