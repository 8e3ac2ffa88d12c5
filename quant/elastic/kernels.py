"""Larger depthwise kernels for a model that is trained from scratch, so that a search can choose among sides."""

from __future__ import annotations

import torch
from torch import nn


def grow_kernels(model: nn.Module, side: int) -> int:
    """Give depthwise convolutions with a smaller odd kernel one of `side`, in place; outputs keep their sizes.

    Convolutions that other code pads stay as they are.

    Args:
        model: A model with random weights.
        side: Odd side of the new kernels.

    Returns:
        The number of changed convolutions.
    """
    small = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and _can_grow(layer, side)]
    for layer in small:
        grow_kernel(layer, side)
    return len(small)


@torch.no_grad()
def grow_kernel(layer: nn.Conv2d, side: int) -> None:
    """Give a convolution a square kernel of a larger odd side, in place.

    The new weights are random, from torch's generator, with the variance that those of the smaller kernel imply for the
    larger one's number of inputs.
    """
    own, shape = layer.kernel_size[0], layer.weight.shape
    layer.weight = nn.Parameter(
        (torch.randn(*shape[:2], side, side) * layer.weight.std() * own / side).to(layer.weight)
    )
    layer.kernel_size = (side, side)
    high, wide = (step * (side // 2) for step in layer.dilation)
    layer.padding = (high, wide)
    layer._reversed_padding_repeated_twice = [wide, wide, high, high]


def _can_grow(layer: nn.Conv2d, side: int) -> bool:
    own = layer.kernel_size[0]
    depthwise = 1 < layer.groups == layer.in_channels == layer.out_channels
    centred = layer.padding == tuple(step * (own // 2) for step in layer.dilation)
    return depthwise and centred and layer.kernel_size == (own, own) and own % 2 == 1 and 1 < own < side
