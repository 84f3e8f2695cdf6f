"""Converts whole folders: a Hugging Face folder to a Megatron checkpoint, and back.

The model is never whole in memory: a tensor is mapped, merged or split where needed, and written (streaming.py).
Both sides are written aside and get their name when they are complete. Under torchrun each rank does a share of the
tensors, on one file system: everything here is then a collective over all ranks, and so are its errors.

A checkpoint made here, or by a run, has config.json and tokenizer in its folder hf/, so that it can be converted back.

verify.py compares logits, upcycle.py makes experts of a dense model.
"""

import functools
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from gspo_megatron.backend.checkpoint import streaming
from gspo_megatron.backend.model import builder as model_builder
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.model.shape import ModelShape
from gspo_megatron.backend.parallel import runtime as runtimes
from gspo_megatron.backend.parallel import topology as topologies
from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.config import Layout, ModelConfig
from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import export, partition
from gspo_megatron.hf.hashes import FILE, TensorHashes, compare, content, recorded
from gspo_megatron.hf.load import check_tied_head, pieces_of
from gspo_megatron.hf.safetensors import NAMES, SafetensorsFolder
from gspo_megatron.hf.safetensors_writer import SafetensorsWriter, TensorSpec
from gspo_megatron.models import table
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.families import architecture
from gspo_megatron.recipe.hf_config import read_json
from gspo_megatron.utils import halves
from gspo_megatron.utils.file_writing import reported

Progress = Callable[[int, int], None]
Shape = tuple[int, ...]
PADDED = (streaming.EMBEDDING, "output_layer.weight")
PATIENCE = timedelta(days=1)  # ranks meet at the end of their shares; torchrun ends those that wait for a dead one
POWERS = 14  # Megatron's 128 times a tensor parallel size of up to 64
ONE = Layout()


def to_megatron(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    drop_mtp: bool,
    progress: Progress,
    file_bytes: int = streaming.FILE_BYTES,
) -> None:
    """Write a Hugging Face folder as a Megatron checkpoint, which loads under any layout.

    Args:
        source: has config.json, and safetensors files with an index or alone.
        target: must not exist.
        dtype: of the weights; None: each has the type that it has in the source, and what Megatron merges of several
            types the one that holds them all. Router biases are fp32.
        drop_mtp: leave out layers that predict further tokens.

    Raises:
        ConfigError: config.json is missing or of a model that is not supported.
        ConversionError: names the tensor or file that is missing, left over, damaged or cannot be written.
    """
    _check_absent(target)
    shape = _shape(source, "SOURCE")
    files = SafetensorsFolder(source)
    arch = shape.architecture
    entries = table.match(arch, files.names, drop_mtp, str(source))
    check_tied_head(files, arch)
    of_model = dtype or files.dtype(entries[streaming.EMBEDDING].pieces[0].tensor)

    def from_source(parameter: streaming.FullParameter) -> list[torch.Tensor]:
        pieces = pieces_of(parameter, entries.get(parameter.name), files, arch)
        entry = entries[parameter.name]
        if dtype is not None:
            pieces = [piece.to(parameter.local.dtype) for piece in pieces]
        for piece, tensor in zip(entry.pieces, pieces, strict=True):
            hashes.add(piece, (tensor.t() if piece.transposed else tensor).contiguous())
        return entry.operator.blocks([piece.to(parameter.local.dtype) for piece in pieces])

    hashes = TensorHashes()
    with whole_model(shape, of_model) as (model, topology), _written_aside(target) as folder, torch.no_grad():
        if dtype is None:
            streaming.retype(model, topology, {name: _type_of(entry, files) for name, entry in entries.items()})
        share = _share(entries, _held(entries, model, topology, arch))
        streaming.save(model, topology, folder, from_source, progress, file_bytes, share)
        found = _of_all(hashes.finish())
        with together(), reported(target):
            if dist.get_rank() == 0:
                export.write_side(folder, shape.hf, [source], of_model)
                (folder / export.SIDE / FILE).write_bytes(content(found))


def to_hugging_face(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    is_stacked: bool,
    progress: Progress,
    hf_config: Path | None = None,
    max_shard_size: int = export.MAX_SHARD_SIZE,
) -> int:
    """Write a Megatron checkpoint of any layout as a Hugging Face folder that transformers loads.

    Returns how many rows were left out that padded the vocabulary.

    Args:
        source: a complete checkpoint (step_NNNNNN of a run, or of to_megatron).
        target: must not exist.
        dtype: of the weights; None: each has the type that it had before its conversion to this checkpoint, else the
            one that it has there. Router biases are fp32 otherwise.
        is_stacked: all experts of a layer in one tensor.
        hf_config: a folder with config.json and tokenizer; None: the checkpoint's own (source/hf).
        max_shard_size: bytes of one safetensors file.

    Raises:
        ConfigError: config.json is missing or of a model that is not supported.
        CheckpointError: a file of the checkpoint is missing, damaged or cut short.
        ConversionError: the checkpoint is of another model or not what was converted, or the folder cannot be written.
    """
    _check_absent(target)
    if not (source / "metadata.json").is_file():
        raise ConversionError(f"{source}: no complete Megatron checkpoint. Give a folder named step_NNNNNN of a run.")
    side = hf_config or source / export.SIDE
    shape = _shape(side, "--hf-config" if hf_config else "SOURCE")
    weights = streaming.StoredWeights(source)
    arch = shape.architecture
    entries = table.entries(arch, is_stacked)
    with whole_model(shape, weights.dtype) as (model, topology), torch.no_grad():
        padding = _check_stored(source, weights.shapes, streaming.wanted_shapes(model))
        streaming.retype(model, topology, weights.types(model, topology))
        held = _held(entries, model, topology, arch)
        told = recorded(source / export.SIDE)
        before = {name: one.dtype for name, one in told.items()} if dtype is None else {}
        specs = export.specs(entries, held, arch, dtype, before)
        share = _share(entries, held)
        tensors = {piece.tensor for name in share for piece in entries[name].pieces}
        hashes = TensorHashes()
        with _shared_writer(target, specs, max_shard_size, tensors) as writer:
            with together():
                for done, (name, blocks) in enumerate(weights.load(model, topology, share), 1):
                    entry = entries[name]
                    for piece, tensor in zip(entry.pieces, entry.operator.from_blocks(blocks), strict=True):
                        hashes.add(piece, writer.write(piece, tensor))
                    progress(done, len(share))
                compare(written := hashes.finish(), told, source / export.SIDE)
                writer.complete()
            found = _of_all(written)
            with together():
                if dist.get_rank() == 0:
                    export.write_companions(writer.add, shape.hf, specs[0].dtype, [side])
                    writer.add(FILE, content(found))
                    writer.make_visible()
    return padding


def _type_of(entry: table.Entry, files: SafetensorsFolder) -> torch.dtype:
    """The type that holds the numbers of all pieces. Router biases: fp32, as Megatron keeps them."""
    types = [files.dtype(piece.tensor) for piece in entry.pieces]
    types += [torch.float32] if entry.name.endswith(export.EXPERT_BIAS) else []
    return functools.reduce(torch.promote_types, types)


def _held(
    entries: dict[str, table.Entry], model: PackedModel, topology: Topology, arch: Architecture
) -> dict[str, export.Held]:
    """Form of each full tensor. Raises ConversionError unless the table and the model have the same."""
    forms = streaming.stored(model, topology)
    held = {p.name: export.Held(p.full_shape, None, p.local.dtype, (0,)) for p in forms}
    export.check_complete(entries, held, arch)
    return held


def _share(entries: dict[str, table.Entry], held: dict[str, export.Held]) -> set[str]:
    """Full names of the parameters that this rank converts."""
    sizes = {name: math.prod(form.full_shape) * form.dtype.itemsize for name, form in held.items()}
    return partition.share(entries, sizes, dist.get_rank(), dist.get_world_size())


def _of_all(found: dict) -> dict:
    """What all ranks found, by name."""
    return {name: value for name, value in sorted(pair for each in gather_objects(found) for pair in each.items())}


@contextmanager
def _shared_writer(
    target: Path, specs: list[TensorSpec], max_shard_size: int, tensors: set[str]
) -> Iterator[SafetensorsWriter]:
    """One folder that all ranks write into: the first one makes its files, then the others open them."""
    rank, writer = dist.get_rank(), None
    try:
        for is_turn in (rank == 0, rank > 0):
            with together():
                writer = SafetensorsWriter(target, specs, max_shard_size, tensors, rank == 0) if is_turn else writer
        assert writer is not None  # each rank had its turn
        yield writer
    finally:
        if writer is not None:
            writer.abandon()  # after publish() there is nothing left to remove


def _check_absent(target: Path) -> None:
    if target.exists():
        raise ConversionError(f"{target}: exists already. Give another folder, or remove it.")


def _shape(folder: Path, field: str) -> ModelShape:
    hf = read_json(folder / "config.json", field)
    architecture(hf, f"{field} = {str(folder / 'config.json')!r}")  # refuses what is not built here
    return ModelShape(hf, hf["vocab_size"])


def _check_stored(source: Path, stored: dict[str, Shape], wanted: dict[str, Shape]) -> int:
    """Every tensor of the checkpoint is one of the model, of the same full shape, and none is missing; but embedding
    and LM head may have more rows, as Megatron pads a vocabulary. Returns how many more."""
    if extra := stored.keys() - wanted.keys():
        raise ConversionError(f"{source}: {table.some(extra)} left over, which the model of config.json does not have.")
    if missing := wanted.keys() - stored.keys():
        raise ConversionError(f"{source}: {table.some(missing)} missing, which the model of config.json has.")
    padding = 0
    for key, shape in wanted.items():
        if key in PADDED and stored[key][1:] == shape[1:] and _is_padded(stored[key][0], shape[0]):
            padding = stored[key][0] - shape[0]
        elif stored[key] != shape:
            raise ConversionError(
                f"{source}: {key} has shape {list(stored[key])}, and config.json makes it {list(shape)}. Give the "
                "config.json of this model."
            )
    return padding


def _is_padded(rows: int, vocabulary: int) -> bool:
    """Megatron rounds a vocabulary up to a multiple of make_vocab_size_divisible_by (128) times the tensor size."""
    return any(rows == -(-vocabulary // 2**power) * 2**power for power in range(POWERS))


@contextmanager
def whole_model(
    shape: ModelShape, dtype: torch.dtype, is_alone: bool = False
) -> Iterator[tuple[PackedModel, Topology]]:
    """Build the whole model on every rank of the launcher, allocated and not filled.

    Args:
        is_alone: in this process and no other, whatever the launcher says.
    """
    if dtype not in NAMES:
        raise ConversionError(f"{dtype} is not supported. Give one of: {', '.join(map(str, NAMES))}.")
    is_ours = not dist.is_initialized()
    gc.freeze()  # what the imports have made is no garbage,
    gc.disable()  # and neither is what planning makes; looking for some took a tenth of the time
    runtime = runtimes.init_process_group("cpu", is_alone, PATIENCE)
    topology = topologies.initialize_model_parallel(ONE, seed=0)
    try:
        yield model_builder.bare(shape, ModelConfig(), topology, runtime, dtype)[0], topology
    finally:
        gc.enable()
        gc.unfreeze()
        topologies.destroy_model_parallel()
        if is_ours:
            runtimes.destroy_process_group()


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, which takes its name at the end and is removed after an error."""
    unfinished, is_main = target.with_name(target.name + ".unfinished"), dist.get_rank() == 0
    try:
        with together(), reported(target):
            if is_main:
                halves.begin(unfinished)
        with reported(target):  # what Megatron writes beside the tensors
            yield unfinished
        with together(), reported(target):
            if is_main:
                halves.publish(unfinished, target)
    finally:
        if is_main:
            halves.discard(unfinished)
