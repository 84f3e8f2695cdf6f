"""Hugging Face config -> Megatron-Core GPTModel chunks of this rank.

Families: Qwen3-MoE (QK-norm, grouped queries, RoPE theta, top-k renormalisation, tied or untied embeddings). In bf16 on
CUDA with Transformer Engine its layer spec; everywhere else the local one with attention and RMSNorm of our own. The
Transformer Engine path has not been run by us yet (it needs a GPU).

Left out: loading weights from Hugging Face, families other than Qwen3-MoE, multi-token prediction.
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
from megatron.core.transformer.transformer_config import TransformerConfig

from gspo_megatron.backend import parameters
from gspo_megatron.backend.attention import CachePlan, SdpaCoreAttention
from gspo_megatron.backend.runtime import Runtime, has_transformer_engine
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import MAKE_VOCAB_SIZE_DIVISIBLE_BY, ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """What a Hugging Face config says about the model, by its own names, with the tokenizer's vocabulary."""

    hf: dict
    vocab_size: int  # padded

    @classmethod
    def load(cls, path: Path, tokenizer_size: int) -> "ModelShape":
        hf = json.loads(Path(path).read_text())
        padded = -(-tokenizer_size // MAKE_VOCAB_SIZE_DIVISIBLE_BY) * MAKE_VOCAB_SIZE_DIVISIBLE_BY
        return cls(hf | {"vocab_size": padded}, padded)

    @property
    def rope_theta(self) -> float:
        rope = self.hf.get("rope_parameters") or {}
        return float(rope.get("rope_theta", self.hf.get("rope_theta", 10000.0)))

    @property
    def head_dim(self) -> int:
        return self.hf.get("head_dim") or self.hf["hidden_size"] // self.hf["num_attention_heads"]

    def num_parameters(self) -> int:
        """Of the whole model, counted from the config."""
        hf = self.hf
        hidden, heads, groups = (hf[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
        dim = self.head_dim
        sparse = sum(moe_layers(hf))
        attention = hidden * dim * (2 * heads + 2 * groups) + 2 * dim
        moe = hf["num_experts"] * (3 * hidden * hf["moe_intermediate_size"] + hidden)
        dense = 3 * hidden * hf["intermediate_size"]
        layers = (
            hf["num_hidden_layers"] * (attention + 2 * hidden)
            + sparse * moe
            + (hf["num_hidden_layers"] - sparse) * dense
        )
        return layers + hidden + self.vocab_size * hidden * (1 if self.tied else 2)

    @property
    def tied(self) -> bool:
        return bool(self.hf.get("tie_word_embeddings", False))


def moe_layers(hf: dict) -> list[int]:
    """1 for each layer with experts, 0 for a dense one (decoder_sparse_step and mlp_only_layers of the config)."""
    step, dense = hf.get("decoder_sparse_step", 1), set(hf.get("mlp_only_layers") or [])
    return [int((i + 1) % step == 0 and i not in dense) for i in range(hf["num_hidden_layers"])]


class RMSNorm(torch.nn.Module):
    """RMSNorm for the local spec; its weight says that it is shared by sequence-parallel ranks.

    Megatron's local wrapper refuses sequence parallelism because torch's module cannot say so.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same."""
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


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


def transformer_config(shape: ModelShape, model: ModelConfig, topology: Topology, use_te: bool,
                       dtype: torch.dtype) -> TransformerConfig:  # fmt: skip
    """TransformerConfig of a Qwen3-MoE Hugging Face config, cut as the topology says."""
    hf = shape.hf
    on_cuda = torch.cuda.is_available()
    interleaved = topology.vp_size > 1
    return TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"],
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf.get("rms_norm_eps", 1e-6),
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        qk_layernorm=True,
        num_moe_experts=hf["num_experts"],
        moe_ffn_hidden_size=hf["moe_intermediate_size"],
        moe_layer_freq=moe_layers(hf),
        moe_router_topk=hf["num_experts_per_tok"],
        # Softmax over the chosen k equals softmax over all, then renormalised; without renormalisation it comes first.
        moe_router_pre_softmax=not hf.get("norm_topk_prob", False),
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


def layer_spec(config: TransformerConfig, use_te: bool, vp_stage: int | None):
    """Megatron's decoder block spec, with our attention and norm in the local one."""
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    core = _te_attention_with_cache() if use_te else SdpaCoreAttention
    for layer in block.layer_specs:
        layer.submodules.self_attention.submodules.core_attention = core
        if not use_te:
            layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
            attention = layer.submodules.self_attention.submodules
            attention.q_layernorm = attention.k_layernorm = RMSNorm
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
    shape: ModelShape, model: ModelConfig, topology: Topology, runtime: Runtime, seed: int,
    use_distributed_optimizer: bool, dtype: torch.dtype | None = None, model_class: type[PackedModel] = PolicyModel,
) -> list[DistributedDataParallel]:  # fmt: skip
    """The model chunks of this rank (one a virtual stage), initialised and wrapped for data parallelism.

    Args:
        seed: of the initial weights, which are the same in every layout.
        dtype: overrides model.params_dtype (tests build the model in fp64).
        model_class: what the last stage returns.
    """
    dtype = dtype or {"fp32": torch.float32, "bf16": torch.bfloat16}[model.params_dtype]
    # Transformer Engine's packed attention has no fp32 kernel.
    use_te = runtime.device.type == "cuda" and dtype is torch.bfloat16 and has_transformer_engine()
    config = transformer_config(shape, model, topology, use_te, dtype)
    chunks = []
    for chunk in range(topology.vp_size):
        vp_stage = chunk if topology.vp_size > 1 else None
        first = topology.is_first_stage and chunk == 0
        last = topology.is_last_stage and chunk == topology.vp_size - 1
        gpt = model_class(
            config=config, transformer_layer_spec=layer_spec(config, use_te, vp_stage), vocab_size=shape.vocab_size,
            max_sequence_length=shape.hf["max_position_embeddings"], pre_process=first, post_process=last,
            parallel_output=True, share_embeddings_and_output_weights=shape.tied, position_embedding_type="rope",
            rotary_base=shape.rope_theta, vp_stage=vp_stage,
        )  # fmt: skip
        gpt.rotary_by_token = not use_te
        # Megatron would cut its angles over context-parallel ranks by the length of this rank's tokens. Angles by token
        # need no cut, and Transformer Engine's packed path cuts where it applies them.
        gpt.rotary_pos_emb.cp_group = None
        gpt.to(runtime.device)
        parameters.initialize(gpt, topology, seed, shape.hf.get("initializer_range", 0.02))
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
