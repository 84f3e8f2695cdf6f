"""What families share: the form of a family, and the rows that most of them have word for word.

Left of each row stands Megatron's name in parameters.py's form (numbers of layers and experts are global, the same for
the local layers and Transformer Engine's), right of it the name in a published checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.operators import Row, merge_gate_up, merge_qkv, rename, stacked, stacked_gate_up


@dataclass(frozen=True)
class Family:
    """One table, read in both directions. A row holds for the whole model, each layer, or each layer of a kind."""

    read: Callable[[ConfigReader], Architecture]
    model: tuple[Row, ...]
    layer: tuple[Row, ...]  # {layer}
    dense: tuple[Row, ...] = ()  # {layer}, of layers without experts
    moe: tuple[Row, ...] = ()  # {layer}, of layers with experts
    experts: tuple[Row, ...] = ()  # {layer} and {expert}: one tensor an expert, as published
    # What replaces `moe` and `experts` in a folder that transformers saved with save_original_format off.
    stacked_moe: tuple[Row, ...] = ()
    stacked_experts: tuple[Row, ...] = ()
    # Of a hybrid: what layers with softmax attention, and those with linear attention, have besides `layer`.
    softmax: tuple[Row, ...] = ()
    linear: tuple[Row, ...] = ()


OURS = "decoder.layers.{layer}."
THEIRS = "model.layers.{layer}."

MODEL = (
    rename("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    rename("decoder.final_layernorm.weight", "model.norm.weight"),
    rename("output_layer.weight", "lm_head.weight", when="untied"),
)

ATTENTION = (
    rename(OURS + "input_layernorm.weight", THEIRS + "input_layernorm.weight"),
    merge_qkv(
        OURS + "self_attention.linear_qkv.weight",
        THEIRS + "self_attn.q_proj.weight",
        THEIRS + "self_attn.k_proj.weight",
        THEIRS + "self_attn.v_proj.weight",
    ),
    merge_qkv(
        OURS + "self_attention.linear_qkv.bias",
        THEIRS + "self_attn.q_proj.bias",
        THEIRS + "self_attn.k_proj.bias",
        THEIRS + "self_attn.v_proj.bias",
        when="qkv_bias",
    ),
    rename(OURS + "self_attention.q_layernorm.weight", THEIRS + "self_attn.q_norm.weight", when="has_qk_norm"),
    rename(OURS + "self_attention.k_layernorm.weight", THEIRS + "self_attn.k_norm.weight", when="has_qk_norm"),
    rename(OURS + "self_attention.linear_proj.weight", THEIRS + "self_attn.o_proj.weight"),
    rename(OURS + "pre_mlp_layernorm.weight", THEIRS + "post_attention_layernorm.weight"),
)

DENSE = (
    merge_gate_up(
        OURS + "mlp.linear_fc1.weight", THEIRS + "mlp.gate_proj.weight", THEIRS + "mlp.up_proj.weight"
    ),
    rename(OURS + "mlp.linear_fc2.weight", THEIRS + "mlp.down_proj.weight"),
)  # fmt: skip

ROUTER = (rename(OURS + "mlp.router.weight", THEIRS + "mlp.gate.weight"),)

EXPERTS = (
    merge_gate_up(
        OURS + "mlp.experts.{expert}.linear_fc1.weight",
        THEIRS + "mlp.experts.{expert}.gate_proj.weight",
        THEIRS + "mlp.experts.{expert}.up_proj.weight",
    ),
    rename(OURS + "mlp.experts.{expert}.linear_fc2.weight", THEIRS + "mlp.experts.{expert}.down_proj.weight"),
)

STACKED_EXPERTS = (
    stacked_gate_up(OURS + "mlp.experts.{expert}.linear_fc1.weight", THEIRS + "mlp.experts.gate_up_proj"),
    stacked(OURS + "mlp.experts.{expert}.linear_fc2.weight", THEIRS + "mlp.experts.down_proj"),
)
