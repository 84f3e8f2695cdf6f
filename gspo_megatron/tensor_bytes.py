"""A tensor's memory as bytes, and bytes to their place in a file."""

import ctypes
import os

import torch


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy; the tensor must outlive them.

    numpy() would forbid for ever to release the tensor's memory, and knows no bf16.
    """
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Raises OSError, for example because the disk is full."""
    view = memoryview(data).cast("B")
    while view.nbytes:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
