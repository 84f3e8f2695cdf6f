"""Megatron's distributed checkpoints, written and read by one process a few tensors at a time.

Megatron's own writers want all tensors at once. Here the model's matrices are allocated but untouched (the system gives
memory to a page when it is written), and each is filled right before it is written and released right after. The
checkpoint is an ordinary one: it loads under any layout.

Left out: several processes (backend/checkpoint.py), and the optimizer.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as strategies
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from gspo_megatron.backend import parameters, safe_loading
from gspo_megatron.backend.model import PackedModel
from gspo_megatron.backend.parameters import FullParameter
from gspo_megatron.backend.topology import Topology
from gspo_megatron.errors import CheckpointError

OF_A_RUN = ("adam.", "critic.", "reference.")  # what checkpoint.py writes beside the policy's weights
UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, ValueError, UnpicklingError, CheckpointException,
              CheckpointingException)  # fmt: skip
GROUP_BYTES = 2**28  # of tensors that are held at once, and of a file


def save(
    model: PackedModel, topology: Topology, folder: Path, fill: Callable[[FullParameter], None],
    progress: Callable[[int, int], None], group_bytes: int = GROUP_BYTES,
) -> None:  # fmt: skip
    """Write the weights of a model in one process to a folder that is there and empty.

    Args:
        model: a bare chunk that is the whole model (model.bare).
        fill: puts the numbers into one parameter. What it raises goes through.
        progress: called with the number of parameters done and of all.
    """
    strategy = _StreamedSave(list(stored(model, topology)), fill, progress, group_bytes)
    dist_checkpointing.save({"model0": model.sharded_state_dict()}, str(folder), strategy)


def load(
    model: PackedModel, topology: Topology, folder: Path, group_bytes: int = GROUP_BYTES
) -> Iterator[tuple[str, torch.Tensor]]:
    """All full tensors of a checkpoint by full name; each is valid until the next one is asked for.

    The checkpoint has one tensor of all experts of a layer, and Megatron reads a tensor whole or not at all: so many
    bytes are held even where group_bytes is less.

    Args:
        model: a bare chunk that is the whole model, of the checkpoint's type.

    Raises:
        CheckpointError: a file is missing, damaged or cut short, or names code (safe_loading.py).
    """
    safe_loading.check(folder)
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    sharded = model.sharded_state_dict()
    by_key: dict[str, list[FullParameter]] = {}
    for parameter in stored(model, topology):
        by_key.setdefault(sharded[names[id(parameter.local)]].key, []).append(parameter)
    for units in _groups(list(by_key.values()), group_bytes):
        sharded = model.sharded_state_dict()
        wanted = {names[id(p.local)]: p for unit in units for p in unit}
        part = {"model0": {name: sharded[name] for name in wanted}}
        with _readable(folder):
            found = dist_checkpointing.load(part, str(folder))["model0"]
        for name, parameter in wanted.items():
            yield parameter.name, found[name].view(parameter.full_shape)
            # Megatron's records hold the tensors until garbage is collected, so the memory itself is given back.
            old = (found[name].untyped_storage(), parameter.local.untyped_storage())
            parameter.local.data = parameter.local.new_empty(1).expand(parameter.local.shape)
            for storage in old:
                storage.resize_(0)
        _trim()


def stored_dtype(folder: Path) -> torch.dtype:
    """Of a checkpoint's weights."""
    safe_loading.check(folder)
    with _readable(folder):
        return dist_checkpointing.load_tensors_metadata(str(folder))["embedding.word_embeddings.weight"].dtype


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Full shapes of the policy's weights in a checkpoint, by its own keys."""
    safe_loading.check(folder)
    with _readable(folder):
        found = dist_checkpointing.load_tensors_metadata(str(folder))
    return {key: tuple(t.global_shape) for key, t in found.items() if not key.startswith(OF_A_RUN)}


def wanted_shapes(model: PackedModel) -> dict[str, tuple[int, ...]]:
    """Full shapes that a checkpoint of this model has, by its own keys."""
    sharded, _ = save_preprocess({"model0": model.sharded_state_dict()}, validate_access_integrity=False)
    return {t.key: tuple(t.global_shape) for t in nested_values(sharded) if isinstance(t, ShardedTensor)}


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """CheckpointError for what reading a damaged checkpoint raises: its file is in the reason, where it is known."""
    try:
        yield
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: damaged, incomplete, or of no model that is known here ({reason[:200]}). Copy it again."
        ) from error


def _trim() -> None:
    """Hand freed memory back: glibc keeps it in pieces that the next group does not fit into, and grows."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def stored(model: PackedModel, topology: Topology) -> Iterator[FullParameter]:
    """Parameters and router biases."""
    yield from parameters.named(model, topology)
    yield from parameters.router_biases(model, topology)


def _groups(units: list[list[FullParameter]], limit: int) -> list[list[list[FullParameter]]]:
    groups: list[list[list[FullParameter]]] = [[]]
    size = 0
    for unit in units:
        room = sum(parameter.local.nbytes for parameter in unit)
        if groups[-1] and size + room > limit:
            groups.append([])
            size = 0
        groups[-1].append(unit)
        size += room
    return groups


class _StreamedSave(strategies.TorchDistSaveShardedStrategy):
    """As Megatron's strategy plans and writes; but each group of parameters is one plan, and is there while written."""

    def __init__(
        self, given: list[FullParameter], fill: Callable[[FullParameter], None], progress: Callable[[int, int], None],
        group_bytes: int,
    ):  # fmt: skip
        super().__init__("torch_dist", 1)
        self._given, self._fill, self._progress, self._group_bytes = given, fill, progress, group_bytes

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        by_key, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        state = strategies.mcore_to_pyt_state_dict(by_key, False)
        planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(state, is_coordinator=True)
        writer = FileSystemWriter(checkpoint_dir, thread_count=1)
        writer.set_up_storage_writer(True)
        groups = [[p for unit in g for p in unit] for g in _groups([[p] for p in self._given], self._group_bytes)]
        plans, metadata = planner.create_global_plan(self._plans(groups, planner.create_local_plan().items, planner))
        plans = writer.prepare_global_plan(plans)
        results, done = [], 0
        for group, plan in zip([*groups, []], plans, strict=True):
            for parameter in group:
                self._fill(parameter)
            results.append(writer.write_data(plan, planner).wait())
            for parameter in group:
                parameter.local.untyped_storage().resize_(0)  # the plan still has views of it
            _trim()
            done += len(group)
            self._progress(done, len(self._given))
        writer.finish(metadata, results)

    def _plans(self, groups: list[list[FullParameter]], items: list[WriteItem], planner: object) -> list[SavePlan]:
        """One plan a group, and a last one for what is no parameter's."""
        home = {p.local.untyped_storage().data_ptr(): n for n, group in enumerate(groups) for p in group}
        sorted_items: list[list[WriteItem]] = [[] for _ in range(len(groups) + 1)]
        for item in items:
            value = planner.lookup_object(item.index)
            place = value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None
            sorted_items[home.get(place, len(groups))].append(item)
        return [SavePlan(group) for group in sorted_items]
