"""Writes the model chunks of all ranks as a Hugging Face folder that transformers loads.

Tensor by tensor: the ranks that hold its slices send them to rank 0, which writes them to their place. The folder
appears under its name when it is complete.

Left out: writing by several ranks at once, and a vocabulary that is padded.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist

from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.errors import ConversionError, GspoError
from gspo_megatron.hf.load import stored, whole_shape
from gspo_megatron.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from gspo_megatron.models import table as tables
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.operators import Piece

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_SIZE = 5 * 10**9
EXPERT_BIAS = "expert_bias"  # a router's, which Megatron keeps in fp32
SIDE = "hf"  # folder of a Megatron checkpoint with config.json, generation config and tokenizer
# What transformers needs beside weights and config.json, where the model came with it.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"  # one a file, for tools or documents


@dataclass(frozen=True)
class Held:
    """What every rank knows of a full tensor: its form, and who has which slice."""

    full_shape: tuple[int, ...]
    cut_dim: int | None
    dtype: torch.dtype
    owners: tuple[int, ...]  # global rank by slice


@torch.no_grad()
def export(
    models: Sequence[PackedModel],
    topology: Topology,
    folder: Path,
    hf: dict,
    arch: Architecture,
    dtype: torch.dtype | None = None,
    companions: Sequence[Path] = (),
    is_stacked: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `folder`, which must not exist. A collective over all ranks, and so is its error.

    Args:
        models: unwrapped chunks of this rank.
        hf: the model's config.json.
        dtype: of the weights; None: the parameters' own. Router biases are always fp32.
        companions: folders whose tokenizer and generation config are copied; the first that has a file gives it.
        is_stacked: write all experts of a layer as one tensor, as transformers holds them, not one tensor an expert.
        max_shard_size: bytes of one file.
        progress: called on rank 0 with the number of tensors done and of all.

    Raises:
        ConversionError: the folder exists, cannot be written, or the model has a parameter that the table lacks.
    """
    table = tables.entries(arch, is_stacked)
    mine = {tables.local_name(p.name): p for p in stored(models, topology)}
    held = _who_holds_what(mine)
    writer, error = None, None
    if dist.get_rank() == 0:
        try:
            check_complete(table, held, arch)
            written = specs(table, held, arch, dtype)
            writer = SafetensorsWriter(folder, written, max_shard_size)
            write_companions(writer.add, hf, written[0].dtype, companions)
        except GspoError as problem:
            error = problem
    try:
        raise_together(error)
        for done, name in enumerate(table, 1):
            for piece, full in _pieces(name, table[name], mine, held):
                if writer is not None and error is None:
                    # The others are still sending, so an error waits for them.
                    error = _problem(writer.write, piece, full)
            progress(done, len(table))
        if writer is not None and error is None:
            error = _problem(writer.finish)
        raise_together(error)
    finally:
        if writer is not None:
            writer.abandon()


@torch.no_grad()
def tensors(
    models: Sequence[PackedModel], topology: Topology, arch: Architecture, is_stacked: bool = False
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield each tensor of Hugging Face's form by its name: whole on rank 0, None elsewhere. A collective over all
    ranks, which every rank goes through to its end.

    Args:
        is_stacked: as in export().

    Raises:
        ConversionError: the model has a parameter that the table lacks, or lacks one. On every rank.
    """
    table = tables.entries(arch, is_stacked)
    mine = {tables.local_name(p.name): p for p in stored(models, topology)}
    held = _who_holds_what(mine)
    check_complete(table, held, arch)
    shapes = {spec.name: spec.shape for spec in specs(table, held, arch, None)}
    left = Counter(piece.tensor for entry in table.values() for piece in entry.pieces)
    begun: dict[str, torch.Tensor] = {}  # on rank 0
    for name, entry in table.items():
        for piece, full in _pieces(name, entry, mine, held):
            if full is not None:
                whole = begun.get(piece.tensor)
                begun[piece.tensor] = _placed(full, piece, whole, shapes[piece.tensor])
            left[piece.tensor] -= 1
            if left[piece.tensor] == 0:
                yield piece.tensor, begun.pop(piece.tensor, None)


def _placed(full: torch.Tensor, piece: Piece, whole: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    """Hugging Face's tensor with this piece in its place."""
    full = full.t() if piece.transposed else full
    if piece.expert is None and piece.count == piece.parts:
        return full
    whole = full.new_empty(shape) if whole is None else whole
    target = whole if piece.expert is None else whole[piece.expert]
    rows = target.size(0) // piece.parts
    target[piece.part * rows : (piece.part + piece.count) * rows] = full
    return whole


def _pieces(name: str, entry: tables.Entry, mine: dict, held: dict) -> Iterator[tuple[Piece, torch.Tensor | None]]:
    """The pieces of one full tensor, one after the other. A collective."""
    slices = entry.operator.split(mine[name].local.detach()) if name in mine else []
    for index, piece in enumerate(entry.pieces):
        shape = entry.operator.shapes(held[name].full_shape)[index]
        yield piece, _gather(slices[index] if slices else None, shape, held[name])


def _problem(action: Callable, *args) -> GspoError | None:
    try:
        action(*args)
    except GspoError as error:
        return error
    return None


def _who_holds_what(mine: dict) -> dict[str, Held]:
    """On every rank the same. Where replicas hold the same slice, the lowest rank has it."""
    own = {
        name: (p.cut_rank if p.cuts > 1 else 0, p.cuts, p.full_shape, p.cut_dim, p.local.dtype)
        for name, p in mine.items()
    }
    everyone = gather_objects(own)
    held: dict[str, Held] = {}
    for name in sorted({name for names in everyone for name in names}):
        holders = [(rank, names[name]) for rank, names in enumerate(everyone) if name in names]
        _, (_, cuts, shape, cut_dim, dtype) = holders[0]
        owners = tuple(min(rank for rank, form in holders if form[0] == cut) for cut in range(cuts))
        held[name] = Held(shape, cut_dim if cuts > 1 else None, dtype, owners)
    return held


def check_complete(table: dict, held: dict, arch: Architecture) -> None:
    """Raise ConversionError unless table and model have the same tensors."""
    if extra := held.keys() - table.keys():
        raise ConversionError(f"{tables.some(extra)} of the model: the table of {arch.family} does not have them.")
    if missing := table.keys() - held.keys():
        raise ConversionError(f"{tables.some(missing)} of the table of {arch.family} is on no rank.")


def specs(
    table: dict,
    held: dict,
    arch: Architecture,
    dtype: torch.dtype | None,
    before: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> list[TensorSpec]:
    """List Hugging Face's tensors in the table's order, of the announced type, else of the one that they had before,
    else of their own."""
    found: dict[str, TensorSpec] = {}
    for name, entry in table.items():
        own = held[name].dtype
        kind = own if dtype is None or name.endswith(EXPERT_BIAS) else dtype
        for piece, shape in zip(entry.pieces, entry.operator.shapes(held[name].full_shape), strict=True):
            found[piece.tensor] = TensorSpec(
                piece.tensor, whole_shape(piece, shape, arch), before.get(piece.tensor, kind)
            )
    return list(found.values())


def _gather(mine: torch.Tensor | None, shape: tuple[int, ...], held: Held) -> torch.Tensor | None:
    """The full piece on rank 0, None elsewhere. Every rank goes through the same pieces in the same order."""
    me = dist.get_rank()
    local = list(shape)
    if held.cut_dim is not None:
        local[held.cut_dim] //= len(held.owners)
    if me != 0:
        for owner in held.owners:
            if owner == me:
                assert mine is not None  # an owner has its slice
                dist.send(mine.contiguous(), 0)
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    slices: list[torch.Tensor] = []
    for owner in held.owners:
        if owner == 0:
            assert mine is not None  # an owner has its slice
            slices.append(mine)
        else:
            slices.append(torch.empty(local, dtype=held.dtype, device=device))
            dist.recv(slices[-1], owner)
    return slices[0] if held.cut_dim is None else torch.cat(slices, held.cut_dim)


def write_companions(
    add: Callable[[str, bytes], object], hf: dict, dtype: torch.dtype, companions: Sequence[Path]
) -> None:
    """Add config.json for these weights, and the companions' other small files: add(name, content)."""
    config = {name: value for name, value in hf.items() if name not in ("torch_dtype", "quantization_config")}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if config.get("num_nextn_predict_layers"):
        config["num_nextn_predict_layers"] = 0  # their tensors are not written
    add("config.json", (json.dumps(config, indent=2) + "\n").encode())
    named = {str(path.relative_to(folder)) for folder in companions for path in folder.glob(NAMED_TEMPLATES)}
    for name in (*COMPANIONS, *sorted(named)):
        if found := [folder / name for folder in companions if (folder / name).is_file()]:
            add(name, found[0].read_bytes())


def write_side(checkpoint: Path, hf: dict, companions: list[Path], dtype: torch.dtype) -> None:
    """Put config.json and what companions have of tokenizer and generation config into a checkpoint's hf/."""
    side = checkpoint / SIDE

    def add(name: str, content: bytes) -> None:
        (side / name).parent.mkdir(parents=True, exist_ok=True)
        (side / name).write_bytes(content)

    write_companions(add, hf, dtype, companions)
