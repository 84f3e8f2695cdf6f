"""convert --verify: the same model has the same logits, and a tensor that differs is found."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gspo_megatron.cli import convert as command
from gspo_megatron.data.tokenizer import train_tokenizer
from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import convert, verify
from tools.validation.ranks import spawn
from tools.validation.round_trip import TINY, write_model

PROMPTS = ("one", "two words")


def compared(rank: int, world_size: int, folder: Path) -> tuple[list, str, str]:
    write_model(folder / "hf", TINY["qwen3_moe"] | {"vocab_size": 320})
    train_tokenizer(PROMPTS, 260).save_pretrained(folder / "hf")
    convert.to_megatron(folder / "hf", folder / "megatron", None, False, lambda done, total: None)
    found = verify.compare(folder / "hf", folder / "megatron", PROMPTS)
    shutil.copytree(folder / "hf", folder / "swapped")
    tensors = load_file(folder / "hf/model.safetensors")
    names = [f"model.layers.0.mlp.experts.{expert}.down_proj.weight" for expert in range(2)]
    tensors |= {names[0]: tensors[names[1]].clone(), names[1]: tensors[names[0]].clone()}
    save_file(tensors, folder / "swapped/model.safetensors", {"format": "pt"})
    options = command.Options(folder / "hf", folder / "megatron", verify=PROMPTS)
    with pytest.raises(ConversionError) as caught:
        command.verify(folder / "swapped", folder / "megatron", options)
    with pytest.raises(ConversionError) as longer:
        verify.compare(folder / "hf", folder / "megatron", ("one", "1" * 65))
    return found, str(caught.value), str(longer.value)


def test_the_same_model_agrees_and_swapped_experts_do_not(tmp_path):
    """fp32's rounding over four layers against two experts of one layer that trade places."""
    found, refused, longer = spawn(compared, 1, tmp_path)[0]
    assert [one.prompt for one in found] == list(PROMPTS)
    for one in found:
        assert one.tokens > 0 and one.same_choices and one.largest < 2e-5 * max(one.scale, 1)
    assert "megatron: its logits of 'one' differ from the source's by" in refused and "Do not use it" in refused
    assert "has 65 tokens, more than the model's max_position_embeddings 64" in longer
