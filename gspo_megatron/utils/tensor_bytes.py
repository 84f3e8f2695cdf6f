"""A tensor's memory is seen here as bytes."""

import ctypes

import torch


def memory(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy; the tensor must outlive them.

    numpy() would forbid for ever to release the tensor's memory, and knows no bf16.
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
