"""What a Hugging Face config.json says about a model, in one vocabulary for all families. Imports no torch.

Sizes have the names of Qwen3-MoE's config, which are those of most families. Each family's own file (families/) reads
its config into an `Architecture` through a `ConfigReader` (config_reader.py), and refuses what Megatron's model here
would silently compute as something else.

Left out, and refused: rotary scaling but for linear, llama3 and yarn; sliding windows and biases but GPT-OSS's (and
biases of query, key and value); activations other than SiLU and GPT-OSS's.
"""

from dataclasses import dataclass
from typing import Literal

from gspo_megatron.models.rope_scaling import Linear, Llama3, Yarn


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of multi-head latent attention (MLA)."""

    q_lora_rank: int | None  # None: queries have no latent
    kv_lora_rank: int
    qk_nope_head_dim: int  # of each head, not rotated
    qk_rope_head_dim: int  # rotated; all heads share this part of the key
    v_head_dim: int


@dataclass(frozen=True)
class LinearAttention:
    """Sizes of a Gated DeltaNet (arXiv 2412.06464). Each key head serves as many value heads."""

    num_key_heads: int  # and of queries
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    kernel: int  # tokens that the causal convolution of query, key and value sees

    @property
    def convolved(self) -> int:
        """Rows of query, key and value of all heads."""
        return 2 * self.num_key_heads * self.key_head_dim + self.num_value_heads * self.value_head_dim

    def num_parameters(self, hidden: int) -> int:
        values = self.num_value_heads * self.value_head_dim
        projections = hidden * (self.convolved + values + 2 * self.num_value_heads) + values * hidden
        return projections + self.convolved * self.kernel + 2 * self.num_value_heads + self.value_head_dim


@dataclass(frozen=True)
class Architecture:
    """One decoder: grouped-query or latent attention, gated feed-forward layers, experts in some of them."""

    family: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int  # of dense layers
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    initializer_range: float
    rotary_share: float = 1.0  # of each head's dimensions, the first of which are rotated
    qk_norm: Literal["none", "head", "all_heads"] = "none"  # RMSNorm of each head, or of all heads together
    qkv_bias: bool = False
    moe_layers: tuple[int, ...] = ()  # one a layer: 1 with experts, 0 dense
    num_experts: int = 0  # 0: a dense model
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_intermediate_size: int = 0  # all shared experts together; 0: none
    shared_gate: bool = False  # a sigmoid gate on the shared expert's output
    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False  # a correction that enters the choice of experts and not their weights
    renormalise: bool = True  # weights of the chosen experts add up to 1 (before scaling)
    router_scaling: float = 1.0
    latent: LatentAttention | None = None  # in place of grouped-query attention
    rope_scaling: Linear | Llama3 | Yarn | None = None
    router_groups: int = 1  # experts are chosen within the best groups alone
    router_top_groups: int = 1
    router_group_best: int = 2  # a group is ranked by the sum of so many of its best experts
    sliding_window: int = 0  # tokens that a query of a windowed layer sees, itself among them
    windowed_layers: tuple[int, ...] = ()  # one a layer: 1 windowed; empty: none is
    sinks: bool = False  # a logit of each head that takes its share of the softmax and gives no value
    linear_bias: bool = False  # of the attention's output, the router and the experts
    linear: LinearAttention | None = None  # in place of attention, in linear_layers
    linear_layers: tuple[int, ...] = ()  # one a layer: 1 linear attention; empty: none is
    output_gate: bool = False  # attention's output times the sigmoid of a gate that each query head has
    zero_centred_norms: bool = False  # norms multiply by 1 + weight, but for those inside of linear attention
    clamped_glu: float = 0.0  # gate * sigmoid(1.702 gate) * (up + 1), both clamped to this; 0: SiLU(gate) * up

    @property
    def untied(self) -> bool:
        """The LM head is a matrix of its own."""
        return not self.tied

    @property
    def has_qk_norm(self) -> bool:
        return self.qk_norm != "none"

    @property
    def has_query_latent(self) -> bool:
        return self.latent is not None and self.latent.q_lora_rank is not None

    @property
    def has_whole_query(self) -> bool:
        return self.latent is not None and self.latent.q_lora_rank is None

    def is_linear(self, layer: int) -> bool:
        """This layer (from 0) has linear attention."""
        return bool(self.linear_layers) and bool(self.linear_layers[layer])

    @property
    def num_parameters(self) -> int:
        """Count the whole model's parameters, without router_bias (it is not trained)."""
        hidden = self.hidden_size
        attention = self._attention_parameters if self.latent is None else self._latent_parameters(self.latent)
        moe = self.num_experts * (3 * hidden * self.moe_intermediate_size + hidden)
        moe += 3 * hidden * self.shared_intermediate_size + (hidden if self.shared_gate else 0)
        moe += self.num_experts * (2 * self.moe_intermediate_size + hidden + 1) if self.linear_bias else 0
        sparse = sum(self.moe_layers)
        dense = 3 * hidden * self.intermediate_size
        linear = sum(self.linear_layers)
        layers = (self.num_hidden_layers - linear) * attention + self.num_hidden_layers * 2 * hidden
        layers += linear * self.linear.num_parameters(hidden) if self.linear else 0
        layers += sparse * moe + (self.num_hidden_layers - sparse) * dense
        return layers + hidden + self.vocab_size * hidden * (1 if self.tied else 2)

    def _latent_parameters(self, latent: LatentAttention) -> int:
        hidden, heads = self.hidden_size, self.num_attention_heads
        query = heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        rank = latent.q_lora_rank
        queries = hidden * query if rank is None else hidden * rank + rank + rank * query
        kv = hidden * (latent.kv_lora_rank + latent.qk_rope_head_dim) + latent.kv_lora_rank
        kv += latent.kv_lora_rank * heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        return queries + kv + heads * latent.v_head_dim * hidden

    @property
    def _attention_parameters(self) -> int:
        hidden, dim = self.hidden_size, self.head_dim
        rows = dim * (self.num_attention_heads + 2 * self.num_key_value_heads)
        attention = hidden * (rows + dim * self.num_attention_heads) + (rows if self.qkv_bias else 0)
        attention += hidden * dim * self.num_attention_heads if self.output_gate else 0
        attention += (self.num_attention_heads if self.sinks else 0) + (hidden if self.linear_bias else 0)
        normed_heads = {"none": 0, "head": 2, "all_heads": self.num_attention_heads + self.num_key_value_heads}
        return attention + dim * normed_heads[self.qk_norm]
