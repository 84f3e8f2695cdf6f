"""GPT-OSS (arXiv 2508.10925): attention with sinks, every second layer with a window, biases everywhere, and experts
that are stacked, transposed, and have the rows of gate and up in turns. Published in MXFP4 (quantised.py).
"""

from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.attention_reader import read_attention
from gspo_megatron.models.config_reader import ConfigReader
from gspo_megatron.models.families.common import ATTENTION, MODEL, OURS, THEIRS, Family
from gspo_megatron.models.operators import rename, stacked, stacked_interleaved

ALPHA = 1.702  # Megatron's quick GELU has it built in

LAYER = (
    *ATTENTION,
    rename(OURS + "self_attention.linear_proj.bias", THEIRS + "self_attn.o_proj.bias"),
    rename(OURS + "self_attention.core_attention.softmax_offset", THEIRS + "self_attn.sinks"),
)
MOE = (
    rename(OURS + "mlp.router.weight", THEIRS + "mlp.router.weight"),
    rename(OURS + "mlp.router.bias", THEIRS + "mlp.router.bias"),
)
_OURS, _THEIRS = OURS + "mlp.experts.{expert}.", THEIRS + "mlp.experts."
EXPERTS = (
    stacked_interleaved(_OURS + "linear_fc1.weight", _THEIRS + "gate_up_proj", transposed=True),
    stacked_interleaved(_OURS + "linear_fc1.bias", _THEIRS + "gate_up_proj_bias"),
    stacked(_OURS + "linear_fc2.weight", _THEIRS + "down_proj", transposed=True),
    stacked(_OURS + "linear_fc2.bias", _THEIRS + "down_proj_bias"),
)


def read(config: ConfigReader) -> Architecture:
    config.require(config.get("attention_bias"), "attention_bias off is not supported", "Use a published model.")
    alpha = config.get("swiglu_alpha")
    config.require(alpha == ALPHA, f"swiglu_alpha {alpha} is not supported", f"Use {ALPHA}.")
    layers = config.size("num_hidden_layers")
    types = config.get("layer_types") or ["sliding_attention", "full_attention"] * layers
    known = set(types) <= {"sliding_attention", "full_attention"} and len(types) >= layers
    config.require(
        known,
        f"layer_types is {types!r}, not sliding_attention or full_attention for each layer",
        "Correct it in that file.",
    )
    return Architecture(
        family="gpt_oss",
        **read_attention(config),
        **config.experts(renormalise=True),
        intermediate_size=config.size("intermediate_size"),
        moe_intermediate_size=config.size("intermediate_size"),
        moe_layers=(1,) * layers,
        qkv_bias=True,
        linear_bias=True,
        sinks=True,
        sliding_window=config.size("sliding_window"),
        windowed_layers=tuple(int(kind == "sliding_attention") for kind in types[:layers]),
        clamped_glu=config.factor("swiglu_limit"),
    )


FAMILY = Family(read, MODEL, LAYER, moe=MOE, experts=EXPERTS, stacked_moe=MOE, stacked_experts=EXPERTS)
