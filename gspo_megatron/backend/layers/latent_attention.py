"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) over packed and cached sequences.

Megatron's MLASelfAttention makes its rotary angles by place in the buffer; packed and cached sequences start anywhere,
so here they come one a token with the plan (builder.py). The local spec cuts the down projections over tensor ranks;
their output is gathered, and cut by tokens again where sequence parallelism is on, so that the gradient of the rotary
key, which all heads share, is added up over tensor ranks. (Megatron's own path for this spec leaves each rank with its
own heads' part of it.)

Left out: a cache of the latents (generation caches keys and values of all heads), and Transformer Engine's layers,
which keep Megatron's way and have not been run by us.
"""

from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.backend.layers.norms import RMSNorm
from gspo_megatron.backend.layers.rotary import inverse_frequencies
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.rope_scaling import Yarn

LATENT_EPS = 1e-6  # of the norms on the latents, whatever rms_norm_eps says


@dataclass(frozen=True)
class Angles:
    """Rotary angles of T tokens."""

    cos: torch.Tensor  # [T, d / 2] fp32
    sin: torch.Tensor

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate pairs of neighbours: [T, 1, heads, d] -> the same, first members before second ones.

        Queries and keys are both permuted so, which their products do not see.
        """
        first, second = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (part[:, None, None].to(first.dtype) for part in (self.cos, self.sin))
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class AngleTable:
    """Angles by position, for the rotated part of a latent-attention head."""

    def __init__(self, architecture: Architecture, device: torch.device):
        frequencies, scaling = inverse_frequencies(architecture), architecture.rope_scaling
        factor = scaling.attention_factor if isinstance(scaling, Yarn) else 1.0  # these families have no other
        positions = torch.arange(architecture.max_position_embeddings, device=device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies.to(device))  # [max_len, d / 2]
        self._cos, self._sin = angles.cos() * factor, angles.sin() * factor

    def at(self, positions: torch.Tensor) -> Angles:
        """Look up the angles of positions [T] int64."""
        return Angles(self._cos[positions], self._sin[positions])


class LatentNorm(RMSNorm):
    """RMSNorm of a latent."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **kwargs):
        super().__init__(config, hidden_size, LATENT_EPS)


class PackedLatentAttention(MLASelfAttention):
    """MLASelfAttention with angles by token. `packed_seq_params` is a PackedPlan or CachePlan with `angles`."""

    def get_query_key_value_tensors(
        self,
        hidden_states,
        key_value_states=None,
        position_ids=None,
        packed_seq_params=None,
        inference_context=None,
        *,
        inference_params=None,
    ):
        """Project [T (/ TP), 1, H] -> query, key [T, 1, n, nope + rope], value [T, 1, n, v], and the latents."""
        config, angles = self.config, packed_seq_params.angles
        nope, rope = config.qk_head_dim, config.qk_pos_emb_head_dim
        if config.q_lora_rank is None:
            query_latent = hidden_states
            query, _ = self.linear_q_proj(hidden_states)
        else:
            query_latent = self.q_layernorm(self._whole(self.linear_q_down_proj(hidden_states)[0]))
            query, _ = self.linear_q_up_proj(query_latent)
        latent, shared = self._whole(self.linear_kv_down_proj(hidden_states)[0]).split((config.kv_lora_rank, rope), -1)
        if config.sequence_parallel:
            shared = gather_from_sequence_parallel_region(shared)  # backward adds up what all ranks' heads give
        latent = self.kv_layernorm(latent)
        up, _ = self.linear_kv_up_proj(latent)

        heads = self.num_attention_heads_per_partition
        query = query.unflatten(-1, (heads, nope + rope))  # [T, 1, n, nope + rope]
        key, value = up.unflatten(-1, (heads, nope + config.v_head_dim)).split((nope, config.v_head_dim), -1)
        turned = angles.rotate(shared.unsqueeze(2)).expand(-1, -1, heads, -1)
        query = torch.cat([query[..., :nope], angles.rotate(query[..., nope:])], -1)
        return query, torch.cat([key, turned], -1), value, query_latent, latent

    def _whole(self, x: torch.Tensor) -> torch.Tensor:
        """A down projection's [T, 1, rank / TP] -> [T (/ TP), 1, rank]."""
        if self.config.tensor_model_parallel_size == 1:
            return x
        x = gather_from_tensor_model_parallel_region(x)
        return scatter_to_sequence_parallel_region(x) if self.config.sequence_parallel else x
