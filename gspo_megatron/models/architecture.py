"""What a Hugging Face config.json says about a model, in one vocabulary for all families. Imports no torch.

Sizes have the names of Qwen3-MoE's config, which are those of most families. Each family's own file (families/) reads
its config into an `Architecture` through a `ConfigReader`, which refuses what Megatron's model here would silently
compute as something else.

Left out, and refused: rotary scaling but for linear, llama3 and yarn; sliding windows and biases but GPT-OSS's (and
biases of query, key and value); activations other than SiLU and GPT-OSS's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from gspo_megatron.errors import ConfigError
from gspo_megatron.models.rope_scaling import Linear, Llama3, Yarn

RENAMED = {"num_experts": ("num_experts", "num_local_experts", "n_routed_experts")}


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


class ConfigReader:
    """Reads fields of a config.json; every complaint starts with `origin` (the option and the path)."""

    def __init__(self, hf: dict, origin: str):
        self.hf, self.origin = hf, origin

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field or its default; null counts as absent."""
        value = self.hf.get(name)
        return default if value is None else value

    def size(self, name: str) -> int:
        """Return a whole number above 0, under this name or another family's (RENAMED)."""
        names = RENAMED.get(name, (name,))
        found = next((n for n in names if self.hf.get(n) is not None), name)
        value = self.hf.get(found)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            self.fail(f"{found} is {value!r}, not a whole number above 0", f"Correct {found} in that file.")
        return value

    def require(self, ok: bool, constraint: str, remedy: str) -> None:
        """Raise ConfigError unless ok."""
        if not ok:
            self.fail(constraint, remedy)

    def fail(self, constraint: str, remedy: str) -> NoReturn:
        """Raise ConfigError."""
        raise ConfigError(f"{self.origin}: {constraint}. {remedy}")

    def refuse(self, *names: str) -> None:
        """Refuse fields that are not absent, false or 0: what they turn on is not built."""
        for name in names:
            value = self.get(name)
            self.require(not value, f"{name} = {value!r} is not supported", "Use a model without it.")

    def rope(self) -> dict:
        """Return what a config says about rotary embeddings, under either name."""
        return self.get("rope_parameters") or self.get("rope_scaling") or {}

    def rope_scaling(self, *kinds: str) -> Linear | Llama3 | Yarn | None:
        """Read how rotary angles are scaled; any other way than `kinds` is refused."""
        rope = self.rope()
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "default":
            return None
        self.require(
            kind in kinds, f"rope_type {kind!r} is not supported", f"Use a model with one of: {', '.join(kinds)}."
        )
        readers: dict[str, Callable[[dict], Linear | Llama3 | Yarn]]
        readers = {"linear": self._linear, "llama3": self._llama3, "yarn": self._yarn}
        try:
            return readers[kind](rope)
        except KeyError as error:
            self.fail(f"rope_type {kind!r} has no {error.args[0]}", "Correct that file.")

    def _linear(self, rope: dict) -> Linear:
        return Linear(float(rope["factor"]))

    def _llama3(self, rope: dict) -> Llama3:
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Llama3(*(rope[name] for name in names))

    def _yarn(self, rope: dict) -> Yarn:
        self.require(
            rope.get("attention_factor") is None,
            "yarn with an attention_factor is not supported",
            "Use a model without it.",
        )
        original = rope["original_max_position_embeddings"]
        return Yarn(
            factor=float(rope.get("factor") or self.size("max_position_embeddings") / original),
            original_max_position_embeddings=original,
            beta_fast=float(rope.get("beta_fast") or 32),
            beta_slow=float(rope.get("beta_slow") or 1),
            mscale=float(rope.get("mscale") or 0),
            mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
            truncate=bool(rope.get("truncate", True)),
        )

    def attention(self, scalings: tuple[str, ...] = ("linear", "llama3", "yarn"), rotary_share: float = 1.0) -> dict:
        """Read what all families share of attention, embeddings and norms; rotary_share where none is given."""
        heads, groups = self.size("num_attention_heads"), self.get("num_key_value_heads")
        groups = self.size("num_attention_heads" if groups is None else "num_key_value_heads")
        self.require(
            heads % groups == 0,
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}",
            "Correct one of the two.",
        )
        rope = self.rope()
        activation = self.get("hidden_act", "silu")
        self.require(activation == "silu", f"hidden_act {activation!r} is not supported", "Use silu.")
        hidden = self.size("hidden_size")
        share = float(rope.get("partial_rotary_factor", self.get("partial_rotary_factor", rotary_share)))
        if share != 1:  # yarn's factor on cosine and sine goes into the softmax's scale, which the whole head has
            scalings = tuple(kind for kind in scalings if kind != "yarn")
        return {
            "num_hidden_layers": self.size("num_hidden_layers"),
            "hidden_size": hidden,
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": self.get("head_dim") or hidden // heads,
            "vocab_size": self.size("vocab_size"),
            "max_position_embeddings": self.size("max_position_embeddings"),
            "rms_norm_eps": float(self.get("rms_norm_eps", 1e-6)),
            "rope_theta": float(rope.get("rope_theta", self.get("rope_theta", 10000.0))),
            "rotary_share": share,
            "rope_scaling": self.rope_scaling(*scalings),
            "tied": bool(self.get("tie_word_embeddings", False)),
            "initializer_range": float(self.get("initializer_range", 0.02)),
        }

    def experts(self) -> dict:
        """Read the number of experts and how many a token gets."""
        experts, chosen = self.size("num_experts"), self.size("num_experts_per_tok")
        self.require(
            chosen <= experts,
            f"num_experts_per_tok {chosen} exceeds num_experts {experts}",
            "Lower num_experts_per_tok.",
        )
        return {"num_experts": experts, "num_experts_per_tok": chosen}

    def sparse_steps(self) -> tuple[int, ...]:
        """Make moe_layers of the Qwen families: each decoder_sparse_step-th layer but those of mlp_only_layers."""
        step, dense = self.get("decoder_sparse_step", 1), set(self.get("mlp_only_layers", ()))
        self.require(step > 0, f"decoder_sparse_step is {step}", "Give 1 or more.")
        return tuple(int((i + 1) % step == 0 and i not in dense) for i in range(self.size("num_hidden_layers")))

    def sliding_window(self) -> None:
        """Refuse a window that is in use; one as long as the context hides nothing."""
        window = self.get("sliding_window")
        in_use = window and self.get("use_sliding_window", True) and window < self.size("max_position_embeddings")
        self.require(
            not in_use and not self.get("use_sliding_window"),
            "sliding-window attention is not supported",
            "Use a model without it.",
        )
