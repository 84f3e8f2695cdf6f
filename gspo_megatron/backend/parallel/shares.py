"""Tokens that are cut over the tensor ranks of a replica, and sums over these, in generation.

No gradient goes through: training has Megatron's own mappings.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from gspo_megatron.backend.parallel.topology import Topology


def tokens_of_share(count: int, topology: Topology) -> int:
    """Return how many of `count` tokens a tensor rank's share has, with those that fill it up."""
    return -(-max(count, 1) // topology.tp_size)


def place_of_share(size: int, topology: Topology) -> slice:
    """Return where this tensor rank's tokens are, where each rank's share has `size` of them."""
    return slice(topology.tp_rank * size, (topology.tp_rank + 1) * size)


def share_of(x: torch.Tensor, topology: Topology, size: int) -> torch.Tensor:
    """Return this tensor rank's share of [T, H], where each has `size` tokens; the last are filled up with zeros."""
    return F.pad(x, (0, 0, 0, size * topology.tp_size - x.size(0)))[place_of_share(size, topology)]


def summed(x: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Sum over tensor ranks, in place. The same bits on all of them."""
    if topology.tp_size > 1 and x.numel():
        dist.all_reduce(x, group=topology.tp_group)
    return x


def gathered(share: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Join the shares of all tensor ranks: [n, ...] -> [TP * n, ...]."""
    return share if topology.tp_size == 1 else gathered_over(share, topology.tp_group)


def gathered_over(share: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Join what the ranks of a group have: [n, ...] of each -> [ranks * n, ...]."""
    whole = share.new_empty(group.size() * share.size(0), *share.shape[1:])
    dist.all_gather_into_tensor(whole, share.contiguous(), group=group)
    return whole
