"""FP8 releases: numbers against plain loops in fp64, and a whole folder against its dequantised twin, in any layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.backend import parameters, runtime, topology
from gspo_megatron.backend.model import ModelShape
from gspo_megatron.backend.policy import Policy
from gspo_megatron.config import ModelConfig, ParallelConfig, TrainConfig
from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import convert
from gspo_megatron.hf.operators import Piece
from gspo_megatron.hf.round_trip import TINY, differences, write_model
from gspo_megatron.hf.safetensors import SafetensorsFolder
from tests.backend.small import TP2_PP2_EP2, in_layouts
from tests.distributed import spawn

BLOCK = (20, 16)  # divides hardly any of the model's sizes
QUANTISED = ("_proj.weight", "kv_a_proj_with_mqa.weight")  # as released: no embedding, norm, router or head


def folder_of(path: Path, tensors: dict[str, torch.Tensor], config: dict) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8 [r, c], factors fp32, what they stand for [r, c] bf16), number by number in fp64."""
    rows, columns = (-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    stored, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(weight.shape, dtype=torch.float64)
    factors = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            where = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            factors[i, j] = weight[where].abs().max() / 448
            stored[where] = (weight[where] / factors[i, j]).to(torch.float8_e4m3fn)
            meant[where] = stored[where].double() * factors[i, j].double()
    return stored, factors, meant.to(torch.bfloat16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny DeepSeek-V3 as it is released, with a layer of MTP behind the last one, and its twin in bf16."""
    path = tmp_path_factory.mktemp("fp8")
    write_model(path / "whole", TINY["deepseek_v3"], dtype=torch.bfloat16)
    config = json.loads((path / "whole/config.json").read_text())
    released, twin = {}, {}
    for name, tensor in load_file(path / "whole/model.safetensors").items():
        if name.endswith(QUANTISED):
            released[name], released[name + "_scale_inv"], twin[name] = quantise(tensor.float(), BLOCK)
        else:
            released[name] = twin[name] = tensor
    mtp = "model.layers.4.eh_proj.weight"
    released[mtp], released[mtp + "_scale_inv"], _ = quantise(torch.randn(48, 96), BLOCK)
    told = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    extra = {"quantization_config": told, "num_nextn_predict_layers": 1}
    return folder_of(path / "fp8", released, config | extra), folder_of(path / "bf16", twin, config)


def test_numbers_are_those_of_plain_loops(tmp_path):
    """5 x 7 in blocks of 2 x 3, so the last ones are ragged; whole, by rows and by columns."""
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 7)
    stored, factors, meant = quantise(weight, (2, 3))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 3]}}
    files = SafetensorsFolder(folder_of(tmp_path, {"w": stored, "w_scale_inv": factors, "n": torch.ones(3)}, config))
    assert files.names == {"w", "n"} and files.dtype("w") is torch.bfloat16 and files.dtype("n") is torch.float32
    assert torch.equal(files.whole("w"), meant)
    for rank in range(5):
        assert torch.equal(files.read(Piece("w"), 0, rank, 5), meant[rank : rank + 1])
    for rank in range(7):
        assert torch.equal(files.read(Piece("w"), 1, rank, 7), meant[:, rank : rank + 1])
    assert float((meant.double() - weight.double()).abs().max() / weight.abs().max()) < 0.07  # 3 bits of mantissa


def weights(layout: ParallelConfig, folder: Path) -> dict[str, torch.Tensor]:
    started, cut = runtime.start("cpu"), topology.start(layout, seed=1)
    model = ModelConfig(load_hf=folder, load_hf_drop_mtp=True, params_dtype="bf16")
    policy = Policy(TrainConfig(parallel=layout, model=model), ModelShape.of_folder(folder), cut, started)
    return parameters.gather_full(policy.models, cut)


def both(rank: int, world_size: int, folders: tuple[Path, Path]) -> bool:
    fp8, bf16 = (in_layouts(rank, world_size, {"x": TP2_PP2_EP2}, weights, folder)["x"] for folder in folders)
    return fp8.keys() == bf16.keys() and all(torch.equal(fp8[name], bf16[name]) for name in bf16)


def test_ranks_read_their_slices(folders):
    """At TP2 x PP2 x EP2 the weights are the twin's, bit by bit; MTP is left out."""
    assert all(spawn(both, 4, folders))


def test_a_release_converts_to_what_its_twin_does(folders, tmp_path):
    """Through a Megatron checkpoint and out again: the twin's tensors to the bit, and a config without quantisation."""
    spawn(there_and_back, 1, folders[0], tmp_path)
    assert differences(tmp_path / "out", folders[1]) == set()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and config["num_nextn_predict_layers"] == 0


def there_and_back(rank: int, world_size: int, source: Path, target: Path) -> None:
    torch.distributed.destroy_process_group()  # convert makes its own
    convert.to_megatron(source, target / "megatron", None, True, lambda done, total: None)
    convert.to_hugging_face(target / "megatron", target / "out", None, False, lambda done, total: None)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, c: t.pop("w_scale_inv"), "w is F8_E4M3 and has no w_scale_inv"),
        (lambda t, c: t.update(w_scale_inv=torch.ones(2, 2)), r"w_scale_inv has shape \[2, 2\], and blocks of 2 x 3"),
        (lambda t, c: c.update(quantization_config={"quant_method": "awq"}), "quant_method 'awq'"),
        (lambda t, c: c.clear(), "w has type F8_E4M3"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, spoil, words):
    tensors = {"w": torch.ones(4, 9).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(2, 3)}
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 3]}}
    spoil(tensors, config)
    with pytest.raises(ConversionError, match=words):
        SafetensorsFolder(folder_of(tmp_path, tensors, config)).dtype("w")
