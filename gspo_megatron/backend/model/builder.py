"""Hugging Face config -> Megatron-Core GPTModel chunks of this rank.

Families: those of models/families. In bf16 on CUDA with Transformer Engine its layer spec; everywhere else the local
one with attention and RMSNorm of our own. The Transformer Engine path has not been run by us yet (it needs a GPU).

Left out: loading weights (hf/load.py), multi-token prediction.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from gspo_megatron.backend.layers.attention import CachePlan, SdpaCoreAttention, softmax_of
from gspo_megatron.backend.layers.expert_groups import rank_groups
from gspo_megatron.backend.layers.experts import pack_experts
from gspo_megatron.backend.layers.latent_attention import AngleTable, LatentNorm, PackedLatentAttention
from gspo_megatron.backend.layers.norms import AllHeadsRMSNorm, RMSNorm
from gspo_megatron.backend.layers.rotary import inverse_frequencies
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.model.transformer_config import transformer_config
from gspo_megatron.backend.parallel.runtime import Runtime, has_transformer_engine
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.config import ModelConfig
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.recipe.layout import check_latent


class PackedModel(GPTModel):
    """GPTModel whose RoPE follows position_ids token by token: packed and cached sequences start anywhere, and
    context-parallel ranks have chunks."""

    _angles: torch.Tensor | None = None
    angle_table: AngleTable | None = None  # of latent attention, which wants its angles with the plan
    uses_transformer_engine = False  # its packed attention wants Megatron's own angles

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        out = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        if self.angle_table is not None:
            kwargs["packed_seq_params"].angles = self.angle_table.at(position_ids.view(-1))
        elif not self.uses_transformer_engine or isinstance(kwargs.get("packed_seq_params"), CachePlan):
            out = (out[0], self.angles_at(position_ids.view(-1))[:, None, None], *out[2:])
        return out

    def angles_at(self, positions: torch.Tensor) -> torch.Tensor:
        """Return rotary angles [T, d] fp32 of positions [T] int64, those of a head's two halves the same."""
        if self._angles is None:
            self._angles = self.rotary_pos_emb.get_emb(self.max_sequence_length).flatten(1)  # [max_len, d]
        return self._angles[positions]


class PolicyModel(PackedModel):
    """Its last stage returns fp32 logits of this rank's vocabulary shard. (The critic's: value_head.py.)"""

    returns_hidden = False  # the last stage leaves the head to ops/linear_logprobs.py, see Policy

    def head_weight(self) -> torch.Tensor:
        """Return [V / TP, H], this rank's rows of the LM head (of the embedding, where they are tied)."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _postprocess(self, hidden_states, *args, **kwargs):
        """Logits are not rounded to the model's type: bf16 logits alone add 9e-4 rms to the sequence log-ratio,
        more than the clip range."""
        if not self.post_process:
            return hidden_states
        if self.config.sequence_parallel:
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(hidden_states)
        else:
            hidden_states = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_states)
        if self.returns_hidden:
            return hidden_states.squeeze(1)  # [T, H]
        return self.logits_of(hidden_states.squeeze(1))

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [T, V / TP] fp32 (or wider) of normalised hidden states [T, H]."""
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        return F.linear(hidden.to(dtype), self.head_weight().to(dtype))


def layer_spec(
    config: TransformerConfig, arch: Architecture, use_te: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """Return Megatron's decoder block spec, with our attention and norm in the local one."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    core = _te_attention_with_cache() if use_te else SdpaCoreAttention
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    for number, layer in enumerate(block.layer_specs, first):
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = core
        if arch.latent is not None and not use_te:
            layer.submodules.self_attention.module = PackedLatentAttention
            attention.q_layernorm = attention.kv_layernorm = LatentNorm
        if not use_te:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            layer.submodules.sharded_state_dict_keys_map = _te_names(arch, bool(arch.moe_layers[number]))
            if arch.qk_norm == "head":
                attention.q_layernorm = attention.k_layernorm = RMSNorm
        if arch.qk_norm == "all_heads":
            attention.q_layernorm = ModuleSpec(AllHeadsRMSNorm, {"heads": arch.num_attention_heads})
            attention.k_layernorm = ModuleSpec(AllHeadsRMSNorm, {"heads": arch.num_key_value_heads})
    if not use_te:
        block.layer_norm = RMSNorm
    if arch.linear is not None:
        from gspo_megatron.backend.layers import (
            gated_delta_net,  # for a hybrid alone: Megatron calls its own experimental
        )

        gated_delta_net.place(block, config, arch, use_te, vp_stage)
    return block


def _te_names(arch: Architecture, is_moe: bool) -> dict[str, str]:
    """Where a checkpoint has a local layer's norms: where Transformer Engine's layers have them, in the linear layer
    behind or apart. Megatron's own table does not know layers with experts, and latent attention has none."""
    found = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if arch.latent is not None:
        found = {
            f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_" for x in ("q", "kv")
        }
    return found if is_moe else found | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def _te_attention_with_cache() -> type:
    """Transformer Engine's attention in training, our cache in generation. Not run by us yet: it needs a GPU."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class CachedTEDotProductAttention(TEDotProductAttention):
        def forward(
            self,
            query,
            key,
            value,
            attention_mask=None,
            attn_mask_type=None,
            attention_bias=None,
            packed_seq_params=None,
        ):
            if not isinstance(packed_seq_params, CachePlan):
                return super().forward(
                    query,
                    key,
                    value,
                    attention_mask,
                    attn_mask_type,
                    attention_bias=attention_bias,
                    packed_seq_params=packed_seq_params,
                )
            form = softmax_of(self.config, self.layer_number, getattr(self, "softmax_offset", None))
            out = packed_seq_params.attend(self.layer_number, query.squeeze(1), key.squeeze(1), value.squeeze(1), form)
            return out.reshape(out.size(0), 1, -1)

    return CachedTEDotProductAttention


def build(
    shape: ModelShape,
    model: ModelConfig,
    topology: Topology,
    runtime: Runtime,
    seed: int | None,
    use_distributed_optimizer: bool,
    dtype: torch.dtype | None = None,
    model_class: type[PackedModel] = PolicyModel,
) -> list[DistributedDataParallel]:
    """Build the model chunks of this rank (one a virtual stage), initialised and wrapped for data parallelism.

    Args:
        seed: of the initial weights, which are the same in every layout; None: they are left unset, to be loaded.
        dtype: overrides model.params_dtype (tests build the model in fp64).
        model_class: what the last stage returns.
    """
    chunks = []
    for gpt in bare(shape, model, topology, runtime, dtype, model_class):
        config = gpt.config
        if seed is not None:
            parameters.initialize(gpt, topology, seed, shape.architecture.initializer_range)
        wrapped = Float16Module(config, gpt) if config.bf16 else gpt
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=config.params_dtype is not torch.float64,
            overlap_grad_reduce=False,
            use_distributed_optimizer=use_distributed_optimizer,
        )
        chunks.append(DistributedDataParallel(config, ddp_config, wrapped))
    if topology.replicas > 1:
        for chunk in chunks:
            chunk.broadcast_params()
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    return chunks


def bare(
    shape: ModelShape,
    model: ModelConfig,
    topology: Topology,
    runtime: Runtime,
    dtype: torch.dtype | None = None,
    model_class: type[PackedModel] = PolicyModel,
) -> list[PackedModel]:
    """Build the chunks of this rank without wrappers; matrices are allocated and not filled. Arguments as in build."""
    dtype = dtype or {"fp32": torch.float32, "bf16": torch.bfloat16}[model.params_dtype]
    # Transformer Engine's packed attention has no fp32 kernel.
    use_te = runtime.device.type == "cuda" and dtype is torch.bfloat16 and has_transformer_engine()
    arch = shape.architecture
    check_latent(arch, use_te)
    config = transformer_config(arch, model, topology, use_te, dtype)
    chunks = []
    for chunk in range(topology.vp_size):
        vp_stage = chunk if topology.vp_size > 1 else None
        first = topology.is_first_stage and chunk == 0
        last = topology.is_last_stage and chunk == topology.vp_size - 1
        gpt = model_class(
            config=config,
            transformer_layer_spec=layer_spec(config, arch, use_te, vp_stage),
            vocab_size=arch.vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            rotary_percent=arch.rotary_share,
            vp_stage=vp_stage,
        )
        gpt.uses_transformer_engine = use_te
        # Megatron would cut its angles over context-parallel ranks by the length of this rank's tokens. Angles by token
        # need no cut, and Transformer Engine's packed path cuts where it applies them.
        if arch.latent is None:
            gpt.rotary_pos_emb.cp_group = None
            gpt.rotary_pos_emb.inv_freq = inverse_frequencies(arch).to(runtime.device)
        elif not use_te:
            gpt.angle_table = AngleTable(arch, runtime.device)
        pack_experts(gpt)
        rank_groups(gpt, arch)
        gpt.to(runtime.device)
        parameters.mark(gpt, topology)
        chunks.append(gpt)
    if arch.qk_norm == "all_heads":
        # Each tensor rank has another part of such a norm; with this on, Megatron would add up their gradients.
        config.qk_layernorm = False
    return chunks


def unwrap(chunk: torch.nn.Module) -> PackedModel:
    """Return the model inside DDP and Float16Module."""
    inner: Any = chunk  # Megatron's wrappers say nothing of their types
    while not isinstance(inner, PackedModel):
        inner = inner.module
    return inner
