"""GPTModel from a Hugging Face config against transformers' own implementation."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.layers.attention import PackedPlan
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from tests.backend.qwen3_moe import full_from_hugging_face
from tests.backend.small import CONFIG_PATH, SINGLE, small_config
from tools.validation.ranks import spawn

LENGTHS = (5, 9, 1, 14)


def random_sequences(vocab_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (n,), generator=generator) for n in LENGTHS]


def hugging_face_model(hf: dict) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{k: v for k, v in hf.items() if k != "architectures"})).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # away from the initial 0.02, so that attention and routing matter
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "no-renormalisation": {"norm_topk_prob": False},
    "dense-layer": {"mlp_only_layers": [1]},
    "rope-theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


def all_variants(rank: int, world_size: int) -> dict[str, tuple]:
    results = {}
    for name, changes in VARIANTS.items():
        results[name] = packed_logits(changes)
        topology.destroy_model_parallel()
    return results


def packed_logits(changes: dict) -> tuple[float, float, int, int]:
    """Largest difference to transformers' logits, the largest logit, and the parameters counted and real."""
    started = runtime.init_process_group("cpu")
    cut = topology.initialize_model_parallel(SINGLE, seed=1)
    shape = ModelShape.load(CONFIG_PATH, 250)
    shape = replace(shape, hf=shape.hf | changes)
    policy = Policy(small_config(SINGLE), shape, cut, started)
    theirs = hugging_face_model(shape.hf)
    full = full_from_hugging_face(theirs)
    if shape.architecture.tied:
        del full["output_layer.weight"]
    assert {p.name for p in parameters.named(policy.models[0], cut)} == set(full)
    parameters.load_full(policy.models, cut, full)
    sequences = random_sequences(250)
    tokens = torch.cat(sequences)
    positions = torch.cat([torch.arange(len(s)) for s in sequences])
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    with torch.no_grad():
        plan = PackedPlan.from_cu_seqlens(cu_seqlens)
        ours = policy.models[0](tokens[None], positions[None], None, packed_seq_params=plan)
        expected = torch.cat([theirs(s[None]).logits[0] for s in sequences])
    real = sum(p.numel() for p in policy.models[0].parameters())
    return float((ours - expected).abs().max()), float(expected.abs().max()), shape.num_parameters(), real


@pytest.fixture(scope="module")
def results() -> dict[str, tuple]:
    return spawn(all_variants, 1)[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_logits_equal_transformers(results, name):
    """Four sequences packed into one, against transformers one by one: the same network up to fp32 rounding."""
    error, size, _, _ = results[name]
    assert size > 1
    assert error < 2e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_count_of_the_header_is_the_model_s(results, name):
    _, _, counted, real = results[name]
    assert counted == real
