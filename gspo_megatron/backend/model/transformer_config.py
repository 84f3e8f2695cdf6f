"""Megatron's TransformerConfig of an architecture in a layout.

Left out: multi-token prediction, and whatever moves routing outside of the gradient.
"""

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.config import ModelConfig
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.rope_scaling import Yarn


def transformer_config(
    arch: Architecture, model: ModelConfig, topology: Topology, use_te: bool, dtype: torch.dtype
) -> TransformerConfig:
    """Make the TransformerConfig of an architecture, cut as the topology says."""
    interleaved = topology.vp_size > 1
    kind = TransformerConfig if arch.latent is None else MLATransformerConfig
    return kind(
        **_moe_config(arch),
        **_latent_config(arch),
        **_linear_config(arch),
        **_softmax_config(arch),
        **_activation_config(arch),
        num_layers=arch.num_hidden_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=arch.zero_centred_norms,
        attention_output_gate=arch.output_gate,
        layernorm_epsilon=arch.rms_norm_eps,
        gated_linear_unit=True,
        add_bias_linear=arch.linear_bias,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.has_qk_norm or arch.latent is not None,
        moe_router_dtype="fp64" if dtype is torch.float64 else model.moe_router_dtype,
        moe_router_load_balancing_type="aux_loss" if model.moe_aux_loss_coeff else "none",
        moe_aux_loss_coeff=model.moe_aux_loss_coeff,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=use_te,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Our own initialisation (parameters.py) is the same in every layout; Megatron's is not.
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=topology.tp_size,
        sequence_parallel=topology.tp_size > 1,
        context_parallel_size=topology.cp_size,
        cp_comm_type="p2p" if topology.cp_size > 1 else None,  # Transformer Engine's ring; our own attention ignores it
        pipeline_model_parallel_size=topology.pp_size,
        virtual_pipeline_model_parallel_size=topology.vp_size if interleaved else None,
        num_layers_in_first_pipeline_stage=topology.first_stage_layers,
        num_layers_in_last_pipeline_stage=topology.last_stage_layers,
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
        bias_dropout_fusion=use_te and not arch.linear_bias,  # Megatron refuses the two together
        apply_rope_fusion=False,
    )


def _latent_config(arch: Architecture) -> dict:
    """The part of MLATransformerConfig. The angles are ours (latent_attention.py); of YaRN, Megatron computes the scale
    of the softmax from these."""
    latent = arch.latent
    if latent is None:
        return {}
    yarn = arch.rope_scaling if isinstance(arch.rope_scaling, Yarn) else None  # these families have no other
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "rope",
        "rotary_base": arch.rope_theta,
        "rotary_scaling_factor": yarn.factor if yarn else 1.0,
        "mscale_all_dim": yarn.mscale_all_dim if yarn else 0.0,
    }


def _softmax_config(arch: Architecture) -> dict:
    """Windows, sinks and scale of plain attention."""
    found = {}
    if arch.latent is None and isinstance(arch.rope_scaling, Yarn):
        found["softmax_scale"] = arch.head_dim**-0.5 * arch.rope_scaling.attention_factor**2  # of query and of key
    if arch.sliding_window:
        found["window_size"] = (arch.sliding_window - 1, 0)  # Megatron counts the tokens before the query
        found["window_attn_skip_freq"] = list(arch.windowed_layers)
    if arch.sinks:
        found["softmax_type"] = "learnable"
    return found


def _linear_config(arch: Architecture) -> dict:
    """The part of TransformerConfig that a hybrid with linear attention has."""
    linear = arch.linear
    if linear is None:
        return {}
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": list(arch.linear_layers),
        "linear_conv_kernel_dim": linear.kernel,
        "linear_key_head_dim": linear.key_head_dim,
        "linear_value_head_dim": linear.value_head_dim,
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
    }


def _activation_config(arch: Architecture) -> dict:
    if not arch.clamped_glu:
        return {"activation_func": F.silu}
    return {"activation_func": quick_gelu, "glu_linear_offset": 1.0, "activation_func_clamp_value": arch.clamped_glu}


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
