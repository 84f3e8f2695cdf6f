"""Megatron's distributed checkpoints, written and read tensor by tensor.

Megatron's own writers want all tensors at once. Here the model's matrices are allocated but never touched (the system
gives memory to a page when it is written): they tell shapes and places, and the numbers go from file to file
(shards.py). The checkpoint is an ordinary one: it loads under any layout. Where there are several ranks, each plans for
the whole model and writes its share.

Left out: a model that is cut over the ranks (sharded.py), and the optimizer.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as strategies
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from gspo_megatron.backend.checkpoint import files, index
from gspo_megatron.backend.checkpoint.shard_reader import ShardReader
from gspo_megatron.backend.checkpoint.shards import ShardWriter
from gspo_megatron.backend.model import parameters
from gspo_megatron.backend.model.builder import PackedModel
from gspo_megatron.backend.model.parameters import FullParameter
from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.backend.parallel.objects import gather_objects
from gspo_megatron.backend.parallel.topology import Topology
from gspo_megatron.errors import CheckpointError
from gspo_megatron.utils.file_writing import reported

OF_A_RUN = ("adam.", "critic.", "reference.")  # what sharded.py writes beside the policy's weights
EMBEDDING = "embedding.word_embeddings.weight"
FILE_BYTES = 2**28
Blocks = Callable[[FullParameter], list[torch.Tensor]]


def save(
    model: PackedModel,
    topology: Topology,
    folder: Path,
    blocks: Blocks,
    progress: Callable[[int, int], None],
    file_bytes: int = FILE_BYTES,
    share: Collection[str] | None = None,
) -> None:
    """Write the weights of a model to a folder that is there and empty. A collective over all ranks.

    Args:
        model: a bare chunk that is the whole model (model.bare), on every rank the same.
        blocks: the numbers of one parameter, as tensors that follow each other along the rows. What it raises goes
            through, on all ranks.
        progress: called with the number of parameters done and of all that this rank writes.
        file_bytes: about so many in a file.
        share: full names of the parameters that this rank writes; None: all of them.

    Raises:
        ConversionError: a file cannot be written, for example because the disk is full.
    """
    given = [p for p in stored(model, topology) if share is None or p.name in share]
    strategy = _StreamedSave(given, blocks, progress, file_bytes)
    state = model.sharded_state_dict()
    for entry in nested_values(state):
        if isinstance(entry, ShardedBase):
            # As the first data-parallel replica: each rank plans for the whole model, and writes its share of the plan.
            entry.replica_id = (*entry.replica_id[:-1], 0)
    is_alone = dist.get_world_size() == 1  # several ranks with all tensors are no access that Megatron finds valid
    dist_checkpointing.save({"model0": state}, str(folder), strategy, validate_access_integrity=is_alone)


class StoredWeights:
    """The policy's weights in a checkpoint.

    Raises:
        CheckpointError: a file is missing, damaged or cut short, or .metadata names what has no place there (index.py).
    """

    def __init__(self, folder: Path):
        files.check_format(folder)
        tensors = {key: stored for key, stored in index.read(folder).items() if not key.startswith(OF_A_RUN)}
        if EMBEDDING not in tensors:
            raise CheckpointError(f"{folder}: of no model that is known here, since it has no {EMBEDDING}.")
        self.dtype = tensors[EMBEDDING].dtype
        self.shapes = {key: stored.shape for key, stored in tensors.items()}  # full, by the checkpoint's own keys
        self._reader = ShardReader(folder, tensors)

    def load(
        self, model: PackedModel, topology: Topology, share: Collection[str] | None = None
    ) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Yield full tensors by full name, each as blocks that follow each other along the rows. A block is a view of
        its file where the checkpoint has it in one shard.

        Args:
            model: a bare chunk that is the whole model, of the checkpoint's type.
            share: names of those that are wanted; None: all of them.

        Raises:
            CheckpointError: a file is missing, damaged or cut short.
        """
        for parameter, parts in _parts(model, topology):
            if share is None or parameter.name in share:
                yield parameter.name, [self._reader.part(part) for part in parts]

    def types(self, model: PackedModel, topology: Topology) -> dict[str, torch.dtype]:
        """Return the type that each full tensor has in the checkpoint, by full name."""
        stored = self._reader.tensors
        return {parameter.name: stored[parts[0].key].dtype for parameter, parts in _parts(model, topology)}


def _parts(model: PackedModel, topology: Topology) -> Iterator[tuple[FullParameter, list[ShardedTensor]]]:
    """Each full tensor with its entries in a checkpoint: one, but a gate and up projection are two."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    sharded = model.sharded_state_dict()
    for parameter in stored(model, topology):
        entry = sharded[names[id(parameter.local)]]
        yield parameter, entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]


def retype(model: PackedModel, topology: Topology, types: Mapping[str, torch.dtype]) -> None:
    """Give a bare model's parameters and router biases these types, by full name; they are allocated and not filled.

    Megatron keeps what is alike in all layers as one tensor, which has one type: the one that holds them all.
    """
    keys = {parameter.name: parts[0].key for parameter, parts in _parts(model, topology)}
    widest: dict[str, torch.dtype] = {}
    for name, key in keys.items():
        widest[key] = torch.promote_types(types[name], widest.get(key, types[name]))
    for parameter in stored(model, topology):
        if parameter.local.dtype is not widest[keys[parameter.name]]:
            parameter.local.data = torch.empty_like(parameter.local, dtype=widest[keys[parameter.name]])


def wanted_shapes(model: PackedModel) -> dict[str, tuple[int, ...]]:
    """Return the full shapes that a checkpoint of this model has, by its own keys."""
    sharded, _ = save_preprocess({"model0": model.sharded_state_dict()}, validate_access_integrity=False)
    return {t.key: tuple(t.global_shape) for t in nested_values(sharded) if isinstance(t, ShardedTensor)}


def stored(model: PackedModel, topology: Topology) -> Iterator[FullParameter]:
    """Yield parameters and router biases."""
    yield from parameters.named(model, topology)
    yield from parameters.router_biases(model, topology)


class _StreamedSave(strategies.TorchDistSaveShardedStrategy):
    """As Megatron's strategy plans; but the numbers are asked for when they are written, parameter by parameter."""

    def __init__(
        self, given: list[FullParameter], blocks: Blocks, progress: Callable[[int, int], None], file_bytes: int
    ):
        super().__init__("torch_dist", 1)
        self._given, self._blocks, self._progress, self._file_bytes = given, blocks, progress, file_bytes

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        by_key, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        state = strategies.mcore_to_pyt_state_dict(by_key, False)
        planner = strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(state, is_coordinator=True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        with together(), reported(Path(checkpoint_dir)):
            results = self._write(plans[0].items, planner, Path(checkpoint_dir))
        everyone = gather_objects(results)
        with together(), reported(Path(checkpoint_dir)):
            if dist.get_rank() == 0:
                writer = FileSystemWriter(checkpoint_dir, thread_count=1)
                writer.set_up_storage_writer(True)
                writer.finish(metadata, everyone)

    def _write(self, items: list[WriteItem], planner: strategies.MCoreSavePlanner, folder: Path) -> list[WriteResult]:
        """This rank's parameters; the first rank also writes what is no tensor."""
        shards, results = ShardWriter(folder, self._file_bytes, dist.get_rank()), []
        by_parameter, others = self._items(items, planner)
        try:
            for done, (parameter, own) in enumerate(zip(self._given, by_parameter, strict=True), 1):
                blocks = [block.to(parameter.local.dtype).contiguous().flatten() for block in self._blocks(parameter)]
                for item in own:
                    view = planner.resolve_data(item)
                    start = view.storage_offset() - parameter.local.storage_offset()
                    numbers = _cut(blocks, start, start + view.numel())
                    results.append(shards.write(item.index, tuple(view.shape), numbers))
                self._progress(done, len(self._given))
            if dist.get_rank() == 0:
                results += [shards.write_item(item.index, planner.resolve_data(item)) for item in others]
            shards.finish()
        finally:
            shards.abandon()
        return results

    def _items(
        self, items: list[WriteItem], planner: strategies.MCoreSavePlanner
    ) -> tuple[list[list[WriteItem]], list[WriteItem]]:
        """The items of each parameter, whose memory they are views of, and those that are no tensors."""
        home = {p.local.untyped_storage().data_ptr(): place for place, p in enumerate(self._given)}
        found: list[list[WriteItem]] = [[] for _ in self._given]
        for item in items:
            if item.type is not WriteItemType.BYTE_IO:
                place = home.get(planner.lookup_object(item.index).untyped_storage().data_ptr())
                if place is not None:  # else another rank's
                    found[place].append(item)
        return found, [item for item in items if item.type is WriteItemType.BYTE_IO]


def _cut(blocks: list[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Numbers start to stop of flat blocks that follow each other."""
    found, first = [], 0
    for block in blocks:
        last = first + block.numel()
        if start < last and first < stop:
            found.append(block[max(start - first, 0) : min(stop, last) - first])
        first = last
    return found
