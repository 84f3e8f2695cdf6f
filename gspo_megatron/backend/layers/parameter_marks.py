"""Attributes by which Megatron knows what a parameter is; torch's own type has none of them."""

import torch


def mark(parameter: torch.Tensor, **attributes: bool | int) -> None:
    """Set them: sequence_parallel, allreduce, tensor_model_parallel, partition_dim or partition_stride."""
    for name, value in attributes.items():
        setattr(parameter, name, value)
