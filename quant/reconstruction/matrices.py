"""Weights and inputs of every kind of layer as matrices, so that one implementation of a rounding serves them all.

A weight is a stack of matrices (G, R, C): R output channels that each sum over C inputs. A linear layer has G = 1, a
grouped convolution one matrix a group, experts one each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from quant.quant_conv2d import QuantConv1d, QuantConv2d, QuantConv3d
from quant.quant_experts import QuantExpertLinear, by_expert
from quant.quant_linear import QuantConv1D, QuantLinear
from quant.quant_module import QuantModule

Convolution = QuantConv1d | QuantConv2d | QuantConv3d

WINDOW_ELEMENTS = 2**24
"""Largest number of elements of a convolution's input windows that are in memory at once."""


def why_nearest(module: QuantModule) -> str | None:
    """Return why a layer can only be rounded to nearest; None if its outputs can be reconstructed."""
    if not isinstance(module, QuantLinear | QuantConv1D | QuantExpertLinear | Convolution):
        return "they multiply no inputs"
    if "weight" not in module._parameters:
        return "their weights are computed at every use"
    if hasattr(type(module), "own") and not module.differentiable:
        return "they compute in a way of their own"
    return None


def to_matrices(module: QuantModule, tensor: Tensor) -> Tensor:
    """View a tensor of the weight's shape as (G, R, C)."""
    if isinstance(module, QuantExpertLinear):
        return tensor.transpose(1, 2) if module.transposed else tensor
    if isinstance(module, QuantConv1D):
        return tensor.t().unsqueeze(0)
    groups = _groups(module)
    return tensor.reshape(groups, tensor.shape[0] // groups, -1)


def from_matrices(module: QuantModule, matrices: Tensor) -> Tensor:
    """Return matrices (G, R, C) as a tensor of the weight's shape, the inverse of `to_matrices`."""
    if isinstance(module, QuantExpertLinear):
        return matrices.transpose(1, 2) if module.transposed else matrices
    if isinstance(module, QuantConv1D):
        return matrices[0].t()
    return matrices.reshape(module.weight.shape)


def input_matrices(module: QuantModule, x: Tensor, experts: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Split a layer's input into the rows that its matrices are multiplied with.

    Args:
        module: The layer.
        x: Its input: (..., C), (N, channels, ...) for convolutions, (rows, C) for experts.
        experts: Experts alone: integers (rows,), the matrix of each row.

    Yields:
        (slice of the G matrices, rows (matrices of the slice, n, C)); all parts together are the whole input.
    """
    if isinstance(module, QuantExpertLinear):
        assert experts is not None
        order, parts = by_expert(experts, module.experts)
        for expert, (start, stop) in enumerate(parts):
            if stop > start:
                yield slice(expert, expert + 1), x[order[start:stop]].unsqueeze(0)
    elif isinstance(module, Convolution):
        yield from ((slice(None), windows) for windows in _windows(module, x))
    else:
        yield slice(None), x.reshape(1, -1, x.shape[-1])


def _groups(module: Any) -> int:
    return int(module.groups) if isinstance(module, Convolution) else 1


def _windows(conv: Any, x: Tensor) -> Iterator[Tensor]:
    """Yield the windows that a convolution multiplies its filters with, (groups, positions, C), some images at once."""
    space = conv.weight.dim() - 2
    x = conv.padded(x)
    for axis in range(2, 2 + space):
        step, size, spread = (of[axis - 2] for of in (conv.stride, conv.kernel_size, conv.dilation))
        x = x.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
    # (N, channels, positions..., kernel...) -> (N, groups, positions, channels of a group * kernel)
    kernel = conv.weight[0, 0].numel()
    places = x.shape[2 : 2 + space].numel()
    at_once = max(1, WINDOW_ELEMENTS // max(1, x[:1].numel()))
    for images in x.split(at_once):
        windows = images.reshape(len(images), conv.groups, x.shape[1] // conv.groups, places, kernel)
        windows = windows.permute(1, 0, 3, 2, 4)
        yield windows.reshape(conv.groups, len(images) * places, -1)
