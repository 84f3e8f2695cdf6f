"""Starts and ends the distributed runtime of one rank: device, process group, threads.

Left out: anything about how the world is cut into parallel groups (topology.py).
"""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel.rendezvous import fresh_store


@dataclass(frozen=True)
class Runtime:
    """Where this rank runs."""

    rank: int
    world_size: int
    device: torch.device
    backend: str  # nccl or gloo
    kernels: str  # which implementation of the transformer layers runs, for people to read

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def has_transformer_engine() -> bool:
    """Ask whether Transformer Engine can be imported (it cannot without CUDA)."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:  # its import fails in many ways where CUDA libraries are missing
        return False
    return True


TIMEOUT = timedelta(minutes=10)  # of every process group: a collective that waits longer ends its rank with an error


def init_process_group(device: str = "auto", is_alone: bool = False, timeout: timedelta = TIMEOUT) -> Runtime:
    """Join the process group that torchrun describes in the environment (one rank alone needs none).

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        is_alone: a group of this process and no other, whatever the environment says.
        timeout: a collective of all ranks that waits longer ends its rank with an error.
    """
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "0" if int(os.environ.get("WORLD_SIZE", "1")) == 1 else "29500")
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if is_alone:
        rank, world_size = 0, 1
    if use_cuda:
        torch_device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(torch_device)
    else:
        torch_device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    backend = "nccl" if use_cuda else "gloo"
    if not dist.is_initialized():
        # No device_id, as in Megatron-LM: with it NCCL would put all sends and receives of a group into one queue, and
        # the interleaved schedule relies on their independence.
        store = dist.HashStore() if is_alone else fresh_store(rank, world_size, TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    if not use_cuda:
        kernels = "Megatron local layers, PyTorch attention"
    elif has_transformer_engine():
        kernels = "Transformer Engine layers in bf16, Megatron local layers in fp32"
    else:
        kernels = "Megatron local layers, PyTorch attention (Transformer Engine not found)"
    return Runtime(dist.get_rank(), dist.get_world_size(), torch_device, backend, kernels)


def destroy_process_group() -> None:
    """Leave the process group; without it a Gloo worker sometimes aborts at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
