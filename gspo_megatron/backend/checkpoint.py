"""Checkpoints in Megatron's distributed format: weights and Adam's state of every network, whole or not there at all.

A checkpoint is written beside its place, gets a manifest with the size and SHA-256 of each file, and becomes visible by
one rename: a folder named step_NNNNNN is complete, and a file that changed afterwards is found. It loads under any
other layout, because every tensor in it has the name and the place that it has in the whole model.

Left out: random states (nothing here draws from one: each draw is seeded by the run's seed and its step), asynchronous
saving, and a defence against checkpoints made to do harm (torch reads their metadata with pickle: load only your own).
"""

import hashlib
import json
import os
import queue
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from gspo_megatron.backend import optimizer_state
from gspo_megatron.backend.agreement import raise_together
from gspo_megatron.backend.network import Network
from gspo_megatron.backend.optimizer_state import ParameterState
from gspo_megatron.backend.reference import FrozenReference
from gspo_megatron.errors import CheckpointError

MANIFEST = "manifest.json"
CHUNK = 1 << 24


def save(
    networks: Mapping[str, Network], folder: Path, progress: dict | None = None,
    reference: FrozenReference | None = None, add: Callable[[Path], None] = lambda unfinished: None,
) -> None:  # fmt: skip
    """Write everything to `folder`, in place of what may be there. A collective over all ranks.

    Args:
        networks: by the prefix of their tensors' names: "" the policy, "critic." PPO's critic. The state of those with
            an optimizer goes with them.
        progress: numbers and words that load() gives back (JSON).
        reference: its weights, where the run has one.
        add: puts further files into the folder that it is given. Called on rank 0, before the folder has its name.
    """
    unfinished, is_main = folder.with_name(folder.name + ".unfinished"), dist.get_rank() == 0
    if is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    if filesystem_async._results_queue is None:
        # Megatron would start a server process for this queue, which asynchronous saving needs. Here both its ends are
        # in this process; and the server outlives a rank that is killed, with 270 MB.
        filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(_sharded(networks, reference, ParameterState.read), str(unfinished))
    counters = {prefix: _counters(network) for prefix, network in networks.items() if network.optimizer}
    if is_main:
        (unfinished / "progress.json").write_text(json.dumps({"counters": counters, "progress": progress or {}}))
        add(unfinished)
    dist.barrier()
    files = _digests(unfinished)
    if is_main:
        (unfinished / MANIFEST).write_text(json.dumps(files, indent=1))
        _to_disk(unfinished / MANIFEST)
        old = folder.with_name(folder.name + ".old.unfinished")
        if folder.exists():  # a spoiled one, which the run did not go on from
            os.rename(folder, old)
        os.rename(unfinished, folder)
        _to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


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
    state = dist_checkpointing.load(_sharded(networks, reference, ParameterState.room), str(folder))
    for prefix, network in networks.items():
        _load_weights(network, state, prefix)
        if network.optimizer:
            steps, scheduled = counters[prefix]
            for number, place in enumerate(optimizer_state.each(network.optimizer)):
                place.write(state[f"{prefix}optimizer"][str(number)], steps)
            optimizer_state.set_steps(network.optimizer, steps)
            network.schedule.num_steps = 0
            network.schedule.step(increment=scheduled)
    if reference:
        reference.load([state["reference"][str(i)] for i in range(len(reference.weights))])


def load_weights(network: Network, folder: Path) -> None:
    """Fill the model alone, from a checkpoint saved under any layout. A collective over all ranks.

    Raises:
        CheckpointError: there is no complete checkpoint at `folder`.
    """
    if not (folder / "metadata.json").is_file():
        raise _incomplete(folder)
    _load_weights(network, dist_checkpointing.load(_weights(network, ""), str(folder)), "")


def read_progress(folder: Path, part: str = "progress") -> dict:
    """What save() was told of the run's place. Raises CheckpointError where there is no complete checkpoint."""
    try:
        return json.loads((folder / "progress.json").read_text())[part]
    except (OSError, ValueError, KeyError):
        raise _incomplete(folder) from None


def _incomplete(folder: Path) -> CheckpointError:
    return CheckpointError(f"{folder}: no complete checkpoint. Give a folder named step_NNNNNN of a run.")


def verify(folder: Path) -> None:
    """Compare every file with the manifest; the ranks share the work. A collective over all ranks.

    Raises:
        CheckpointError: a file is missing, shorter or changed: on every rank, with its name.
    """
    problem = None
    try:
        wanted = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        wanted, problem = {}, f"{folder / MANIFEST}: cannot be read ({error})"
    for name in _my_share(wanted):
        size, digest = wanted[name]
        path = folder / name
        if not path.is_file():
            problem = f"{path}: missing"
        elif path.stat().st_size != size:
            problem = f"{path}: has {path.stat().st_size} bytes, and {size} were written"
        elif _sha256(path) != digest:
            problem = f"{path}: its contents changed after it was written (SHA-256 differs)"
    raise_together(CheckpointError(problem) if problem else None)


# ---- What is in it ----


def _sharded(
    networks: Mapping[str, Network], reference: FrozenReference | None,
    tensors: Callable[[ParameterState], dict[str, torch.Tensor]],
) -> dict:  # fmt: skip
    """This rank's part of everything, each tensor with its place in the whole. `tensors`: of Adam's state, filled to be
    saved or with room to load into."""
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


def _weights(network: Network, prefix: str) -> dict:
    return {f"{prefix}model{i}": model.sharded_state_dict(prefix=prefix) for i, model in enumerate(network.models)}


def _by_parameter(weights: dict) -> dict[int, object]:
    """id of a parameter -> its sharded tensor."""
    sharded, _ = extract_sharded_tensors_and_factories(weights)
    return {id(tensor.data): tensor for tensor in nested_values(sharded)}


def _load_weights(network: Network, state: dict, prefix: str) -> None:
    for index, model in enumerate(network.models):
        weights = state[f"{prefix}model{index}"]
        model.load_state_dict({name.removeprefix(prefix): value for name, value in weights.items()})
    if network.optimizer:
        network.optimizer.reload_model_params()  # its fp32 master weights, where they are copies


def _counters(network: Network) -> tuple[int, int]:
    """(Adam's steps, the learning-rate schedule's)."""
    return optimizer_state.steps_made(network.optimizer), int(network.schedule.num_steps)


# ---- Files ----


def _digests(folder: Path) -> dict[str, tuple[int, str]]:
    """name -> (bytes, SHA-256) of every file, on every rank; each is on its disk afterwards. A collective."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    mine = {}
    for name in _my_share(names):
        _to_disk(folder / name)
        mine[name] = ((folder / name).stat().st_size, _sha256(folder / name))
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found = {name: entry for part in everyone for name, entry in part.items()}
    return {name: found[name] for name in sorted(found)}


def _my_share(names) -> list[str]:
    return sorted(names)[dist.get_rank() :: dist.get_world_size()]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _to_disk(path: Path) -> None:
    """Written through to the disk: without it a machine that loses power could keep the rename and not the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
