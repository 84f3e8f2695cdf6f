"""Several ranks convert one model: who does what, the same bytes as one process's, and errors on every rank."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import convert
from gspo_megatron.hf.hashes import FILE
from gspo_megatron.hf.partition import share
from gspo_megatron.models.operators import Piece, Rename
from gspo_megatron.models.table import Entry
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, differences, write_model

MODELS = ("qwen3_moe", "gpt_oss")  # an expert's tensors one by one, and stacked
RANKS = 3


def table(tensors: dict[str, tuple[str, ...]]) -> dict[str, Entry]:
    return {name: Entry(name, Rename, tuple(map(Piece, of))) for name, of in tensors.items()}


def test_shares_are_even_and_keep_together_what_one_tensor_gives():
    """Bytes 4 2 2 4 for two ranks: 4 + 2 and 2 + 4. Where the second and the third are made of tensor x, their middle
    is at byte 6 of 12, which is where the second share begins; where the first and the last are, everything is one."""
    sizes = dict(zip("abcd", (4, 2, 2, 4), strict=True))
    apart = table({"a": ("p",), "b": ("q",), "c": ("r",), "d": ("s", "t")})
    joined = table({"a": ("p",), "b": ("q", "x"), "c": ("x", "r"), "d": ("s",)})
    around = table({"a": ("x",), "b": ("q",), "c": ("r",), "d": ("x",)})
    assert [share(apart, sizes, rank, 2) for rank in range(2)] == [{"a", "b"}, {"c", "d"}]
    assert [share(joined, sizes, rank, 2) for rank in range(2)] == [{"a"}, {"b", "c", "d"}]
    assert [share(around, sizes, rank, 2) for rank in range(2)] == [set(), {"a", "b", "c", "d"}]
    late = table({"a": ("1",), "b": ("2",), "c": ("3",), "d": ("1",), "e": ("4",), "f": ("2",)})
    assert share(late, dict.fromkeys("abcdef", 1), 0, 2) in (set(), set("abcdef"))  # f joins b, which is with a and d
    assert [share(apart, sizes, rank, 5) for rank in range(5)] == [{"a"}, set(), {"b", "c"}, set(), {"d"}]


def quiet(done: int, total: int) -> None:
    assert 0 < done <= total


def both_ways(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """Conversions by all ranks of the test; then what each rank says to what cannot be converted."""
    for name in MODELS:
        convert.to_megatron(folder / name, folder / f"{name}.megatron", None, False, quiet, 100_000)
        convert.to_hugging_face(folder / f"{name}.megatron", folder / f"{name}.back", None, False, quiet, None, 100_000)
    attempts = {
        "lacks": lambda: convert.to_megatron(folder / "lacks", folder / "new", None, False, quiet),
        "nowhere": lambda: convert.to_megatron(folder / MODELS[0], Path("/proc/nowhere"), None, False, quiet),
        "spoilt": lambda: convert.to_hugging_face(folder / "spoilt", folder / "new", None, False, quiet),
    }
    said = {}
    for name, attempt in attempts.items():
        with pytest.raises(ConversionError) as caught:
            if name == "spoilt" and rank == 0:
                spoil(folder)
            dist.barrier()
            attempt()
        said[name] = str(caught.value)
    return said


def spoil(folder: Path) -> None:
    """A bit of the last rank's last file."""
    shutil.copytree(folder / f"{MODELS[0]}.megatron", folder / "spoilt")
    path = sorted((folder / "spoilt").glob(f"__{RANKS - 1}_*.distcp"))[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_several_ranks_write_what_one_process_does(tmp_path):
    """Bytes come back through 3 ranks, hashes are those of one process, every rank wrote files, and each error is the
    same on all ranks and leaves nothing behind."""
    for name in MODELS:
        write_model(tmp_path / name, TINY[name])
    shutil.copytree(tmp_path / MODELS[0], tmp_path / "lacks")
    state = load_file(tmp_path / "lacks/model.safetensors")
    state.popitem()
    save_file(state, tmp_path / "lacks/model.safetensors")
    said = spawn(both_ways, RANKS, tmp_path)
    for name in MODELS:
        assert differences(tmp_path / name, tmp_path / f"{name}.back") == set()
        files = {file.name.split("_")[2] for file in (tmp_path / f"{name}.megatron").glob("*.distcp")}
        assert files == {"0", "1", "2"}
        told = json.loads((tmp_path / f"{name}.back" / FILE).read_text())
        assert told == json.loads((tmp_path / f"{name}.megatron/hf" / FILE).read_text())
        one = tmp_path / f"{name}.one"
        spawn(alone, 1, tmp_path / name, one)
        assert told == json.loads((one / "hf" / FILE).read_text())
        assert differences(tmp_path / name, tmp_path / f"{name}.two") == set()
    assert said[0] == said[1] == said[2]
    assert "1 tensor" in said[0]["lacks"] and "missing" in said[0]["lacks"]
    assert "/proc/nowhere: cannot be written" in said[0]["nowhere"]
    assert "not what was converted" in said[0]["spoilt"]
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob("*.unfinished"))


def alone(rank: int, world_size: int, source: Path, target: Path) -> None:
    """By one process; and one process reads what several have written."""
    convert.to_megatron(source, target, None, False, quiet)
    convert.to_hugging_face(
        source.with_name(f"{source.name}.megatron"), source.with_name(f"{source.name}.two"), None, False, quiet
    )


def padded(rank: int, world_size: int, folder: Path) -> tuple[int, str]:
    """Two checkpoints whose embedding and LM head have more rows than config.json says."""
    for name in ("256", "odd"):
        convert.to_megatron(folder / name, folder / f"{name}.megatron", None, False, quiet)
        shutil.rmtree(folder / f"{name}.megatron/hf")
    left_out = convert.to_hugging_face(folder / "256.megatron", folder / "256.out", None, False, quiet, folder / "real")
    with pytest.raises(ConversionError) as caught:
        convert.to_hugging_face(folder / "odd.megatron", folder / "odd.out", None, False, quiet, folder / "real")
    return left_out, str(caught.value)


def test_rows_that_pad_the_vocabulary_are_left_out(tmp_path):
    """A vocabulary of 201 in a checkpoint with 256 rows, as Megatron pads it: 55 rows go, and the others are the first
    201 to the bit. 210 rows are no padding of 201 to a multiple of a power of two, and refused."""
    config = TINY["qwen3_moe"] | {"vocab_size": 201}
    (tmp_path / "real").mkdir()
    for name, rows in (("256", 256), ("odd", 210)):
        write_model(tmp_path / name, config | {"vocab_size": rows})
    told = json.loads((tmp_path / "256/config.json").read_text()) | {"vocab_size": 201}
    (tmp_path / "real/config.json").write_text(json.dumps(told))
    left_out, refused = spawn(padded, 1, tmp_path)[0]
    assert left_out == 55 and "has shape [210, " in refused and "makes it [201, " in refused
    source, out = load_file(tmp_path / "256/model.safetensors"), load_file(tmp_path / "256.out/model.safetensors")
    assert source.keys() == out.keys() and not os.path.exists(tmp_path / "odd.out")
    for name, tensor in source.items():
        assert torch.equal(out[name], tensor[:201] if tensor.shape[0] == 256 else tensor), name
