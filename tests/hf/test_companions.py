"""What an export copies beside the weights: the whole tokenizer, with every chat template that it has."""

import torch

from gspo_megatron.data.tokenizer import load_tokenizer, train_tokenizer
from gspo_megatron.hf.export import write_companions, write_side
from gspo_megatron.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from gspo_megatron.models.operators import Piece

TEMPLATES = {"default": "PLAIN", "rag": "RAG", "tool_use": "TOOL"}


def test_named_chat_templates_come_along(tmp_path):
    """Into the hf/ of a checkpoint, from there into an exported folder, and both read back as what was saved."""
    tokenizer = train_tokenizer([], 320)
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    checkpoint = tmp_path / "step_000001"
    checkpoint.mkdir()
    write_side(checkpoint, {"model_type": "llama"}, [tmp_path / "tokenizer"], torch.float32)
    with SafetensorsWriter(tmp_path / "out", [TensorSpec("a", (1,), torch.float32)], 100) as writer:
        write_companions(writer.add, {"model_type": "llama"}, torch.float32, [checkpoint / "hf"])
        writer.write(Piece("a"), torch.zeros(1))
        writer.finish()
    for folder in (checkpoint / "hf", tmp_path / "out"):
        named = sorted(path.name for path in (folder / "additional_chat_templates").iterdir())
        assert named == ["rag.jinja", "tool_use.jinja"]
        assert load_tokenizer(folder).chat_template == TEMPLATES


def test_a_tokenizer_with_one_template_makes_no_folder_of_them(tmp_path):
    train_tokenizer([], 320).save_pretrained(tmp_path / "tokenizer")
    added: dict[str, bytes] = {}
    write_companions(added.__setitem__, {}, torch.float32, [tmp_path / "nowhere", tmp_path / "tokenizer"])
    assert added.keys() == {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
