"""Hugging Face config -> Megatron-Core GPTModel chunks of this rank.

Families: those of hf/families. In bf16 on CUDA with Transformer Engine its layer spec; everywhere else the local one
with attention and RMSNorm of our own. The Transformer Engine path has not been run by us yet (it needs a GPU).

Left out: loading weights (hf/load.py), multi-head latent attention, multi-token prediction.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.backend import parameters
from gspo_megatron.backend.attention import CachePlan, SdpaCoreAttention
from gspo_megatron.backend.norms import AllHeadsRMSNorm, RMSNorm
from gspo_megatron.backend.runtime import Runtime, has_transformer_engine
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import MAKE_VOCAB_SIZE_DIVISIBLE_BY, ModelConfig, require
from gspo_megatron.hf.architecture import Architecture
from gspo_megatron.hf.families import architecture


@dataclass(frozen=True)
class ModelShape:
    """A Hugging Face config with the vocabulary that the model is built with."""

    hf: dict
    vocab_size: int

    @classmethod
    def load(cls, path: Path, tokenizer_size: int) -> "ModelShape":
        """A model to be trained from random weights: its vocabulary is the tokenizer's, padded."""
        hf = json.loads(Path(path).read_text())
        padded = -(-tokenizer_size // MAKE_VOCAB_SIZE_DIVISIBLE_BY) * MAKE_VOCAB_SIZE_DIVISIBLE_BY
        return cls(hf | {"vocab_size": padded}, padded)

    @classmethod
    def of_folder(cls, folder: Path) -> "ModelShape":
        """A model whose weights are in a Hugging Face folder: its vocabulary is the embedding's, without padding,
        because rows that the weights do not have would take a share of the softmax."""
        hf = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return cls(hf, hf["vocab_size"])

    @classmethod
    def of(cls, model: ModelConfig, tokenizer_size: int) -> "ModelShape":
        """The model of a recipe.

        Raises:
            ConfigError: the tokenizer of the folder to start from has ids that its embedding lacks.
        """
        if model.load_hf is None:
            return cls.load(model.hf_config, tokenizer_size)
        shape = cls.of_folder(model.load_hf)
        require(tokenizer_size <= shape.vocab_size, "model.load_hf", str(model.load_hf),
                f"its tokenizer has {tokenizer_size} entries, its embedding {shape.vocab_size}",
                "Give the model's own tokenizer.")  # fmt: skip
        return shape

    @property
    def architecture(self) -> Architecture:
        return architecture(self.hf | {"vocab_size": self.vocab_size})

    def num_parameters(self) -> int:
        """Of the whole model, counted from the config."""
        return self.architecture.num_parameters


class PackedModel(GPTModel):
    """GPTModel whose RoPE follows position_ids token by token: packed and cached sequences start anywhere, and
    context-parallel ranks have chunks."""

    _angles: torch.Tensor | None = None
    rotary_by_token = True  # off where Transformer Engine's packed attention wants Megatron's own angles

    def _preprocess(self, input_ids, position_ids, *args, **kwargs):
        out = super()._preprocess(input_ids, position_ids, *args, **kwargs)
        plan = kwargs.get("packed_seq_params")
        if self.rotary_by_token or isinstance(plan, CachePlan):
            if self._angles is None:
                self._angles = self.rotary_pos_emb.get_emb(self.max_sequence_length)  # [max_len, 1, 1, d]
            out = (out[0], self._angles[position_ids.view(-1)], *out[2:])
        return out


class PolicyModel(PackedModel):
    """Its last stage returns fp32 logits of this rank's vocabulary shard. (The critic's: value_head.py.)"""

    returns_hidden = False  # the last stage leaves the head to ops/linear_logprobs.py, see Policy

    def head_weight(self) -> torch.Tensor:
        """[V / TP, H], this rank's rows of the LM head (of the embedding, where they are tied)."""
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
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return F.linear(hidden_states.squeeze(1).to(dtype), self.head_weight().to(dtype))  # [T, V / TP]


def transformer_config(arch: Architecture, model: ModelConfig, topology: Topology, use_te: bool,
                       dtype: torch.dtype) -> TransformerConfig:  # fmt: skip
    """TransformerConfig of an architecture, cut as the topology says."""
    on_cuda = torch.cuda.is_available()
    interleaved = topology.vp_size > 1
    return TransformerConfig(
        **_moe_config(arch),
        num_layers=arch.num_hidden_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        # Norms of all heads together are not Megatron's (layer_spec); told of them, it would add their gradients up.
        qk_layernorm=arch.qk_norm == "head",
        moe_router_dtype="fp64" if dtype is torch.float64 else model.moe_router_dtype,
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=use_te,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Our own initialisation (parameters.py) is the same in every layout; Megatron's is not.
        perform_initialization=False,
        use_cpu_initialization=not on_cuda,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=topology.tp_size,
        sequence_parallel=topology.tp_size > 1,
        context_parallel_size=topology.cp_size,
        cp_comm_type="p2p" if topology.cp_size > 1 else None,  # Transformer Engine's ring; our own attention ignores it
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=topology.vp_size if interleaved else None,
        expert_model_parallel_size=topology.ep_size,
        expert_tensor_parallel_size=topology.etp_size,
        variable_seq_lengths=True,
        # Two stages with virtual ones and batched sends give silently wrong gradients: previous and next rank are the
        # same, and sends are matched to the wrong receives.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        recompute_granularity="full" if model.recompute else None,
        recompute_method="uniform" if model.recompute else None,
        recompute_num_layers=1 if model.recompute else None,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=use_te,
        bias_activation_fusion=use_te,
        bias_dropout_fusion=use_te,
        apply_rope_fusion=False,
    )


def _moe_config(arch: Architecture) -> dict:
    """The part of TransformerConfig that a dense model does not have."""
    if not arch.num_experts:
        return {"moe_layer_freq": list(arch.moe_layers)}
    grouped = arch.router_groups > 1
    return {
        "num_moe_experts": arch.num_experts,
        "moe_ffn_hidden_size": arch.moe_intermediate_size,
        "moe_layer_freq": list(arch.moe_layers),
        "moe_router_topk": arch.num_experts_per_tok,
        "moe_router_score_function": arch.router_score,
        # Softmax over the chosen k equals softmax over all, then renormalised; without renormalisation it comes first.
        "moe_router_pre_softmax": arch.router_score == "softmax" and not arch.renormalise,
        "moe_router_enable_expert_bias": arch.router_bias,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_topk_scaling_factor": arch.router_scaling if arch.router_scaling != 1 else None,
        "moe_router_num_groups": arch.router_groups if grouped else None,
        "moe_router_group_topk": arch.router_top_groups if grouped else None,
        "moe_shared_expert_intermediate_size": arch.shared_intermediate_size or None,
        "moe_shared_expert_gate": arch.shared_gate,
    }


def layer_spec(config: TransformerConfig, arch: Architecture, use_te: bool, vp_stage: int | None):
    """Megatron's decoder block spec, with our attention and norm in the local one."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    core = _te_attention_with_cache() if use_te else SdpaCoreAttention
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = core
        if not use_te:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            if arch.qk_norm == "head":
                attention.q_layernorm = attention.k_layernorm = RMSNorm
        if arch.qk_norm == "all_heads":
            attention.q_layernorm = ModuleSpec(AllHeadsRMSNorm, {"heads": arch.num_attention_heads})
            attention.k_layernorm = ModuleSpec(AllHeadsRMSNorm, {"heads": arch.num_key_value_heads})
    if not use_te:
        block.layer_norm = RMSNorm
    return block


def _te_attention_with_cache():
    """Transformer Engine's attention in training, our cache in generation. Not run by us yet: it needs a GPU."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class CachedTEDotProductAttention(TEDotProductAttention):
        def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None,
                    packed_seq_params=None):  # fmt: skip
            if not isinstance(packed_seq_params, CachePlan):
                return super().forward(query, key, value, attention_mask, attn_mask_type,
                                       attention_bias=attention_bias, packed_seq_params=packed_seq_params)  # fmt: skip
            scale = self.config.kv_channels**-0.5
            out = packed_seq_params.attend(self.layer_number, query.squeeze(1), key.squeeze(1), value.squeeze(1), scale)
            return out.reshape(out.size(0), 1, -1)

    return CachedTEDotProductAttention


def build(
    shape: ModelShape, model: ModelConfig, topology: Topology, runtime: Runtime, seed: int | None,
    use_distributed_optimizer: bool, dtype: torch.dtype | None = None, model_class: type[PackedModel] = PolicyModel,
) -> list[DistributedDataParallel]:  # fmt: skip
    """The model chunks of this rank (one a virtual stage), initialised and wrapped for data parallelism.

    Args:
        seed: of the initial weights, which are the same in every layout; None: they are left unset, to be loaded.
        dtype: overrides model.params_dtype (tests build the model in fp64).
        model_class: what the last stage returns.
    """
    dtype = dtype or {"fp32": torch.float32, "bf16": torch.bfloat16}[model.params_dtype]
    # Transformer Engine's packed attention has no fp32 kernel.
    use_te = runtime.device.type == "cuda" and dtype is torch.bfloat16 and has_transformer_engine()
    arch = shape.architecture
    config = transformer_config(arch, model, topology, use_te, dtype)
    chunks = []
    for chunk in range(topology.vp_size):
        vp_stage = chunk if topology.vp_size > 1 else None
        first = topology.is_first_stage and chunk == 0
        last = topology.is_last_stage and chunk == topology.vp_size - 1
        spec = layer_spec(config, arch, use_te, vp_stage)
        gpt = model_class(
            config=config, transformer_layer_spec=spec, vocab_size=arch.vocab_size,
            max_sequence_length=arch.max_position_embeddings, pre_process=first, post_process=last,
            parallel_output=True, share_embeddings_and_output_weights=arch.tied, position_embedding_type="rope",
            rotary_base=arch.rope_theta, rotary_percent=arch.rotary_share, vp_stage=vp_stage,
        )  # fmt: skip
        gpt.rotary_by_token = not use_te
        # Megatron would cut its angles over context-parallel ranks by the length of this rank's tokens. Angles by token
        # need no cut, and Transformer Engine's packed path cuts where it applies them.
        gpt.rotary_pos_emb.cp_group = None
        gpt.to(runtime.device)
        parameters.mark(gpt, topology)
        if seed is not None:
            parameters.initialize(gpt, topology, seed, arch.initializer_range)
        wrapped = Float16Module(config, gpt) if config.bf16 else gpt
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=dtype is not torch.float64,
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


def unwrap(chunk: torch.nn.Module) -> PackedModel:
    """The model inside DDP and Float16Module."""
    while not isinstance(chunk, PackedModel):
        chunk = chunk.module
    return chunk
