"""Core attention over packed sequences, in training and in cached generation, on torch's SDPA.

Megatron hands core attention the query, key and value (already rotated) and whatever object came in as
`packed_seq_params`. Ours are `PackedPlan` (training: block-diagonal causal) and `CachePlan` (generation: write keys
and values into a cache, attend to it); each says itself what to do, so no module keeps state between calls. Training
under context parallelism adds a `ContextSplit` (context_parallel.py) to its plan; generation never does.

On CUDA with Transformer Engine, training uses its kernels and only generation comes here (model/builder.py).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from gspo_megatron.backend.layers.context_parallel import ContextSplit
from gspo_megatron.backend.layers.ragged import Ragged
from gspo_megatron.backend.layers.softmax import Softmax
from gspo_megatron.routing.rollout_routes import RolloutRecorder
from gspo_megatron.routing.routes import RouteTrace

if TYPE_CHECKING:
    from gspo_megatron.backend.layers.latent_attention import Angles


@dataclass(kw_only=True)
class PackedPlan(PackedSeqParams):
    """Block-diagonal causal attention over S sequences packed into T tokens."""

    max_len: int
    ragged: Ragged  # the sequences by length
    split: ContextSplit | None = None  # None: this rank feeds all tokens
    trace: RouteTrace | None = None  # what the routers on the way note and obey (router_hooks.py)
    angles: "Angles | None" = None  # by token, for latent attention (latent_attention.py)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: torch.Tensor, qkv_format: str = "sbhd", cp_group: dist.ProcessGroup | None = None
    ) -> "PackedPlan":
        """Make the plan for cu_seqlens [S+1] int32.

        Args:
            cu_seqlens: bounds of the sequences with their padding; multiples of 2 CP under context parallelism.
            qkv_format: `sbhd`: rotary angles come one a token (model/builder.py); `thd`: Megatron's own.
            cp_group: ranks that share the tokens; None: no context parallelism.
        """
        ragged = Ragged.of(torch.diff(cu_seqlens).long())
        max_len = max(group.length for group in ragged.groups)
        # Transformer Engine takes the bounds with padding as those of the padded layout too: padding is attended to
        # by itself alone, being last, so it need not be told apart. (Its packed context parallelism: not run by us.)
        padded = cu_seqlens if cp_group is not None else None
        return cls(
            qkv_format=qkv_format,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            cu_seqlens_q_padded=padded,
            cu_seqlens_kv_padded=padded,
            max_seqlen_q=max_len,
            max_seqlen_kv=max_len,
            max_len=max_len,
            ragged=ragged,
            split=ContextSplit.zig_zag(cu_seqlens, ragged, cp_group) if cp_group is not None else None,
        )

    @property
    def rows(self) -> torch.Tensor | None:
        """Return places [T/CP] int64 of the tokens that this rank feeds through the model; None: all of them."""
        return None if self.split is None else self.split.rows

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax
    ) -> torch.Tensor:
        """Attend: query [T, n, d], key and value [T, g, d] -> [T, n, d]; T/CP tokens each under context parallelism."""
        if self.split is not None:
            return self.split.attend(query, self.split.gather(key), self.split.gather(value), softmax)
        # Padding lies behind each sequence, so the causal mask alone hides it from every real query.
        return self.ragged.by_group(lambda *grids: _causal(softmax, *grids), query, key, value)

    @property
    def lengths(self) -> torch.Tensor:
        """Return the tokens of each sequence, [S] int64."""
        return torch.diff(self.cu_seqlens_q).long()


def _causal(softmax: Softmax, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[s, L, n, d], [s, L, g, d], [s, L, g, v] -> [s, L, n, v]."""
    return softmax.causal(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(1, 2)


@dataclass
class KeyValueCache:
    """Keys and values of one wave of responses: per layer two tensors [rows, max_len, g, d], with a d of their own.
    Layers of linear attention have two of their own form [rows, ...] (gated_delta_net.py)."""

    rows: int
    max_len: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def of_layer(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.layers:
            keys, values = (x.new_zeros(self.rows, self.max_len, *x.shape[1:]) for x in (key, value))
            self.layers[layer] = (keys, values)
        return self.layers[layer]

    def keep(self, rows: torch.Tensor) -> None:
        """Drop every row but `rows` ([n] int64), so that finished sequences cost neither time nor memory."""
        self.rows = rows.numel()
        self.layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self.layers.items()}


@dataclass(kw_only=True)
class CachePlan(PackedSeqParams):
    """Generation: the first `num_tokens` tokens of the batch are real, the rest is padding for sequence parallelism."""

    cache: KeyValueCache
    num_tokens: int
    positions: torch.Tensor  # [num_tokens] int64
    rows: torch.Tensor | None = None  # prefill: [num_tokens, G] cache rows of this prompt token, some twice
    prompt: PackedPlan | None = None  # prefill: attention within the prompts; None: one new token a row
    trace: RolloutRecorder | None = None  # where the routes are wanted (router_hooks.py)
    angles: "Angles | None" = None
    share: int = 0  # tokens of a tensor rank's share where experts are gathered for (plain_experts.py)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax
    ) -> torch.Tensor:
        """Attend: query [T, n, d], key [T, g, d], value [T, g, v] -> [T, n, v]; padding rows come back as zeros."""
        n = self.num_tokens
        cached_key, cached_value = self.cache.of_layer(layer, key, value)
        if self.prompt is not None:
            assert self.rows is not None  # comes with the prompts
            positions = self.positions.unsqueeze(1)  # [n, 1], against rows [n, G]
            cached_key[self.rows, positions] = key[:n].unsqueeze(1)
            cached_value[self.rows, positions] = value[:n].unsqueeze(1)
            out = self.prompt.attend(layer, query[:n], key[:n], value[:n], softmax)
        elif n == 0:  # every response here has finished, but other replicas still need this rank's experts
            out = value.new_zeros(0, query.size(1), value.size(2))
        else:
            rows = torch.arange(n, device=key.device)
            cached_key[rows, self.positions] = key[:n]
            cached_value[rows, self.positions] = value[:n]
            out = self._decode(query[:n], cached_key, cached_value, softmax)
        return F.pad(out, (0, 0, 0, 0, 0, query.size(0) - n))

    def _decode(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, softmax: Softmax) -> torch.Tensor:
        """query [n, heads, d] against the cache [n, max_len, g, d]."""
        longest = int(self.positions.max()) + 1
        keys, values = (cached[:, :longest].transpose(1, 2) for cached in (key, value))
        return softmax.one(self.positions, query, keys, values)


def softmax_of(
    config: TransformerConfig, layer: int, sinks: torch.Tensor | None, scale: float | None = None
) -> Softmax:
    """Make a layer's Softmax (Megatron's number, from 1) from Megatron's fields."""
    if scale is None:
        scale = config.softmax_scale if config.softmax_scale is not None else config.kv_channels**-0.5
    is_windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer)
    return Softmax(scale, config.window_size[0] + 1 if is_windowed else None, sinks)


class SdpaCoreAttention(MegatronModule):
    """Megatron's core_attention slot: the layer's softmax; the plan decides what is attended to."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        **kwargs,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        self.softmax_scale = softmax_scale  # latent attention gives its own
        offset = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // self.tp_group.size()
            offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))
        self.register_parameter("softmax_offset", offset)  # Megatron's name of the sinks: [n / TP]

    def forward(
        self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        """Attend: query [T, 1, n, d], key and value [T, 1, g, d] -> [T, 1, n * d]."""
        form = softmax_of(self.config, self.layer_number, self.softmax_offset, self.softmax_scale)
        out = packed_seq_params.attend(self.layer_number, query.squeeze(1), key.squeeze(1), value.squeeze(1), form)
        return out.reshape(out.size(0), 1, -1)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's default would take the sinks for whole on every tensor rank."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)
