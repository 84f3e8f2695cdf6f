"""Converts whole folders in one process: a Hugging Face folder to a Megatron checkpoint, and back.

The model is never whole in memory: a tensor is mapped, merged or split where needed, and written (streaming.py).
Both sides are written aside and get their name when they are complete.

A checkpoint made here, or by a run, has config.json and tokenizer in its folder hf/, so that it can be converted back.

Left out: reading slices on several machines. verify.py compares logits, upcycle.py makes experts of a dense model.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from gspo_megatron.backend import model as model_builder
from gspo_megatron.backend import runtime as runtimes
from gspo_megatron.backend import streaming
from gspo_megatron.backend import topology as topologies
from gspo_megatron.backend.model import ModelShape, PackedModel
from gspo_megatron.backend.topology import Topology
from gspo_megatron.config import ModelConfig, ParallelConfig
from gspo_megatron.errors import ConversionError
from gspo_megatron.hf import export, table
from gspo_megatron.hf.hashes import FILE, TensorHashes, compare, content
from gspo_megatron.hf.load import check_tied_head, pieces_of
from gspo_megatron.hf.safetensors import NAMES, SafetensorsFolder
from gspo_megatron.hf.safetensors_writer import SafetensorsWriter
from gspo_megatron.model_file import read_json

Progress = Callable[[int, int], None]
Shape = tuple[int, ...]
ONE = ParallelConfig(1, 1, None, 1, 1)


def to_megatron(
    source: Path, target: Path, dtype: torch.dtype | None, drop_mtp: bool, progress: Progress,
    file_bytes: int = streaming.FILE_BYTES,
) -> None:  # fmt: skip
    """Write a Hugging Face folder as a Megatron checkpoint, which loads under any layout.

    Args:
        source: has config.json, and safetensors files with an index or alone.
        target: must not exist.
        dtype: of the weights; None: that of the source's embedding. Router biases stay fp32.
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
    dtype = dtype or files.dtype(entries[streaming.EMBEDDING].pieces[0].tensor)
    filled: set[str] = set()

    def from_source(parameter: streaming.FullParameter) -> list[torch.Tensor]:
        pieces = pieces_of(parameter, entries.get(parameter.name), files, arch)
        pieces = [piece.to(parameter.local.dtype) for piece in pieces]
        entry = entries[parameter.name]
        for piece, tensor in zip(entry.pieces, pieces, strict=True):
            hashes.add(piece, (tensor.t() if piece.transposed else tensor).contiguous())
        filled.add(parameter.name)
        return entry.operator.blocks(pieces)

    hashes = TensorHashes()
    with one_process_model(shape, dtype) as (model, topology), _written_aside(target) as folder:
        with torch.no_grad():
            streaming.save(model, topology, folder, from_source, progress, file_bytes)
        if forgotten := entries.keys() - filled:
            raise ConversionError(f"{source}: {table.some(forgotten)} of the table is no parameter of the model.")
        export.write_side(folder, shape.hf, [source], dtype)
        (folder / export.SIDE / FILE).write_bytes(content(hashes.finish()))


def to_hugging_face(
    source: Path, target: Path, dtype: torch.dtype | None, is_stacked: bool, progress: Progress,
    hf_config: Path | None = None, max_shard_size: int = export.MAX_SHARD_SIZE,
) -> None:  # fmt: skip
    """Write a Megatron checkpoint of any layout as a Hugging Face folder that transformers loads.

    Args:
        source: a complete checkpoint (step_NNNNNN of a run, or of to_megatron).
        target: must not exist.
        dtype: of the weights; None: the checkpoint's. Router biases stay fp32.
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
    with one_process_model(shape, weights.dtype) as (model, topology):
        _check_stored(source, weights.shapes, streaming.wanted_shapes(model))
        forms = {p.name: p for p in streaming.stored(model, topology)}
        held = {name: export.Held(p.full_shape, None, p.local.dtype, (0,)) for name, p in forms.items()}
        export.check_complete(entries, held, arch)
        specs = export.specs(entries, held, arch, dtype)
        hashes = TensorHashes()
        with SafetensorsWriter(target, specs, max_shard_size) as writer, torch.no_grad():
            export.write_companions(writer.add, shape.hf, specs[0].dtype, [side])
            for done, (name, blocks) in enumerate(weights.load(model, topology), 1):
                entry = entries[name]
                for piece, tensor in zip(entry.pieces, entry.operator.from_blocks(blocks), strict=True):
                    hashes.add(piece, writer.write(piece, tensor))
                progress(done, len(entries))
            compare(written := hashes.finish(), source / export.SIDE)
            writer.add(FILE, content(written))
            writer.finish()


def _check_absent(target: Path) -> None:
    if target.exists():
        raise ConversionError(f"{target}: exists already. Give another folder, or remove it.")


def _shape(folder: Path, field: str) -> ModelShape:
    hf = read_json(folder / "config.json", field)
    shape = ModelShape(hf, hf.get("vocab_size"))
    model_builder.architecture(hf, f"{field} = {str(folder / 'config.json')!r}")
    return shape


def _check_stored(source: Path, stored: dict[str, Shape], wanted: dict[str, Shape]) -> None:
    """Every tensor of the checkpoint is one of the model, of the same full shape, and none is missing."""
    if extra := stored.keys() - wanted.keys():
        raise ConversionError(f"{source}: {table.some(extra)} left over, which the model of config.json does not have.")
    if missing := wanted.keys() - stored.keys():
        raise ConversionError(f"{source}: {table.some(missing)} missing, which the model of config.json has.")
    for key, shape in wanted.items():
        if stored[key] != shape:
            raise ConversionError(
                f"{source}: {key} has shape {list(stored[key])}, and config.json makes it {list(shape)}. Give the "
                "config.json of this model."
            )


@contextmanager
def one_process_model(shape: ModelShape, dtype: torch.dtype) -> Iterator[tuple[PackedModel, Topology]]:
    """The whole model, allocated and not filled, in a process group of this process alone."""
    if dtype not in NAMES:
        raise ConversionError(f"{dtype} is not supported. Give one of: {', '.join(map(str, NAMES))}.")
    runtime = runtimes.start("cpu")
    topology = topologies.start(ONE, seed=0)
    try:
        yield model_builder.bare(shape, ModelConfig(), topology, runtime, dtype)[0], topology
    finally:
        topologies.stop()
        runtimes.stop()


@contextmanager
def _written_aside(target: Path) -> Iterator[Path]:
    """An empty folder beside the target, which takes its name at the end and is removed after an error."""
    unfinished = target.with_name(target.name + ".unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        os.rename(unfinished, target)
    except OSError as error:
        raise ConversionError(
            f"{target}: cannot be written, {error.strerror or error}. Nothing was left behind."
        ) from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
