"""The tables against what transformers saves, and against what is known of published checkpoints."""

import json
from pathlib import Path

import pytest

from gspo_megatron.errors import ConfigError, ConversionError
from gspo_megatron.models import table
from gspo_megatron.models.families import FAMILIES, architecture
from gspo_megatron.models.table import Entry, local_name
from tools.validation.round_trip import TINY

# The shapes that decide names, from the published config.json files.
QWEN3_30B = {"model_type": "qwen3_moe", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 6144,
             "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
             "num_experts_per_tok": 8, "moe_intermediate_size": 768, "vocab_size": 151936, "norm_topk_prob": True,
             "max_position_embeddings": 40960}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
GPT_OSS_20B = {"model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880,
               "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
               "num_experts_per_tok": 4, "vocab_size": 201088, "max_position_embeddings": 131072,
               "sliding_window": 128}  # fmt: skip
QWEN3_NEXT_80B = {"model_type": "qwen3_next", "num_hidden_layers": 48, "hidden_size": 2048, "intermediate_size": 5120,
                  "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "num_experts": 512,
                  "num_experts_per_tok": 10, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
                  "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
                  "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "vocab_size": 151936,
                  "max_position_embeddings": 262144}  # fmt: skip


def test_every_family_has_a_tiny_model():
    assert {config["model_type"] for config in TINY.values()} == set(FAMILIES)


@pytest.mark.parametrize("is_stacked", [False, True], ids=["published", "stacked"])
@pytest.mark.parametrize("name", TINY)
def test_every_piece_is_taken_exactly_once(name, is_stacked):
    """No two rows take the same part of a tensor, and the parts of a tensor cover it."""
    arch = architecture(TINY[name])
    for pieces in table.tensors(table.entries(arch, is_stacked)).values():
        shares = [(p.expert, share) for p in pieces for share in range(p.part, p.part + p.count)]
        assert len(set(shares)) == len(shares)
        experts = 1 if pieces[0].expert is None else arch.num_experts
        assert len(shares) == experts * pieces[0].parts


def test_published_checkpoints_have_these_tensors():
    """Numbers of tensors by hand. Qwen3: 48 layers of 4 projections, 2 + 2 norms, a router and 128 x 3 matrices, and
    embedding, head and norm: 48 * 393 + 3, the count of its published index. Mixtral: 32 * (4 + 2 + 1 + 24) + 3.
    GPT-OSS in bf16: 24 layers of 4 projections with biases, sinks, 2 norms, a router with bias, and of all experts 2
    matrices with biases. Qwen3-Next: 48 layers of 2 norms, a router, a shared expert of 3 matrices and a gate and 512 x
    3 matrices, 12 of 4 projections and 2 norms, and 36 of 3 projections, convolution, 2 vectors and a norm."""
    names = table.tensors(table.entries(architecture(QWEN3_30B))).keys()
    assert len(names) == 18867
    assert "model.layers.47.mlp.experts.127.gate_proj.weight" in names
    names = table.tensors(table.entries(architecture(GPT_OSS_20B))).keys()
    assert len(names) == 24 * 17 + 3 and "model.layers.23.self_attn.sinks" in names
    names = table.tensors(table.entries(architecture(QWEN3_NEXT_80B))).keys()
    assert len(names) == 48 * (2 + 1 + 4 + 512 * 3) + 12 * 6 + 36 * 7 + 3
    assert {"model.layers.46.linear_attn.in_proj_ba.weight", "model.layers.47.self_attn.q_norm.weight"} <= names
    names = table.tensors(table.entries(architecture(MIXTRAL_8X7B))).keys()
    assert len(names) == 995
    assert "model.layers.31.block_sparse_moe.experts.7.w2.weight" in names


def test_parameters_of_published_models():
    """30.5, 46.7, 20.91 and 80 billion, as their model cards say."""
    assert round(architecture(QWEN3_NEXT_80B).num_parameters / 1e9) == 80
    assert round(architecture(QWEN3_30B).num_parameters / 1e9, 1) == 30.5
    assert round(architecture(MIXTRAL_8X7B).num_parameters / 1e9, 1) == 46.7
    assert round(architecture(GPT_OSS_20B).num_parameters / 1e9, 2) == 20.91


def test_norms_inside_of_transformer_engine_s_linear_layers():
    layer = "decoder.layers.3."
    assert local_name(layer + "self_attention.linear_qkv.layer_norm_weight") == layer + "input_layernorm.weight"
    assert local_name(layer + "mlp.linear_fc1.layer_norm_weight") == layer + "pre_mlp_layernorm.weight"
    assert local_name(layer + "mlp.linear_fc1.weight") == layer + "mlp.linear_fc1.weight"


def published(name: str) -> tuple:
    arch = architecture(TINY[name])
    return arch, set(table.tensors(table.entries(arch)))


def refusal(arch, names, drop_mtp=False) -> str:
    with pytest.raises(ConversionError) as caught:
        table.match(arch, names, drop_mtp, "FOLDER")
    return str(caught.value)


def test_a_missing_tensor_is_named():
    arch, names = published("qwen3_moe")
    lost = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert f"FOLDER: 1 tensor ({lost}) missing" in refusal(arch, names - {lost})


def test_all_experts_missing_is_not_taken_for_a_dense_model():
    arch, names = published("qwen3_moe")
    assert "36 tensors" in refusal(arch, {n for n in names if ".experts." not in n})  # 3 MoE layers of 4 experts


def test_a_left_over_tensor_is_named():
    arch, names = published("mixtral")
    assert "1 tensor (model.layers.0.self_attn.q_proj.bias) left over" in refusal(
        arch, names | {"model.layers.0.self_attn.q_proj.bias"}
    )


def test_multi_token_prediction_is_refused_or_dropped():
    arch, names = published("glm4_moe")
    extra = {"model.layers.4.eh_proj.weight", "model.layers.4.embed_tokens.weight"}
    assert "2 tensors (model.layers.4.eh_proj.weight" in refusal(arch, names | extra)
    assert "drop_mtp" in refusal(arch, names | extra)
    kept = table.match(arch, names | extra, True, "FOLDER")
    assert set(table.tensors(kept)) == names


def test_multi_token_prediction_under_its_own_name():
    arch, names = published("qwen3_next")
    extra = {"mtp.fc.weight", "mtp.layers.0.mlp.gate.weight"}
    assert "2 tensors (mtp.fc.weight, mtp.layers.0.mlp.gate.weight) of layers behind" in refusal(arch, names | extra)
    assert set(table.tensors(table.match(arch, names | extra, True, "FOLDER"))) == names


def test_old_tables_of_angles_are_no_left_over():
    arch, names = published("llama")
    found = table.match(arch, names | {"model.layers.0.self_attn.rotary_emb.inv_freq"}, False, "FOLDER")
    assert all(isinstance(entry, Entry) for entry in found.values())


def test_an_unknown_family_names_those_that_are_known():
    with pytest.raises(ConfigError) as caught:
        architecture({"model_type": "gpt2"})
    assert "'gpt2'" in str(caught.value) and "qwen3_moe, qwen2_moe, mixtral" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias = True is not supported"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ("mixtral", {"sliding_window": 32}, "sliding-window"),
        # use_sliding_window is no field of Mixtral's class: a window is in use whatever it says.
        ("mixtral", {"sliding_window": 32, "use_sliding_window": False}, "sliding-window"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "full_attention alone is supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported. Use one of: silu, swish."),
        ("llama", {"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config = "),
        ("llama", {"is_causal": False}, "is_causal = False is not supported"),
        ("qwen3_moe", {"is_causal": None}, "is_causal = None is not supported"),  # transformers: not true
        ("mixtral", {"is_causal": 0}, "is_causal = 0 is not supported"),
        ("llama", {"transformers_weights": "other.safetensors"}, "transformers_weights = 'other.safetensors' is not"),
        ("olmoe", {"sliding_window": 32}, "sliding_window = 32 is not supported"),
        ("llama", {"max_position_embeddings": 2**24 + 1}, "max_position_embeddings is over 16777216"),
        ("deepseek_v3", {"max_position_embeddings": 2 * 10**9}, "max_position_embeddings is over 16777216"),
        ("gpt_oss", {"swiglu_limit": 0.0}, "swiglu_limit is 0.0, and must be above 0"),
        ("glm4_moe", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0, and must be above 0"),
        ("deepseek_v2", {"routed_scaling_factor": 0}, "routed_scaling_factor is 0.0, and must be above 0"),
        ("deepseek_v3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0, and must be above 0"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1 and weights are renormalised"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1 and weights are renormalised"),
        ("gpt_oss", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1 and weights are renormalised"),
        ("olmoe", {"num_local_experts": 8}, "num_experts = 4 and num_local_experts = 8 contradict each other"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads 2 is not num_attention_heads 4"),
        ("qwen3_moe", {"norm_topk_prob": "false"}, "norm_topk_prob is 'false', not true or false"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, not a number"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0, not a number of 0 or more"),
        ("llama", {"hidden_size": 10**30}, "hidden_size is over 2147483648"),
        ("llama", {"head_dim": 7}, "7 of each head's 7 dimensions are rotated, which are no pairs"),
        ("glm4_moe", {"partial_rotary_factor": 0.01}, "0 of each head's 16 dimensions are rotated"),
        ("qwen3_next", {"layer_types": [[1]] * 4}, "layer_types is [[1], [1], [1], [1]], not a list of layers"),
        ("qwen3_moe", {"mlp_only_layers": [None]}, "mlp_only_layers is [None], not a list of layers"),
        ("deepseek_v3", {"routed_scaling_factor": None}, "routed_scaling_factor is null"),
        ("gpt_oss", {"layer_types": ["chunked_attention"] * 4}, "layer_types is ['chunked_attention'"),
        ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha 1.5 is not supported"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window is null"),
        ("mixtral", {"num_local_experts": None}, "num_local_experts is null"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0 is not supported"),
        ("glm4_moe", {"norm_topk_prob": False}, "norm_topk_prob off"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported"),
        ("deepseek_v2 groups", {"n_group": 3}, "n_group 3, topk_group 2, 8 experts, num_experts_per_tok 4 do not fit"),
        ("qwen3_next", {"layer_types": ["full_attention"] * 3}, "layer_types is ['full_attention'"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_value_heads 3 is no multiple of linear"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias = True is not supported"),
        ("deepseek_v3", {"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear'"),
        ("glm4_moe", {"n_group": 4, "topk_group": 1}, "n_group 4, topk_group 1, 8 experts, num_experts_per_tok 4"),
    ],
)
def test_a_config_that_would_become_another_model_is_refused(name, changes, part):
    with pytest.raises(ConfigError) as caught:
        architecture(TINY[name] | changes, "model.hf_config = 'x'")
    assert str(caught.value).startswith("model.hf_config = 'x': ") and part in str(caught.value)


def test_fields_that_say_what_is_so_anyway_are_read():
    """And the positions of the longest model that is published, Llama 4 Scout's 10 million."""
    plain = architecture(TINY["llama"])
    assert architecture(TINY["llama"] | {"is_causal": True, "transformers_weights": None}) == plain
    assert architecture(TINY["olmoe"] | {"sliding_window": None}) == architecture(TINY["olmoe"])
    assert architecture(TINY["llama"] | {"max_position_embeddings": 10485760}).max_position_embeddings == 10485760


def test_swish_is_silu():
    assert architecture(TINY["llama"] | {"hidden_act": "swish"}) == architecture(TINY["llama"])


def test_a_single_expert_whose_weight_is_not_renormalised_is_read():
    arch = architecture(TINY["qwen3_moe"] | {"num_experts_per_tok": 1, "norm_topk_prob": False})
    assert arch.num_experts_per_tok == 1 and not arch.renormalise


def test_the_example_model_is_read():
    path = Path(__file__).parents[2] / "examples/models/qwen3_moe_tiny/config.json"
    arch = architecture(json.loads(path.read_text()))
    assert (arch.num_experts, arch.moe_layers, arch.qk_norm, arch.rope_theta) == (8, (1, 1, 1, 1), "head", 10000.0)
