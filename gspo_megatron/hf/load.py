"""Fills model chunks from a Hugging Face folder, in any layout: each rank reads only the slices that it holds.

Checked before anything is read: every tensor of the folder is used once, none is missing, shapes and types fit
(table.py, safetensors.py). After it: every tensor of the model was filled on some rank.

Left out: multi-token-prediction layers (refused or dropped), a vocabulary that is padded.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.model.parameters import FullParameter
from gspo_megatron.backend.parallel.collective_errors import raise_together
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.errors import ConversionError, GspoError
from gspo_megatron.hf.safetensors import SafetensorsFolder
from gspo_megatron.models import table as tables
from gspo_megatron.models.architecture import Architecture
from gspo_megatron.models.operators import Piece

EMBEDDING = "model.embed_tokens.weight"
ROWS_AT_ONCE = 4096


@torch.no_grad()
def load(
    models: Sequence[PackedModel], topology: Topology, folder: Path, arch: Architecture, drop_mtp: bool = False
) -> None:
    """Fill the unwrapped chunks of every rank. A collective over all ranks, and so is its error.

    Numbers are cast to the parameters' type; router biases stay fp32. A folder in one type may be rounded so, as the
    recipe says; what a folder keeps in a wider type than its embedding is not, because whoever made it needed that.

    Raises:
        ConversionError: names the tensor or the file that is missing, left over, damaged, of another shape or type, or
            would be rounded.
    """
    error, filled, rounded = None, {}, set()
    try:
        files = SafetensorsFolder(folder)
        table = tables.match(arch, files.names, drop_mtp, str(folder))
        for parameter in stored(models, topology):
            name = tables.local_name(parameter.name)
            fill(parameter, table.get(name), files, arch)
            filled[name] = True
            rounded |= _rounded(parameter, table[name], files)
        if rounded:
            raise ConversionError(
                f"{folder}: {tables.some(rounded)} of a wider type than the embedding, and model.params_dtype would "
                "round the numbers (Megatron holds all weights but router biases in that type). Give "
                "--model.params-dtype fp32."
            )
        if topology.is_first_stage:
            check_tied_head(files, arch)
    except GspoError as problem:
        error = problem
    raise_together(error)
    if forgotten := table.keys() - {name for names in gather_objects(list(filled)) for name in names}:
        raise ConversionError(f"{folder}: {tables.some(forgotten)} of the table is no parameter of any rank's model.")


def stored(models: Sequence[PackedModel], topology: Topology) -> list[FullParameter]:
    """List what a Hugging Face folder holds of this rank: parameters and router biases."""
    return [
        p for model in models for find in (parameters.named, parameters.router_biases) for p in find(model, topology)
    ]


def fill(parameter: FullParameter, entry: tables.Entry | None, files: SafetensorsFolder, arch: Architecture) -> None:
    """Read one local parameter's slices, merge and copy them."""
    pieces = pieces_of(parameter, entry, files, arch)
    assert entry is not None  # else refused by pieces_of
    parameter.local.copy_(entry.operator.merge(pieces))


def _rounded(parameter: FullParameter, entry: tables.Entry, files: SafetensorsFolder) -> set[str]:
    """Tensors of a wider type than the embedding whose numbers this local parameter's type does not hold."""
    usual, own, found = files.dtype(EMBEDDING), parameter.local.dtype, set()
    for piece in entry.pieces:
        kind = files.dtype(piece.tensor)
        if torch.promote_types(kind, usual) is not usual and torch.promote_types(kind, own) is not own:
            numbers = files.read(piece, parameter.cut_dim, parameter.cut_rank, parameter.cuts)
            found |= set() if torch.equal(numbers.to(own).to(kind), numbers) else {piece.tensor}
    return found


def pieces_of(
    parameter: FullParameter, entry: tables.Entry | None, files: SafetensorsFolder, arch: Architecture
) -> list[torch.Tensor]:
    """Read one local parameter's slices, in the order in which they are merged."""
    if entry is None:
        raise ConversionError(f"{parameter.name}: the table of {arch.family} does not say what it is made of.")
    for piece, shape in zip(entry.pieces, entry.operator.shapes(parameter.full_shape), strict=True):
        check_shape(piece, shape, files, arch)
    cut = (parameter.cut_dim, parameter.cut_rank, parameter.cuts)
    return [files.read(piece, *cut) for piece in entry.pieces]


def check_shape(piece: Piece, shape: tuple[int, ...], files: SafetensorsFolder, arch: Architecture) -> None:
    """Raise ConversionError unless the stored tensor has the shape that its pieces make up, and a float type."""
    expected = whole_shape(piece, shape, arch)
    found = files.shape(piece.tensor)
    if found != expected:
        raise ConversionError(
            f"{files.folder}: {piece.tensor} has shape {list(found)}, and config.json makes it {list(expected)}. "
            "Correct config.json (for a field that it leaves out, transformers' own value is taken), or download the "
            "folder again."
        )
    files.dtype(piece.tensor)


def whole_shape(piece: Piece, shape: tuple[int, ...], arch: Architecture) -> tuple[int, ...]:
    """Return the shape of the tensor that a piece of this shape is taken of."""
    whole = (shape[0] * piece.parts // piece.count, *shape[1:])
    whole = whole[::-1] if piece.transposed else whole
    return whole if piece.expert is None else (arch.num_experts, *whole)


def check_tied_head(files: SafetensorsFolder, arch: Architecture) -> None:
    """Compare the LM head, which a tied model's folder may hold as well, with the embedding, bit for bit."""
    if not arch.tied or "lm_head.weight" not in files.names:
        return
    head, embedding = Piece("lm_head.weight"), Piece(EMBEDDING)
    rows = files.shape(head.tensor)[0]
    same = files.shape(head.tensor) == files.shape(embedding.tensor) and files.dtype(head.tensor) == files.dtype(
        embedding.tensor
    )
    cuts = next(n for n in range(-(-rows // ROWS_AT_ONCE), rows + 1) if rows % n == 0)
    for number in range(cuts if same else 0):
        same = same and torch.equal(files.read(head, 0, number, cuts), files.read(embedding, 0, number, cuts))
    if not same:
        raise ConversionError(
            f"{files.folder}: lm_head.weight differs from model.embed_tokens.weight, and config.json says that they "
            "are tied. Set tie_word_embeddings to false there."
        )
