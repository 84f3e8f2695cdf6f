"""A config.json that leaves fields out, or has yarn added to it: Megatron's logits are those of transformers, which
reads the same file."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tools.validation.ranks import spawn
from tools.validation.round_trip import LAYOUTS, LIMIT, TINY, round_trip, sequences, write_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
V3 = {"n_routed_experts": 16, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3}
# (name of a tiny model, changes, fields that are taken out of the file, fields that are added to it)
CASES: dict[str, tuple[str, dict, tuple[str, ...], dict]] = {
    "glm4_moe rotates half": ("glm4_moe", {}, ("rope_parameters", "first_k_dense_replace", "rms_norm_eps"), {}),
    "mixtral's base": ("mixtral", {}, ("rope_parameters", "rms_norm_eps"), {}),
    "deepseek_v3's groups": ("deepseek_v3", V3, tuple(V3)[1:], {}),
    "yarn beside parameters": ("llama", {}, (), {"rope_scaling": YARN}),
}


def errors(rank: int, world_size: int, folder: Path) -> dict[str, float]:
    """{case: largest difference between the logits}."""
    found = {}
    for case, (name, changes, left_out, added) in CASES.items():
        write_model(folder / case, TINY[name] | changes)
        config = json.loads((folder / case / "config.json").read_text())
        assert set(left_out) <= config.keys()
        config = {field: value for field, value in config.items() if field not in left_out} | added
        (folder / case / "config.json").write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(folder / case).eval()
        with torch.no_grad():
            torch.save(
                torch.cat([model(tokens[None]).logits[0] for tokens in sequences()]), folder / case / "logits.pt"
            )
        found[case] = round_trip(folder / case, LAYOUTS["TP1"]).logits
    return found


def test_logits_are_transformers(tmp_path):
    """Read with one default for all families, these differed by 0.37 to 1.2 (as far as they were not refused)."""
    found = spawn(errors, 1, tmp_path)[0]
    assert found.keys() == CASES.keys() and max(found.values()) <= LIMIT, found
