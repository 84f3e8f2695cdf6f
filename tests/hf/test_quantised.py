"""FP8 and MXFP4 releases: numbers against plain loops in fp64, and a whole folder against its dequantised twin, in any
layout."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime, topology
from gspo_megatron.config import Layout, ModelConfig, TrainConfig
from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import convert
from gspo_megatron.hf.safetensors import SafetensorsFolder
from gspo_megatron.models.operators import Piece
from gspo_megatron.trainer.build import build_policy
from tests.backend.small import TP2_PP2_EP2, in_layouts
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, differences, write_model

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


@pytest.fixture(scope="module", params=["fp8", "mxfp4"])
def folders(request, tmp_path_factory) -> tuple[Path, Path]:
    """A release and its twin in bf16."""
    path = tmp_path_factory.mktemp(request.param)
    return deepseek(path) if request.param == "fp8" else gpt_oss(path)


def gpt_oss(path: Path) -> tuple[Path, Path]:
    """A tiny GPT-OSS as it is released: experts [experts, rows, blocks], in bytes."""
    sizes = {"hidden_size": 64, "intermediate_size": 32}
    write_model(path / "whole", TINY["gpt_oss"] | sizes, dtype=torch.bfloat16)
    config = json.loads((path / "whole/config.json").read_text())
    released, twin = {}, {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(path / "whole/model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = tensor.shape
            blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=generator)
            scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8, generator=generator)
            released[name + "_blocks"], released[name + "_scales"] = blocks, scales
            twin[name] = torch.stack([mxfp4(*expert) for expert in zip(blocks, scales, strict=True)])
        else:
            released[name] = twin[name] = tensor
    told = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
    released_config = config | {"quantization_config": told}
    return folder_of(path / "released", released, released_config), folder_of(path / "bf16", twin, config)


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[rows, b, 16] and [rows, b] -> [32 b, rows] bf16, number by number: sign, two bits of exponent with bias 1, one
    bit of mantissa, without exponent subnormal; times 2^(scale - 127)."""
    rows, count = scales.shape
    out = torch.empty(count * 32, rows, dtype=torch.float64)
    for row in range(rows):
        for column in range(count * 32):
            byte = int(blocks[row, column // 32, column % 32 // 2])
            code = byte >> 4 if column % 2 else byte & 15
            exponent, mantissa = code >> 1 & 3, code & 1
            value = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
            sign = -1.0 if code & 8 else 1.0
            out[column, row] = sign * value * 2.0 ** (int(scales[row, column // 32]) - 127)
    assert torch.equal(out.to(torch.bfloat16).double(), out)  # nothing is rounded
    return out.to(torch.bfloat16)


def deepseek(path: Path) -> tuple[Path, Path]:
    """A tiny DeepSeek-V3 as it is released, with a layer of MTP behind the last one."""
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


@pytest.mark.parametrize("kind", ["bytes", "named type"])
def test_exponents_as_factors(tmp_path, kind):
    """UE8M0: the byte e means 2^(e - 127). Four blocks of 1 x 2 with e = 125, 127, 130, 0, so factors 0.25, 1, 8 and
    2^-127; stored numbers 1.375 and -3, all of which bf16 holds."""
    stored = torch.tensor([[1.375, -3.0, 1.375, -3.0], [1.375, -3.0, 1.375, -3.0]])
    exponents = torch.tensor([[125, 127], [130, 0]], dtype=torch.uint8)
    if kind == "named type":
        exponents = exponents.view(torch.float8_e8m0fnu)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 2], "scale_fmt": "ue8m0"}}
    tensors = {"w": stored.to(torch.float8_e4m3fn), "w_scale_inv": exponents}
    files = SafetensorsFolder(folder_of(tmp_path, tensors, config))
    meant = [[0.34375, -0.75, 1.375, -3.0], [11.0, -24.0, 1.375 * 2.0**-127, -3 * 2.0**-127]]
    assert files.whole("w").double().tolist() == meant
    assert files.read(Piece("w"), 1, 1, 2).double().tolist() == [row[2:] for row in meant]


def test_factors_that_are_no_numbers_are_refused(tmp_path):
    """255 of UE8M0, in FP8 and in MXFP4; and types that hold no factors."""
    fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 2]}}
    weight, bad = torch.ones(1, 2).to(torch.float8_e4m3fn), torch.full((1, 1), 255, dtype=torch.uint8)
    files = SafetensorsFolder(folder_of(tmp_path / "fp8", {"w": weight, "w_scale_inv": bad}, fp8))
    with pytest.raises(ConversionError, match="w: a block's factor is no number"):
        files.whole("w")
    blocks = {"w_blocks": torch.ones(1, 1, 1, 16, dtype=torch.uint8), "w_scales": bad[None]}
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    files = SafetensorsFolder(folder_of(tmp_path / "mxfp4", blocks, config))
    with pytest.raises(ConversionError, match="w: a block's factor is no number"):
        files.read(Piece("w", expert=0, transposed=True))
    for dtype in (torch.int8, torch.int32, torch.float8_e5m2, torch.bool):
        tensors = {"w": weight, "w_scale_inv": torch.ones(1, 1).to(dtype)}
        files = SafetensorsFolder(folder_of(tmp_path / str(dtype), tensors, fp8))
        with pytest.raises(ConversionError, match="w_scale_inv of type"):
            files.whole("w")


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ([], "is a list"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "two numbers above 0"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "two numbers above 0"),
        ({"quant_method": "fp8", "weight_block_size": "128"}, "two numbers above 0"),
        ({"quant_method": "fp8", "weight_block_size": [1.5, 2]}, "two numbers above 0"),
    ],
)
def test_a_quantisation_that_makes_no_sense_is_named(tmp_path, told, said):
    with pytest.raises(ConversionError, match=said):
        SafetensorsFolder(folder_of(tmp_path, {"w": torch.ones(1)}, {"quantization_config": told}))


def test_parts_of_blocks_are_read(tmp_path):
    """MXFP4: 3 rows of 64 columns, cut by rows and by columns (8 of a block of 32), of the second of two experts."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 3, 2, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (2, 3, 2), dtype=torch.uint8, generator=generator)
    config = {"quantization_config": {"quant_method": "mxfp4"}}
    files = SafetensorsFolder(folder_of(tmp_path, {"w_blocks": blocks, "w_scales": scales}, config))
    assert files.names == {"w"} and files.shape("w") == (2, 64, 3) and files.dtype("w") is torch.bfloat16
    meant, piece = mxfp4(blocks[1], scales[1]).t(), Piece("w", expert=1, transposed=True)
    assert torch.equal(files.read(piece), meant)
    for rank in range(3):
        assert torch.equal(files.read(piece, 0, rank, 3), meant[rank : rank + 1])
    for rank in range(8):
        assert torch.equal(files.read(piece, 1, rank, 8), meant[:, 8 * rank : 8 * rank + 8])


def weights(layout: Layout, folder: Path) -> dict[str, torch.Tensor]:
    started, cut = runtime.init_process_group("cpu"), topology.initialize_model_parallel(layout, seed=1)
    model = ModelConfig(load_hf=folder, load_hf_drop_mtp=True, params_dtype="bf16")
    policy = build_policy(TrainConfig(parallel=layout, model=model), ModelShape.of_folder(folder), cut, started)
    return parameters.gather_full(policy.models, cut)


def both(rank: int, world_size: int, folders: tuple[Path, Path]) -> bool:
    fp8, bf16 = (in_layouts(rank, world_size, {"x": TP2_PP2_EP2}, weights, folder)["x"] for folder in folders)
    return fp8.keys() == bf16.keys() and all(torch.equal(fp8[name], bf16[name]) for name in bf16)


def test_ranks_read_their_slices(folders):
    """At TP2 x PP2 x EP2 the weights are the twin's, bit by bit; MTP is left out."""
    assert all(spawn(both, 4, folders))


def test_a_release_converts_to_what_its_twin_does(folders, tmp_path):
    """Through a Megatron checkpoint and out again: the twin's tensors to the bit, and a config without quantisation or
    layers of MTP."""
    spawn(there_and_back, 1, folders[0], tmp_path)
    assert differences(tmp_path / "out", folders[1]) == set()
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config and not config.get("num_nextn_predict_layers")


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


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t: t.pop("w_scales"), "w_blocks has no w_scales"),
        (lambda t: t.update(w_scales=torch.ones(2, 3, 3, dtype=torch.uint8)), r"w_scales U8 \[2, 3, 3\] are not"),
        (lambda t: t.update(w_blocks=torch.ones(2, 3, 2, 16)), r"w_blocks F32 \[2, 3, 2, 16\]"),
    ],
)
def test_blocks_that_do_not_fit_are_named(tmp_path, spoil, words):
    tensors = {
        "w_blocks": torch.ones(2, 3, 2, 16, dtype=torch.uint8),
        "w_scales": torch.ones(2, 3, 2, dtype=torch.uint8),
    }
    spoil(tensors)
    with pytest.raises(ConversionError, match=words):
        SafetensorsFolder(folder_of(tmp_path, tensors, {"quantization_config": {"quant_method": "mxfp4"}})).dtype("w")
