"""Weights in files that are mapped into memory: a model larger than memory, whose pages the system reads as needed."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import mkstemp

import torch
from torch import Tensor, nn

SUFFIX = ".mapped"
"""Ending of the names of the files, which `is_mapped` knows them by."""


def is_mapped(tensor: Tensor) -> bool:
    """Return whether `mapped_copy` made a tensor, or the one it is a view of."""
    return (tensor.untyped_storage().filename or "").endswith(SUFFIX)


def mapped_copy(tensor: Tensor, folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor into a file of its own that is mapped into memory.

    The file has no name once this returns: its space is free again with the tensor, however the process ends.

    Args:
        tensor: On the CPU, of any shape.
        folder: Where the file is.
        dtype: Of the copy; default: the tensor's.

    Returns:
        The copy, contiguous. Changes go to the file.

    Raises:
        OSError: If the disk is full.
    """
    dtype = dtype or tensor.dtype
    size = max(1, tensor.numel() * dtype.itemsize)
    descriptor, name = mkstemp(SUFFIX, dir=folder)
    try:
        os.posix_fallocate(descriptor, 0, size)  # a full disk is an error here, and not a signal at some later write
        storage = torch.UntypedStorage.from_file(name, shared=True, nbytes=size)
    finally:
        os.close(descriptor)
        os.unlink(name)
    return torch.empty(0, dtype=dtype).set_(storage, 0, tensor.shape).copy_(tensor)  # type: ignore[call-overload]


def clone(tensor: Tensor) -> Tensor:
    """Copy a tensor, a mapped one into another mapped file beside its own."""
    file = tensor.untyped_storage().filename
    return mapped_copy(tensor, Path(file).parent) if file and is_mapped(tensor) else tensor.clone()


@torch.no_grad()
def map_weights(model: nn.Module, folder: Path) -> None:
    """Move all parameters of a model into mapped files, floating ones as float32; tied ones stay tied.

    Args:
        model: On the CPU. Parameters that are mapped already stay where they are.
        folder: Where the files are.

    Raises:
        OSError: If the disk is full.
    """
    for parameter in model.parameters():
        if not is_mapped(parameter):
            dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
            parameter.data = mapped_copy(parameter.data, folder, dtype)
