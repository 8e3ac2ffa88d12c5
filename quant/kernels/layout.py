"""How a tensor of any shape and memory order is seen by the kernels."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


def layout_of(x: Tensor, scale: Tensor) -> Layout:
    """The layout of x under scale; a training run meets the same few at every step."""
    if torch.compiler.is_compiling():  # sizes may be symbols, which no cache can hold
        return Layout(x.shape, x.stride(), scale.shape)
    return _cached_layout(x.shape, x.stride(), scale.shape)


class Layout:
    """Between a tensor and its scale in any shape, and contiguous (outer, groups, inner) and (1, groups, 1).

    The elements of one group share a scale. channels_last is contiguous once its axes are sorted by stride; tensors
    with gaps or overlaps are copied. Axes between two axes of the scale join the group, with the scale repeated.
    """

    def __init__(self, shape: torch.Size, strides: tuple[int, ...], scale_shape: torch.Size) -> None:
        self.order = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
        self.dense = _dense([shape[d] for d in self.order], [strides[d] for d in self.order])
        """whether the elements lie in memory without gaps, in the order of (outer, groups, inner)"""
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
        """whether a contiguous scale is (groups,) as it lies"""
        self.shape = tuple(math.prod(part) for part in (self.sizes[:first], self.sizes[first:last], self.sizes[last:]))

    def pack(self, x: Tensor) -> Tensor:
        """x's shape -> (outer, groups, inner)."""
        return x.permute(self.order).contiguous().view(self.shape)

    def unpack(self, x: Tensor) -> Tensor:
        """(outer, groups, inner) -> x's shape and memory order."""
        return x.view(self.sizes).permute(self.inverse)

    def pack_scale(self, scale: Tensor) -> Tensor:
        """The scale's shape -> (1, groups, 1)."""
        wide = scale.reshape(self.wide_scale_shape).permute(self.order)
        return wide.expand(self.scale_sizes).reshape(1, self.shape[1], 1)

    def unpack_scale_gradient(self, gradient: Tensor) -> Tensor:
        """(1, groups, 1) -> the scale's shape, repeated scales summed."""
        wide = gradient.view(self.scale_sizes).permute(self.inverse)
        return wide.sum_to_size(self.wide_scale_shape).view(self.scale_shape)

    def pack_row(self, row: Tensor) -> Tensor:
        """(5,) as it is; one row for each scale, (5, *scale's shape), -> (5, 1, groups, 1)."""
        return row if row.dim() == 1 else torch.stack([self.pack_scale(number) for number in row])


@lru_cache(maxsize=4096)
def _cached_layout(shape: torch.Size, strides: tuple[int, ...], scale_shape: torch.Size) -> Layout:
    return Layout(shape, strides, scale_shape)


def _dense(sizes: list[int], strides: list[int]) -> bool:
    """Whether sizes with these strides lie in memory without gaps, the first axis outermost."""
    expected = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
