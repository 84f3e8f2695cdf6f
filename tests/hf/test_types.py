"""Folders whose tensors have several types: each comes back in its own, to the bit, and is hashed as it was read."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from gspo_megatron.backend.checkpoint.streaming import StoredWeights
from gspo_megatron.backend.model import builder as model_builder
from gspo_megatron.backend.model.builder import unwrap
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.config import Layout, ModelConfig
from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import convert
from gspo_megatron.hf.load import load
from gspo_megatron.utils.tensor_bytes import memory
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, write_model

# Of a model in bf16, what has another type: by a pattern of names.
MIXED = {
    "qwen3_moe": {r"mlp\.gate\.weight": torch.float32, r"layers\.1\..*k_proj\.weight": torch.float32},
    "glm4_moe": {r"mlp\.gate\.weight": torch.float32, r"norm\.weight": torch.float16},
}


def quiet(done: int, total: int) -> None: ...


def retyped(source: Path, target: Path, others: dict[str, torch.dtype]) -> None:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        kind = next((dtype for pattern, dtype in others.items() if re.search(pattern, name)), torch.bfloat16)
        tensors[name] = tensor.to(kind)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def starts(folder: Path, dtype: torch.dtype) -> str:
    """What loading the weights to train them says."""
    started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(Layout(), seed=1)
    shape = ModelShape.of_folder(folder)
    models = [unwrap(c) for c in model_builder.build(shape, ModelConfig(), cut, started, None, False, dtype)]
    try:
        load(models, cut, folder, shape.architecture)
    except ConversionError as error:
        return str(error)
    finally:
        topology.destroy_model_parallel()
        runtime.destroy_process_group()
    return "loaded"


def there_and_back(rank: int, world_size: int, folder: Path) -> dict:
    """Types of the routers in the checkpoints, and what starting to train from the folders says."""
    found: dict = {}
    for name in MIXED:
        convert.to_megatron(folder / name, folder / f"{name}.megatron", None, False, quiet)
        convert.to_hugging_face(folder / f"{name}.megatron", folder / f"{name}.back", None, False, quiet)
        stored = StoredWeights(folder / f"{name}.megatron")._reader.tensors
        found[name] = next(one.dtype for key, one in stored.items() if key.endswith("router.weight"))
    source = folder / "qwen3_moe"
    convert.to_megatron(source, folder / "half", torch.bfloat16, False, quiet)
    convert.to_hugging_face(folder / "half", folder / "half.back", None, False, quiet)
    found["fp32"], found["bf16"] = starts(source, torch.float32), starts(source, torch.bfloat16)
    found["whole fp32"] = starts(folder / "plain/qwen3_moe", torch.bfloat16)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("types")
    for name, others in MIXED.items():
        write_model(folder / "plain" / name, TINY[name])
        retyped(folder / "plain" / name, folder / name, others)
    return folder


@pytest.fixture(scope="module")
def routers(folder) -> dict:
    return spawn(there_and_back, 1, folder)[0]


@pytest.mark.parametrize("name", MIXED)
def test_each_tensor_keeps_its_type_and_its_bits(routers, folder, name):
    """fp32 routers beside bf16; one of the tensors that Megatron merges in fp32 and the others in bf16; norms in fp16;
    a router bias in bf16, which Megatron keeps in fp32."""
    source = load_file(folder / name / "model.safetensors")
    assert {tensor.dtype for tensor in source.values()} >= {torch.bfloat16, torch.float32}
    back = load_file(folder / f"{name}.back/model.safetensors")
    assert source.keys() == back.keys()
    for key, tensor in source.items():
        assert back[key].dtype is tensor.dtype and torch.equal(back[key], tensor), key
    assert routers[name] is torch.float32


@pytest.mark.parametrize("name", MIXED)
def test_hashes_are_of_what_was_read(routers, folder, name):
    """So a conversion that rounds would have other hashes than its source."""
    told = json.loads((folder / f"{name}.megatron/hf/tensors.json").read_text())
    for key, tensor in load_file(folder / name / "model.safetensors").items():
        assert told[key]["dtype"] == str(tensor.dtype).removeprefix("torch.")
        assert told[key]["blake3"] == blake3(memory(tensor)).hexdigest(), key


def test_training_does_not_round_what_a_folder_keeps_wider(routers):
    """In fp32 all is held. In bf16 the router and one key projection would be rounded; but a folder all in fp32 may be
    trained in bf16, as the recipe says."""
    assert (routers["fp32"], routers["whole fp32"]) == ("loaded", "loaded")
    assert "4 tensors (model.layers.0.mlp.gate.weight" in routers["bf16"]
    assert (
        "model.layers.1.self_attn.k_proj.weight" in routers["bf16"] and "--model.params-dtype fp32" in routers["bf16"]
    )


def test_one_type_for_all_is_still_one_type(routers, folder):
    """With --dtype bf16 the routers are rounded, as asked, and "same" on the way back leaves them so."""
    source, back = (load_file(folder / n / "model.safetensors") for n in ("qwen3_moe", "half.back"))
    for key, tensor in source.items():
        assert back[key].dtype is torch.bfloat16 and torch.equal(back[key], tensor.bfloat16()), key
