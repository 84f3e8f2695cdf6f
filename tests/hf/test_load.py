"""What does not fit is refused on every rank, with the tensor's name; nothing is written by an export that fails."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.backend.model import builder as model_builder
from gspo_megatron.backend.model.builder import unwrap
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.config import Layout, ModelConfig
from gspo_megatron.errors import ConversionError
from gspo_megatron.hf.export import export
from gspo_megatron.hf.load import load
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, differences, write_model

PP2 = Layout(1, 2, None, 1, 1)
WEIGHT = "model.layers.3.mlp.experts.1.up_proj.weight"


def broken(folder: Path) -> dict[str, Path]:
    """Copies of a tied model, each with one thing wrong."""
    write_model(folder / "whole", TINY["qwen3_moe tied"])
    state = load_file(folder / "whole/model.safetensors")
    head = state["model.embed_tokens.weight"].clone()
    changed = {
        "shape": state | {WEIGHT: state[WEIGHT].T.contiguous()},
        "type": state | {WEIGHT: state[WEIGHT].to(torch.float8_e4m3fn)},
        "head": state | {"lm_head.weight": head + 1},
        "same head": state | {"lm_head.weight": head},
    }
    for name, tensors in changed.items():
        shutil.copytree(folder / "whole", folder / name)
        save_file(tensors, folder / name / "model.safetensors")
    return {name: folder / name for name in ("whole", *changed)}


def attempts(rank: int, world_size: int, folders: dict[str, Path]) -> dict[str, str]:
    started = runtime.init_process_group("cpu")
    cut = topology.initialize_model_parallel(PP2, seed=1)
    shape = ModelShape.of_folder(folders["whole"])
    models = [unwrap(c) for c in model_builder.build(shape, ModelConfig(), cut, started, None, False)]
    arch, said = shape.architecture, {}
    for name, folder in folders.items():
        said[name] = attempt(load, models, cut, folder, arch)
    said["dense"] = attempt(load, models, cut, folders["whole"], shape.architecture)
    target = folders["whole"].with_name("out")
    said["no parent"] = attempt(export, models, cut, Path("/proc/nowhere/out"), shape.hf, arch)
    said["export"] = attempt(export, models, cut, target, shape.hf, arch, torch.bfloat16, [folders["whole"]])
    said["again"] = attempt(export, models, cut, target, shape.hf, arch)
    return said


def attempt(function, *args) -> str:
    try:
        function(*args)
    except ConversionError as error:
        return str(error)
    return "ok"


def test_what_does_not_fit_is_named_on_every_rank(tmp_path):
    """Layer 3 is on the second stage alone, the head is compared on the first: both ranks get the same message."""
    folders = broken(tmp_path)
    ranks = spawn(attempts, 2, folders)
    assert ranks[0] == ranks[1]
    said = ranks[0]
    assert said["whole"] == said["same head"] == said["export"] == "ok"
    assert f"{WEIGHT} has shape [48, 24], and config.json makes it [24, 48]" in said["shape"]
    assert f"{WEIGHT} has type F8_E4M3" in said["type"]
    assert "lm_head.weight differs from model.embed_tokens.weight" in said["head"]
    assert "cannot be written" in said["no parent"]
    assert "exists already" in said["again"]
    assert not list(tmp_path.glob("*.unfinished"))
    # The export in bf16 has the source's numbers, rounded, and its companion files.
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == "bfloat16" and (tmp_path / "out/generation_config.json").is_file()
    ours, theirs = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "whole/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in theirs)
    assert differences(tmp_path / "out", tmp_path / "whole") == set(theirs)
