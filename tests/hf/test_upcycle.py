"""Sparse upcycling: the MoE computes what the dense model computes, in transformers, and its tensors are copies."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gspo_megatron.cli import upcycle as command
from gspo_megatron.errors import ConfigError, ConversionError
from gspo_megatron.hf.upcycle import sparse_config, upcycle
from gspo_megatron.models.families import architecture
from tools.validation.round_trip import TINY, write_model

PAIRS = {"llama": "mixtral", "qwen3": "qwen3_moe"}


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


@pytest.fixture(scope="module", params=PAIRS)
def dense(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("upcycle") / request.param
    write_model(folder, TINY[request.param])
    return folder


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.arange(1, 25).remainder(model.config.vocab_size).view(2, 12)
    with torch.no_grad():
        return model(tokens).logits


def test_the_moe_computes_what_the_dense_model_does(dense, tmp_path):
    """Weights of the chosen experts add up to 1, and all experts are the same: only fp32's rounding differs."""
    upcycle(dense, tmp_path / "moe", 4, 2, 0.0, 1, None, quiet)
    config = json.loads((tmp_path / "moe/config.json").read_text())
    assert config["model_type"] == PAIRS[dense.name] and config["num_experts_per_tok"] == 2
    torch.testing.assert_close(logits(tmp_path / "moe"), logits(dense), rtol=0, atol=5e-6)


def test_every_expert_is_a_copy_and_no_router_is_another_layers(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", 3, 2, 0.0, 7, None, quiet)
    source, made = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe/model.safetensors")
    down = {"llama": "block_sparse_moe.experts.{}.w2", "qwen3": "mlp.experts.{}.down_proj"}[dense.name]
    router = {"llama": "block_sparse_moe.gate", "qwen3": "mlp.gate"}[dense.name]
    for layer in range(2):
        for expert in range(3):
            name = f"model.layers.{layer}.{down.format(expert)}.weight"
            assert torch.equal(made[name], source[f"model.layers.{layer}.mlp.down_proj.weight"])
    routers = [made[f"model.layers.{layer}.{router}.weight"] for layer in range(2)]
    assert not torch.equal(*routers) and 0.01 < float(routers[0].std()) < 0.04  # initializer_range 0.02
    others = [name for name in source if ".mlp." not in name]
    assert others and all(torch.equal(made[name], source[name]) for name in others)


@pytest.mark.parametrize("family", PAIRS)
def test_what_the_dense_config_leaves_out_stays_what_it_was(family):
    """transformers' classes differ: Llama's rope_theta is 10000, epsilon 1e-6 and a key head for each head; Mixtral's
    1e6, 1e-5 and 8. Qwen3's heads have 128 dimensions, Qwen3-MoE's hidden_size / heads."""
    left_out = ("rope_theta", "rms_norm_eps", "num_key_value_heads", "head_dim", "max_position_embeddings")
    hf = {name: value for name, value in TINY[family].items() if name not in left_out} | {"num_attention_heads": 32}
    hf["hidden_size"] = 64
    dense = architecture(hf)
    sparse = architecture(sparse_config(hf, dense, 4, 2))
    assert [getattr(sparse, name) for name in left_out] == [getattr(dense, name) for name in left_out]


def test_noise_is_that_share_of_each_tensor(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", 2, 2, 0.1, 1, torch.float32, quiet)
    source, made = load_file(dense / "model.safetensors"), load_file(tmp_path / "moe/model.safetensors")
    down = {"llama": "block_sparse_moe.experts.{}.w2", "qwen3": "mlp.experts.{}.down_proj"}[dense.name]
    whole = source["model.layers.0.mlp.down_proj.weight"].float()
    first, second = (made[f"model.layers.0.{down.format(expert)}.weight"] - whole for expert in range(2))
    assert float(first.std() / whole.std()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(first, second)


def test_what_cannot_be_upcycled_is_said(tmp_path):
    write_model(tmp_path / "olmoe", TINY["olmoe"])
    with pytest.raises(ConversionError, match="model_type 'olmoe' cannot be upcycled. Give one of: llama, qwen3"):
        upcycle(tmp_path / "olmoe", tmp_path / "moe", 2, 2, 0.0, 1, None, quiet)
    for options, message in (
        (["--top-k", "9"], "--top-k = 9: must be from 2 to --experts 8"),
        (["--top-k", "1"], "--top-k = 1: must be from 2 to --experts 8: weights of the chosen experts add up to 1"),
        (["--experts", "1"], "--experts = 1"),
        (["--noise", "-1"], "--noise = -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            command.main([str(tmp_path / "olmoe"), str(tmp_path / "moe"), *options])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["olmoe"]
