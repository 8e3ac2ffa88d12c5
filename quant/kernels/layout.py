"""Reshape tensors of any shape and memory order to the three axes that the kernels work on."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def layout_of(x: Tensor, scale: Tensor) -> Layout:
    """Return the layout of x under a scale that broadcasts to it; cached, since training meets few shapes."""
    if torch.compiler.is_compiling():  # sizes may be symbols, which no cache can hold
        return Layout(x.shape, x.stride(), scale.shape)
    return _cached_layout(x.shape, x.stride(), scale.shape)


class Layout:
    """Maps a tensor to contiguous (outer, groups, inner), and its scale to (1, groups, 1), and back.

    The elements of one group share a scale. Axes are sorted by stride, which makes channels_last contiguous; tensors
    with gaps or overlaps are copied. Axes between two axes of the scale join the groups, with the scale repeated.

    Args:
        shape: Shape of the tensor.
        strides: Strides of the tensor.
        scale_shape: Shape of the scale, broadcasting to the tensor.
    """

    def __init__(self, shape: torch.Size, strides: tuple[int, ...], scale_shape: torch.Size) -> None:
        self.order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
        self.dense = _dense([shape[d] for d in self.order], [strides[d] for d in self.order])
        """Whether the elements lie in memory without gaps, in the order of (outer, groups, inner)."""
        if not self.dense:
            self.order = list(range(len(shape)))
        self.inverse = sorted(range(len(shape)), key=self.order.__getitem__)
        self.sizes = [shape[d] for d in self.order]
        self.scale_shape = scale_shape
        self.wide_scale_shape = (1,) * (len(shape) - len(scale_shape)) + tuple(scale_shape)
        axes = [i for i, d in enumerate(self.order) if self.wide_scale_shape[d] > 1]
        first, last = (axes[0], axes[-1] + 1) if axes else (0, 0)
        self.scale_sizes = [size if first <= i < last else 1 for i, size in enumerate(self.sizes)]
        self.plain_scale = len(axes) < 2
        """Whether a contiguous scale is (groups,) in memory."""
        self.shape = tuple(math.prod(part) for part in (self.sizes[:first], self.sizes[first:last], self.sizes[last:]))

    def pack(self, x: Tensor) -> Tensor:
        """Reshape x to (outer, groups, inner), contiguous."""
        return x.permute(self.order).contiguous().view(self.shape)

    def unpack(self, x: Tensor) -> Tensor:
        """Reshape (outer, groups, inner) to x's shape and memory order."""
        return x.view(self.sizes).permute(self.inverse)

    def pack_scale(self, scale: Tensor) -> Tensor:
        """Reshape and repeat a scale to (1, groups, 1)."""
        wide = scale.reshape(self.wide_scale_shape).permute(self.order)
        return wide.expand(self.scale_sizes).reshape(1, self.shape[1], 1)

    def unpack_scale_gradient(self, gradient: Tensor) -> Tensor:
        """Reshape a gradient (1, groups, 1) to the scale's shape, summing over repeated entries."""
        wide = gradient.view(self.scale_sizes).permute(self.inverse)
        return wide.sum_to_size(self.wide_scale_shape).view(self.scale_shape)

    def pack_params(self, params: Tensor) -> Tensor:
        """Reshape rounding parameters (5, *scale_shape) to (5, 1, groups, 1); (5,) stays as it is."""
        return params if params.dim() == 1 else torch.stack([self.pack_scale(number) for number in params])


class GroupLayout:
    """Maps rows (rows, K) to (1, rows x groups, group size), with zeros after a short last group, and back.

    Args:
        shape: (rows, K).
        size: Values in a group.
    """

    def __init__(self, shape: torch.Size, size: int) -> None:
        self.rows, self.length = shape
        self.size = size
        self.groups = -(-self.length // size)

    def pack(self, x: Tensor) -> Tensor:
        """Reshape x to (1, rows x groups, group size)."""
        padding = self.groups * self.size - self.length
        return torch.nn.functional.pad(x, (0, padding)).reshape(1, self.rows * self.groups, self.size)

    def unpack(self, x: Tensor) -> Tensor:
        """Reshape (1, rows x groups, group size) to (rows, K)."""
        return x.view(self.rows, self.groups * self.size)[:, : self.length]

    def pack_scale(self, scale: Tensor) -> Tensor:
        """Reshape a scale (rows, groups) to (1, rows x groups, 1)."""
        return scale.reshape(1, -1, 1)

    def unpack_scale_gradient(self, gradient: Tensor) -> Tensor:
        """Reshape a gradient (1, rows x groups, 1) to (rows, groups)."""
        return gradient.view(self.rows, self.groups)

    def pack_params(self, params: Tensor) -> Tensor:
        """Reshape rounding parameters (5, rows, groups) to (5, 1, rows x groups, 1); (5,) stays as it is."""
        return params if params.dim() == 1 else params.reshape(5, 1, -1, 1)


@lru_cache(maxsize=4096)
def _cached_layout(shape: torch.Size, strides: tuple[int, ...], scale_shape: torch.Size) -> Layout:
    return Layout(shape, strides, scale_shape)


def _dense(sizes: list[int], strides: list[int]) -> bool:
    """Whether a tensor of these sizes and strides is contiguous, the first axis outermost."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
