"""What a checkpoint holds, and loading one: weights and Adam's state of every network, as Megatron stores them.

It loads under any other layout, because every tensor in it has the name and the place that it has in the whole model.
How one is written is saver.py, its files and their manifest files.py. It is read without Megatron's and torch's own
loaders, which unpickle what they find (index.py, shard_reader.py).

Left out: random states (nothing here draws from one: each draw is seeded by the run's seed and its step), and rollouts:
a checkpoint is of the end of a step, and the steps after it are made again, the same to the bit.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from gspo_megatron.backend.checkpoint import files, index, optimizer_state
from gspo_megatron.backend.checkpoint.optimizer_state import ParameterState
from gspo_megatron.backend.checkpoint.shard_reader import ShardReader
from gspo_megatron.backend.engine.network import Network
from gspo_megatron.backend.engine.reference import FrozenReference
from gspo_megatron.backend.parallel.collective_errors import together
from gspo_megatron.errors import CheckpointError
from gspo_megatron.utils import plain_json


@torch.no_grad()
def load(networks: Mapping[str, Network], folder: Path, reference: FrozenReference | None = None) -> None:
    """Fill networks, their optimizers and schedules, and the reference, from a checkpoint saved under any layout.

    A collective over all ranks. The networks must have fresh optimizers.

    Raises:
        CheckpointError: there is no complete checkpoint at `folder`, or it lacks what is asked for.
    """
    counters = read_progress(folder, "counters")
    for prefix, network in networks.items():
        if network.optimizer and prefix not in counters:
            raise CheckpointError(
                f"{folder}: has no optimizer state of {prefix or 'policy'}: the run was of another kind."
            )
    state = _filled(sharded(networks, reference, ParameterState.room), folder)
    for prefix, network in networks.items():
        _load_weights(network, state, prefix)
        if network.optimizer:
            optimizer, schedule = network.training
            steps, scheduled = counters[prefix]
            for number, place in enumerate(optimizer_state.each(optimizer)):
                place.write(state[f"{prefix}optimizer"][str(number)], steps)
            optimizer_state.set_steps(optimizer, steps)
            schedule.num_steps = 0
            schedule.step(increment=scheduled)
    if reference:
        reference.load([state["reference"][str(i)] for i in range(len(reference.weights))])


def load_weights(network: Network, folder: Path) -> None:
    """Fill the model alone, from a checkpoint saved under any layout. A collective over all ranks.

    Raises:
        CheckpointError: there is no complete checkpoint at `folder`.
    """
    if not (folder / "metadata.json").is_file():
        raise _incomplete(folder)
    _load_weights(network, _filled(_weights(network, ""), folder), "")


def read_progress(folder: Path, part: str = "progress") -> dict:
    """Read what Saver.begin() was told of the run's place. Raises CheckpointError without a complete checkpoint."""
    try:
        found = plain_json.read_object(folder / "progress.json").get(part)
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise _incomplete(folder)
    return found


def _incomplete(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: no complete checkpoint. Give a folder named step_NNNNNN of a run.")


def _filled(state: dict, folder: Path) -> dict:
    """Return the state with each sharded tensor's numbers in its place. A collective.

    What is no tensor (layers' _extra_state, which says something in FP8 training alone) stays as the model has it.
    """

    def fill(entry: object) -> object:
        if isinstance(entry, ShardedTensorFactory):  # a gate and up projection
            return entry.merge_fn(dict_list_map_outplace(fill, entry.build()))
        if isinstance(entry, ShardedTensor):
            return reader.part(entry).to(entry.data.device, entry.dtype)
        return entry.data if isinstance(entry, ShardedObject) else entry

    with together():
        files.check_format(folder)
        reader = ShardReader(folder, index.read(folder))
        return dict_list_map_outplace(fill, state)


# ---- What is in it ----


def sharded(
    networks: Mapping[str, Network],
    reference: FrozenReference | None,
    tensors: Callable[[ParameterState], dict[str, torch.Tensor]],
) -> dict:
    """Return this rank's part of everything, each tensor with its place in the whole. `tensors`: of Adam's state,
    filled to be saved or with room to load into."""
    state: dict = {}
    places: dict[int, object] = {}  # id of a parameter -> its sharded tensor
    for prefix, network in networks.items():
        weights = _weights(network, prefix)
        state |= weights
        places |= _by_parameter(weights)
        if network.optimizer:
            state[f"{prefix}optimizer"] = {
                str(number): {
                    name: make_sharded_optimizer_tensor(places[id(one.model)], value, f"{prefix}adam.{name}")
                    for name, value in tensors(one).items()
                }
                for number, one in enumerate(optimizer_state.each(network.optimizer))
            }
    if reference:
        pairs = zip(reference.parameters, reference.weights, strict=True)
        state["reference"] = {
            str(number): make_sharded_optimizer_tensor(places[id(parameter)], weight, "reference")
            for number, (parameter, weight) in enumerate(pairs)
        }
    return state


def bytes_written(state: dict) -> int:
    """Count the bytes that this rank writes of what sharded() gave: one of a tensor's replicas does."""
    tensors, _ = extract_sharded_tensors_and_factories(state)
    return sum(one.data.nbytes for one in nested_values(tensors) if is_main_replica(one.replica_id))


def _weights(network: Network, prefix: str) -> dict:
    return {f"{prefix}model{i}": model.sharded_state_dict(prefix=prefix) for i, model in enumerate(network.models)}


def _by_parameter(weights: dict) -> dict[int, object]:
    """id of a parameter -> its sharded tensor."""
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    return {id(tensor.data): tensor for tensor in nested_values(sharded)}


def _load_weights(network: Network, state: dict, prefix: str) -> None:
    for number, model in enumerate(network.models):
        weights = state[f"{prefix}model{number}"]
        model.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
    if network.optimizer:
        network.optimizer.reload_model_params()  # its fp32 master weights, where they are copies


def counters_of(network: Network) -> tuple[int, int]:
    """Return (Adam's steps, the learning-rate schedule's)."""
    optimizer, schedule = network.training
    return optimizer_state.steps_made(optimizer), int(schedule.num_steps)
