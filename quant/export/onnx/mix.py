"""Weights whose output channels differ in format, in an ONNX file: each group of channels in its own type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor

from quant.export.onnx.layers import Storage


def join_groups(
    codes: Tensor,
    axis: int,
    groups: Sequence[Tensor],
    storages: Sequence[Storage],
    name: str,
    constant: Callable[[str, Any], str],
    node: Callable[..., str],
) -> str:
    """Add nodes that join the codes of the groups, in the widest of their types, and restore the order of the channels.

    ONNX Runtime computes them once, when it loads the model: from then on, the layer is one operation with one weight.

    Args:
        codes: The codes of a weight, float32 in the layout that the file's operation reads.
        axis: Their axis of output channels.
        groups: The channels of each group, int64.
        storages: The type of each group.
        name: Name of the codes.
        constant: (name, value) -> name of a tensor in the file.
        node: (operation, inputs, name of the output, attributes) -> name of the output.

    Returns:
        Name of the joined codes.
    """
    widest = max(storages, key=lambda storage: storage.bits)
    type_of_all = helper.np_dtype_to_tensor_dtype(np.dtype(widest.dtype))
    parts = []
    for number, (channels, storage) in enumerate(zip(groups, storages, strict=True)):
        part = constant(f"{name}.{number}", codes.index_select(axis, channels).numpy().astype(storage.dtype))
        same = storage == widest
        parts.append(part if same else node("Cast", [part], f"{name}.{number}.cast", to=type_of_all))
    joined = node("Concat", parts, f"{name}.joined", axis=axis)
    order = torch.cat(list(groups)).argsort().numpy()  # of each channel, its place among the joined ones
    places = constant(f"{name}.order", order.astype(np.uint8 if len(order) <= 2**8 else np.int32))
    if len(order) <= 2**8:
        places = node("Cast", [places], f"{name}.places", to=helper.np_dtype_to_tensor_dtype(np.dtype(np.int64)))
    return node("Gather", [joined, places], f"{name}.ordered", axis=axis)
