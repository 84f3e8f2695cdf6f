"""Process groups come and go without a trace."""

import os

import torch
import torch.distributed as dist

from gspo_megatron.backend.parallel import topology
from gspo_megatron.config import Layout
from tools.validation.ranks import spawn


def threads_after(rank: int, world_size: int, layouts: list[Layout]) -> list[int]:
    """Threads of this process after it has been through each layout."""
    counts = []
    for layout in layouts:
        started = topology.initialize_model_parallel(layout, seed=1)
        dist.all_reduce(torch.ones(1), group=started.tp_group)  # Gloo starts some threads on first use
        del started
        topology.destroy_model_parallel()
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


def test_a_layout_leaves_no_threads_behind():
    """Each layout has some fifteen groups with two threads or more; Megatron alone would leave them all."""
    layouts = [Layout(2, 1, None, 1, 1), Layout(1, 2, None, 1, 1), Layout(1, 1, None, 2, 1)]
    for counts in spawn(threads_after, 2, layouts):
        assert max(counts) <= counts[0]
