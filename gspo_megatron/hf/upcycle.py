"""Sparse upcycling (arXiv 2212.05055): a dense model's folder to that of a MoE whose experts are copies of its layers.

Every expert starts as the dense layer's feed-forward, and the weights of the chosen experts add up to 1, so the MoE
computes what the dense model computes, whatever its router chooses. The router starts from small random numbers. With
noise the experts differ from the start, and the function is no longer exactly the same.

One tensor is in memory at a time. Left out: experts that are parts of the dense layer (fine-grained upcycling), layers
that stay dense, and shared experts.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import export
from gspo_megatron.hf.load import check_tied_head
from gspo_megatron.hf.safetensors import SafetensorsFolder
from gspo_megatron.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from gspo_megatron.models import table
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.families import architecture
from gspo_megatron.models.operators import Piece
from gspo_megatron.recipe.hf_config import read_json

EXPERT = re.compile(r"experts\.\d+\.")
ROUTER = ".mlp.router.weight"
# The family with experts whose layers are otherwise those of the dense one, and what its config says besides.
SPARSE: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
    "qwen3": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True,
              "decoder_sparse_step": 1, "mlp_only_layers": []},
}  # fmt: skip
COUNT = {"llama": "num_local_experts", "qwen3": "num_experts"}


# Of these the two families' classes have different defaults, so what the dense one means is written down.
WRITTEN = ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "initializer_range")


def sparse_config(hf: dict, dense: Architecture, num_experts: int, experts_per_token: int) -> dict:
    """Make the MoE's config.json.

    Args:
        hf: the dense model's.
        dense: what that means.

    Raises:
        ConversionError: its family has no relative with experts here.
    """
    family = hf.get("model_type")
    if family not in SPARSE:
        raise ConversionError(f"SOURCE: model_type {family!r} cannot be upcycled. Give one of: {', '.join(SPARSE)}.")
    config = (
        {"rope_theta": dense.rope_theta}
        | hf
        | {name: getattr(dense, name) for name in WRITTEN}
        | SPARSE[family]
        | {
            COUNT[family]: num_experts,
            "num_experts_per_tok": experts_per_token,
            "router_aux_loss_coef": 0.0,
            "output_router_logits": False,
        }
    )
    if family == "qwen3":
        config["moe_intermediate_size"] = hf["intermediate_size"]
    return config


def upcycle(
    source: Path,
    target: Path,
    num_experts: int,
    experts_per_token: int,
    noise: float,
    seed: int,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
    max_shard_size: int = export.MAX_SHARD_SIZE,
) -> None:
    """Write the MoE of a dense Hugging Face folder; `target` appears when it is complete.

    Args:
        source: has config.json and safetensors files.
        noise: standard deviation of what is added to each expert's weights, as a share of the tensor's own.
        dtype: of the weights; None: the source's.
        progress: called with the number of tensors done and of all.

    Raises:
        ConfigError: config.json is missing, or of a model that is not supported.
        ConversionError: the family cannot be upcycled, a tensor is missing or left over, or the disk is full.
    """
    hf = read_json(source / "config.json", "SOURCE")
    dense = architecture(hf, f"SOURCE = {str(source / 'config.json')!r}")
    config = sparse_config(hf, dense, num_experts, experts_per_token)
    sparse = architecture(config, "the model with experts")
    files = SafetensorsFolder(source)
    sources = table.match(dense, files.names, False, str(source))
    check_tied_head(files, dense)
    specs = _specs(sparse, sources, files, dtype)
    entries = table.entries(sparse)
    with SafetensorsWriter(target, specs, max_shard_size) as writer, torch.no_grad():
        export.write_companions(writer.add, config, specs[0].dtype, [source])
        for done, (name, entry) in enumerate(entries.items(), 1):
            if name.endswith(ROUTER):
                shape = (num_experts, sparse.hidden_size)
                writer.write(entry.pieces[0], _normal(shape, sparse.initializer_range, seed, entry.pieces[0]))
            else:
                for piece, dense_piece in zip(entry.pieces, sources[EXPERT.sub("", name)].pieces, strict=True):
                    tensor = files.read(dense_piece)
                    if noise and EXPERT.search(name):
                        wide = tensor.float()
                        tensor = wide + _normal(wide.shape, noise * float(wide.std()), seed, piece)
                    writer.write(piece, tensor)
            progress(done, len(entries))
        writer.finish()


def _specs(
    sparse: Architecture, sources: dict, files: SafetensorsFolder, dtype: torch.dtype | None
) -> list[TensorSpec]:
    """The MoE's tensors; each has the type of what it is made of, a router that of the embedding."""
    own = files.dtype(sources["embedding.word_embeddings.weight"].pieces[0].tensor)
    found: list[TensorSpec] = []
    shape: tuple[int, ...]
    for name, entry in table.entries(sparse).items():
        if name.endswith(ROUTER):
            shape = (sparse.num_experts, sparse.hidden_size)
            found.append(TensorSpec(entry.pieces[0].tensor, shape, dtype or own))
            continue
        for piece, dense_piece in zip(entry.pieces, sources[EXPERT.sub("", name)].pieces, strict=True):
            shape, kind = files.shape(dense_piece.tensor), dtype or files.dtype(dense_piece.tensor)
            found.append(TensorSpec(piece.tensor, shape, kind))
    return found


def _normal(shape: tuple[int, ...], std: float, seed: int, piece: Piece) -> torch.Tensor:
    """fp32 numbers that depend on (seed, name) alone."""
    digest = hashlib.sha256(f"{seed}/{piece.tensor}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.normal(0.0, std, tuple(shape), generator=generator)
