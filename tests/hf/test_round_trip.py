"""Tiny random models of every family, saved by transformers, through Megatron in every layout and back.

Limits: tensors to the bit, logits to 2e-5 in fp32. One spawn of four ranks goes through all of it. Left out: layouts
that change in between (test_convert.py) and Transformer Engine, which needs a GPU.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tools.validation import round_trip
from tools.validation.ranks import spawn
from tools.validation.round_trip import LAYOUTS, TINY, Outcome, sequences, write_model

MIXED = "TP2 PP2 EP2"
STACKED, BF16 = ("qwen3_moe", "mixtral"), ("qwen3_moe", "glm4_moe")


def all_cases(rank: int, world_size: int, folder: Path) -> dict[tuple[str, str], Outcome]:
    found = {}
    for name in TINY:
        for label, layout in LAYOUTS.items():
            found[name, label] = round_trip.round_trip(folder / name, layout, keep=label == MIXED)
    for name in STACKED:
        found[name, "stacked"] = round_trip.round_trip(folder / f"{name} stacked", LAYOUTS[MIXED], is_stacked=True)
    for name in BF16:
        found[name, "bf16"] = round_trip.round_trip(folder / f"{name} bf16", LAYOUTS[MIXED], params_dtype="bf16")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in TINY.items():
        write_model(folder / name, config)
    for name in STACKED:
        write_model(folder / f"{name} stacked", TINY[name], is_stacked=True)
    for name in BF16:
        write_model(folder / f"{name} bf16", TINY[name], dtype=torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder) -> dict[tuple[str, str], Outcome]:
    ranks = spawn(all_cases, 4, folder, timeout=280)
    assert all(found == ranks[0] for found in ranks)
    return ranks[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TINY)
def test_bits_come_back_and_logits_are_transformers(outcomes, name, layout):
    assert outcomes[name, layout].differing == ()
    assert outcomes[name, layout].logits < round_trip.LIMIT


@pytest.mark.parametrize("name", STACKED)
def test_stacked_experts_come_back(outcomes, folder, name):
    """transformers' own layout: one tensor of all experts, in the files of both sides (compared by name)."""
    outcome = outcomes[name, "stacked"]
    assert outcome.differing == () and outcome.logits < round_trip.LIMIT
    assert outcome.tensors < outcomes[name, MIXED].tensors


@pytest.mark.parametrize("name", BF16)
def test_bf16_comes_back(outcomes, name):
    """Bits, with the router bias still in fp32. (Logits of two bf16 networks differ where rounding changes a route.)"""
    assert outcomes[name, "bf16"].differing == ()


@pytest.mark.parametrize("name", TINY)
def test_transformers_loads_the_export(outcomes, folder, name):
    """Nothing missing or unexpected, and its logits are those of the first model to the bit."""
    model, told = AutoModelForCausalLM.from_pretrained(folder / f"{name}.out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    for parameter in model.parameters():
        # A mapped file's numbers are aligned otherwise than the first model's, and sums then may round otherwise.
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        logits = torch.cat([model(tokens[None]).logits[0] for tokens in sequences()])
    assert torch.equal(logits, torch.load(folder / name / "logits.pt"))
    assert logits.abs().max() > 1
