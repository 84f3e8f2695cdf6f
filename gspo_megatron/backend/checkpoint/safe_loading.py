"""No code comes out of a checkpoint: what torch and Megatron read from it with pickle is looked through first.

torch reads a distributed checkpoint's `.metadata` with pickle.load, and its items that are no tensors with
torch.load(weights_only=False): either calls whatever the file names. check() unpickles both beforehand with loaders
that know the few types that belong there, and refuses a file that names anything else. Tensors and common.pt are read
with torch.load(weights_only=True) anyway.

Left out: a file that is exchanged between the check and the loading.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from gspo_megatron.errors import CheckpointError

METADATA = ".metadata"
TYPES = {
    "torch": {"Size"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
BROKEN = (
    EOFError,
    OSError,
    KeyError,
    ValueError,
    IndexError,
    AttributeError,
    TypeError,
    RuntimeError,
    ImportError,
    pickle.UnpicklingError,
)


class _Refused(Exception):
    """A pickle names something that has no place in a checkpoint."""


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the types of a distributed checkpoint's metadata, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        if name in TYPES.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise _Refused(f"{module}.{name}")


def check(folder: Path) -> Metadata:
    """Look through what torch would unpickle in a checkpoint. Returns what .metadata says.

    Raises:
        CheckpointError: a file names code, lies about where its parts are, or cannot be read.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise _Refused(f"a {type(metadata).__name__}")
        for index, place in metadata.storage_data.items():
            path = folder / place.relative_path
            if path.parent != folder:
                raise _Refused(f"the file {place.relative_path!r} outside of the folder")
            if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
                _check_item(path, place.offset, place.length, index.fqn)
        return metadata
    except _Refused as found:
        raise CheckpointError(
            f"{path}: refused, because it names {found}, which no checkpoint of this project holds: to load it could "
            "run code of whoever wrote it. Get the checkpoint from where you trust it."
        ) from None
    except BROKEN as error:
        raise CheckpointError(
            f"{path}: damaged or incomplete ({type(error).__name__}: {error}). Copy it again."
        ) from None


def _check_item(path: Path, offset: int, length: int, name: str) -> None:
    """An item that is no tensor, for example a layer's _extra_state."""
    with path.open("rb") as file:
        file.seek(offset)
        contents = file.read(length)
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # Transformer Engine's extra states are such buffers
            torch.load(io.BytesIO(contents), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _Refused(f"in {name!r} what torch.load does not take as plain data ({error})") from None
