"""Weights in Megatron's distributed checkpoint format, which loads under any other layout.

A checkpoint becomes visible by one rename, so a folder named step_NNNNNN is complete.
Left out: the optimizer, random states and the position in the data (resuming a run), and asynchronous saving.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing

from gspo_megatron.backend.policy import Policy
from gspo_megatron.errors import CheckpointError


def save(policy: Policy, folder: Path, add: Callable[[Path], None] = lambda unfinished: None) -> None:
    """Write the weights of all ranks to `folder`, which must not exist. A collective over all ranks.

    Args:
        add: puts further files into the folder that it is given. Called on rank 0, before the folder has its name.
    """
    unfinished = folder.with_name(folder.name + ".unfinished")
    if policy.runtime.is_main:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_sharded_state(policy), str(unfinished))
    dist.barrier()
    if policy.runtime.is_main:
        add(unfinished)
        os.rename(unfinished, folder)
    dist.barrier()


def load(policy: Policy, folder: Path) -> None:
    """Fill the model from a checkpoint saved under any layout. A collective over all ranks.

    Raises:
        CheckpointError: there is no complete checkpoint at `folder`.
    """
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(f"{folder}: no complete checkpoint. Give a folder named step_NNNNNN of a run.")
    state = dist_checkpointing.load(_sharded_state(policy), str(folder))
    for index, model in enumerate(policy.models):
        model.load_state_dict(state[f"model{index}"])
    if policy.optimizer is not None:
        policy.optimizer.reload_model_params()  # its fp32 master weights, where they are copies


def _sharded_state(policy: Policy) -> dict:
    return {f"model{index}": model.sharded_state_dict() for index, model in enumerate(policy.models)}
