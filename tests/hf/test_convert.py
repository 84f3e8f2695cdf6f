"""Whole folders converted by one process, and their checkpoints in other layouts.

Left out: models larger than memory (tools/benchmarks/convert.py measures the peak).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file

from gspo_megatron.backend.checkpoint import saver, sharded
from gspo_megatron.backend.engine.policy import Policy
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.cli import convert as command
from gspo_megatron.config import ModelConfig, TrainConfig
from gspo_megatron.errors import CheckpointError, ConfigError, ConversionError
from gspo_megatron.hf import convert
from gspo_megatron.hf.export import write_side
from gspo_megatron.hf.safetensors import SafetensorsFolder
from tools.validation import round_trip
from tools.validation.ranks import spawn
from tools.validation.round_trip import LAYOUTS, TINY, differences, write_model

ROOT = Path(__file__).resolve().parents[2]
FILE = 40_000  # bytes: a dozen files a model
CUT = ("qwen3_moe", "qwen3_next", "olmoe", "glm4_moe", "gpt_oss", "llama")


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def there_and_back(rank: int, world_size: int, folder: Path) -> dict[str, set[str]]:
    found = {}
    for name in TINY:
        convert.to_megatron(folder / name, folder / f"{name}.megatron", None, False, quiet, FILE)
        back = folder / f"{name}.back"
        convert.to_hugging_face(folder / f"{name}.megatron", back, None, False, quiet, None, 100_000)
        found[name] = differences(folder / name, back)
    source, half = folder / "glm4_moe", folder / "half"
    convert.to_megatron(source, half, torch.bfloat16, False, quiet)
    convert.to_hugging_face(half, folder / "stacked", None, True, quiet)
    convert.to_megatron(folder / "stacked", folder / "half again", None, False, quiet)
    convert.to_hugging_face(folder / "half again", folder / "wide", torch.float32, False, quiet)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    for name, config in TINY.items():
        write_model(folder / name, config)
    return folder


@pytest.fixture(scope="module")
def converted(folder) -> dict[str, set[str]]:
    return spawn(there_and_back, 1, folder)[0]


@pytest.mark.parametrize("name", TINY)
def test_bits_come_back(converted, folder, name):
    assert converted[name] == set()
    files = sorted(path.name for path in (folder / f"{name}.back").iterdir())
    assert "model.safetensors.index.json" in files and "generation_config.json" in files
    assert all(path.stat().st_size < 120_000 for path in (folder / f"{name}.back").glob("*.safetensors"))
    told = json.loads((folder / f"{name}.back/tensors.json").read_text())
    assert told == json.loads((folder / f"{name}.megatron/hf/tensors.json").read_text())
    source = SafetensorsFolder(folder / name)
    assert told.keys() == source.names
    for tensor, about in told.items():
        assert about["blake3"] == blake3(source.whole(tensor).numpy().tobytes()).hexdigest()


def test_types_and_layouts_of_experts(converted, folder):
    """To bf16, out with stacked experts, in again and out in fp32: the numbers are the source's, rounded; the router
    bias was fp32 all the way."""
    source, wide = load_file(folder / "glm4_moe/model.safetensors"), load_file(folder / "wide/model.safetensors")
    assert source.keys() == wide.keys()
    for name, tensor in source.items():
        rounded = tensor if name.endswith("e_score_correction_bias") else tensor.bfloat16().float()
        assert torch.equal(wide[name], rounded), name
    stacked = load_file(folder / "stacked/model.safetensors")
    assert stacked["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 48, 48)
    assert json.loads((folder / "stacked/config.json").read_text())["dtype"] == "bfloat16"


def in_another_layout(rank: int, world_size: int, folder: Path) -> dict[str, float]:
    """Errors of the logits of converted checkpoints; and what this layout saves is converted by rank 0 of a test."""
    errors = {}
    for name in CUT:
        layout = LAYOUTS["TP2 PP2 EP2"]
        shape = ModelShape.of_folder(folder / name)
        if not shape.architecture.num_experts:
            layout = replace(layout, expert_model_parallel_size=1)
        started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(layout, seed=1)
        config = replace(TrainConfig(), parallel=layout, model=ModelConfig(hf_config=folder / name / "config.json"))
        policy = Policy(config, shape, cut, started)
        sharded.load_weights(policy.network, folder / f"{name}.megatron")
        policy.start_optimizer()  # so that what is saved has more in it than weights
        errors[name] = round_trip.logits_error(policy.network, torch.load(folder / name / "logits.pt"))
        saver.save(
            {"": policy.network},
            folder / f"{name}.cut",
            reference=FrozenReference(policy.models),
            add=lambda unfinished, hf=shape.hf: write_side(unfinished, hf, [], torch.float32),
        )
        topology.destroy_model_parallel()
    return errors


def one_process(rank: int, world_size: int, folder: Path) -> dict[str, set[str]]:
    found = {}
    for name in CUT:
        convert.to_hugging_face(folder / f"{name}.cut", folder / f"{name}.joined", None, False, quiet)
        found[name] = differences(folder / name, folder / f"{name}.joined")
    return found


def test_checkpoints_load_and_are_saved_under_another_layout(converted, folder):
    """Converted by one process, loaded at TP2 PP2 EP2 with transformers' logits; saved there, and converted back."""
    errors = spawn(in_another_layout, 4, folder)[0]
    assert max(errors.values()) < round_trip.LIMIT and set(errors) == set(CUT)
    assert spawn(one_process, 1, folder)[0] == {name: set() for name in CUT}


def test_norms_have_the_keys_of_transformer_engine_s_layers(converted, folder):
    """Where Megatron's specs for Transformer Engine keep them (gpt_layer_specs.py): in the linear layer behind, but for
    the norm before experts and latent attention's input. So what a CPU has written loads on a GPU."""
    keys = {}
    for name in ("glm4_moe", "deepseek_v3", "qwen3_next"):
        metadata = (folder / f"{name}.megatron/.metadata").read_bytes()
        keys[name] = {m.decode() for m in re.findall(rb"decoder\.layers\.[\w.]*norm[\w.]*weight", metadata)}
    layer = "decoder.layers.{}.".format
    assert {
        layer(0) + "self_attention.linear_qkv.layer_norm_weight",
        layer(0) + "mlp.linear_fc1.layer_norm_weight",
        layer(1) + "pre_mlp_layernorm.weight",
    } <= keys["glm4_moe"]
    assert {
        layer(1) + "input_layernorm.weight",
        layer(1) + "self_attention.linear_q_up_proj.layer_norm_weight",
        layer(1) + "self_attention.linear_kv_up_proj.layer_norm_weight",
    } <= keys["deepseek_v3"]
    assert {
        layer(0) + "self_attention.in_proj.layer_norm_weight",
        layer(0) + "self_attention.out_norm.weight",
        layer(1) + "mlp.linear_fc1.layer_norm_weight",
        layer(2) + "self_attention.linear_qkv.layer_norm_weight",
    } <= keys["qwen3_next"]


def refusals(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    good, other = folder / "qwen3_moe.megatron", folder / "mixtral"
    attempts = {
        "lacks": lambda: convert.to_megatron(folder / "lacks", folder / "new", None, False, quiet),
        "cut short": lambda: convert.to_megatron(folder / "cut short", folder / "new", None, False, quiet),
        "exists": lambda: convert.to_megatron(other, good, None, False, quiet),
        "other model": lambda: convert.to_hugging_face(good, folder / "new", None, False, quiet, other),
        "no config": lambda: convert.to_hugging_face(folder / "bare", folder / "new", None, False, quiet),
        "damaged": lambda: convert.to_hugging_face(folder / "damaged", folder / "new", None, False, quiet),
        "lost": lambda: convert.to_hugging_face(folder / "lost", folder / "new", None, False, quiet),
        "no index": lambda: convert.to_hugging_face(folder / "no index", folder / "new", None, False, quiet),
        "a bit": lambda: convert.to_hugging_face(folder / "a bit", folder / "new", None, False, quiet),
        "nowhere": lambda: convert.to_megatron(other, Path("/proc/nowhere"), None, False, quiet),
    }
    said = {}
    for name, attempt in attempts.items():
        with pytest.raises((ConversionError, CheckpointError, ConfigError)) as caught:
            attempt()
        said[name] = str(caught.value)
    return said


def test_what_cannot_be_converted_is_named_and_leaves_nothing(converted, folder):
    """The tensor that is missing is layer 3's, which would be read last."""
    for name in ("lacks", "cut short"):
        shutil.copytree(folder / "qwen3_moe", folder / name)
    lost = "model.layers.3.mlp.experts.3.down_proj.weight"
    state = load_file(folder / "lacks/model.safetensors")
    save_file({name: tensor for name, tensor in state.items() if name != lost}, folder / "lacks/model.safetensors")
    path = folder / "cut short/model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    shutil.copytree(folder / "qwen3_moe.megatron", folder / "bare", ignore=shutil.ignore_patterns("hf"))
    for name in ("damaged", "lost", "no index"):
        shutil.copytree(folder / "qwen3_moe.megatron", folder / name)
    os.truncate(folder / "damaged/__0_3.distcp", 1000)
    os.remove(folder / "lost/__0_3.distcp")
    os.truncate(folder / "no index/.metadata", 100)
    shutil.copytree(folder / "qwen3_moe.megatron", folder / "a bit")
    spoilt = folder / "a bit/__0_0.distcp"
    content = bytearray(spoilt.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of the embedding, which the first file begins with
    spoilt.write_bytes(content)
    said = spawn(refusals, 1, folder)[0]
    assert f"1 tensor ({lost}) missing" in said["lacks"]
    assert "cut short/model.safetensors: damaged or cut short" in said["cut short"]
    assert "exists already" in said["exists"]
    assert "left over, which the model of config.json does not have" in said["other model"]
    assert "bare/hf/config.json" in said["no config"] and "no such file" in said["no config"]
    for name in ("damaged", "lost", "no index"):
        assert name in said[name] and "damaged" in said[name]
    assert "1 tensor (model.embed_tokens.weight) not what was converted" in said["a bit"]
    assert "/proc/nowhere: cannot be written" in said["nowhere"]
    assert not (folder / "new").exists() and not list(folder.glob("*.unfinished"))


def test_the_command_line_goes_both_ways(folder, tmp_path):
    tool = [str(ROOT / "tools/convert_hf_to_megatron.py")]
    entry = ["-c", "import sys; from gspo_megatron.cli.main import main; sys.exit(main())", "convert"]
    for program, source, target in ((tool, folder / "mixtral", "m"), (entry, tmp_path / "m", "h")):
        argv = [sys.executable, *program, str(source), str(tmp_path / target)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"done: {tmp_path / target}"
    assert differences(folder / "mixtral", tmp_path / "h") == set()


def test_options_are_refused_before_anything_is_read(tmp_path):
    source = tmp_path / "source"

    def refused(*argv, direction=None) -> str:
        with pytest.raises(ConfigError) as caught:
            command.main([str(word) for word in argv], direction)
        return str(caught.value)

    assert "SOURCE" in refused(source, tmp_path / "t") and "no such folder" in refused(source, tmp_path / "t")
    source.mkdir()
    assert "has no config.json and no model.safetensors" in refused(source, tmp_path / "t")
    (source / "config.json").touch()
    (source / "model.safetensors").touch()
    message = refused(source, tmp_path / "t", direction="megatron_to_hf")
    assert "is a Hugging Face folder, not a Megatron checkpoint" in message
    assert "TARGET" in refused(source, tmp_path) and "exists already" in refused(source, tmp_path)
    assert "--max-shard-size = 0.0" in refused(source, tmp_path / "t", "--max-shard-size", "0")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "are quantised (fp8)"),
        ({"quant_method": "mxfp4"}, "are quantised (mxfp4)"),
        ({}, "are quantised (None)"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_it_is_converted(tmp_path, told, said):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"quantization_config": told}))
    for name in ("model.safetensors", "tokenizer.json"):
        (source / name).touch()
    with pytest.raises(ConfigError) as caught:
        command.main([str(source), str(target), "--verify", "one"])
    assert str(caught.value).startswith("--verify = ('one',): the weights of SOURCE") and said in str(caught.value)
    assert "where the checkpoint is converted back" in str(caught.value)
    (source / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer"):
        command.main([str(source), str(target), "--verify", "one"])
    (source / "metadata.json").touch()  # a Megatron checkpoint, whose folder hf has no tokenizer
    with pytest.raises(ConfigError, match="SOURCE = '.*source/hf': has no tokenizer"):
        command.main([str(source), str(target), "--verify", "one"])
    assert not target.exists()
