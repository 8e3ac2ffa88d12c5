"""Rounding of weights in groups: neighbouring values along the reduction axis share a scale that is kept in fp16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant.kernels.dispatch import kernels
from quant.kernels.eager import Gradients, Operands
from quant.kernels.emulation import emulate_grid

LEAST_SCALE = 2.0**-24
"""Smallest positive fp16 value."""
MOST_SCALE = 65504.0
"""Largest fp16 value."""


def to_rows(x: Tensor, dim: int | None) -> Tensor:
    """Reshape x to (rows, K), where K is the axis `dim`; None: all axes but the first."""
    if x.dim() == 2 and dim in (None, 1, -1):
        return x
    return x.reshape(x.shape[0], -1) if dim is None else x.movedim(dim, -1).reshape(-1, x.shape[dim])


def from_rows(rows: Tensor, shape: torch.Size, dim: int | None) -> Tensor:
    """Invert `to_rows`.

    Args:
        rows: (rows, K).
        shape: Shape of the original tensor.
        dim: The axis that `to_rows` was called with.
    """
    if dim is None:
        return rows.reshape(shape)
    moved = torch.empty(shape, device="meta").movedim(dim, -1).shape
    return rows.reshape(moved).movedim(-1, dim).contiguous()


def scale_shape(shape: Sequence[int], size: int, dim: int | None) -> tuple[int, ...]:
    """Return the shape of a weight's group scales.

    Args:
        shape: Shape of the weight.
        size: Values in a group; the last group of a row may be shorter.
        dim: Reduction axis; None: all axes but the first, flattened.

    Returns:
        The weight's shape with the number of groups in place of the reduction axis; dim=None: (channels, groups).
    """
    if dim is None:
        return shape[0], -(-math.prod(shape[1:]) // size)
    dim %= len(shape)
    return *shape[:dim], -(-shape[dim] // size), *shape[dim + 1 :]


def group_dim(dim: int | None) -> int:
    """Return the axis of the groups in a scale of the shape of `scale_shape`, for the weight's reduction axis."""
    return -1 if dim is None else dim


def spread(values: Tensor, size: int | None, length: int) -> Tensor:
    """Repeat values per block for each element: (..., blocks) -> (..., length); size None: they broadcast already."""
    return values if size is None else values.repeat_interleave(size, dim=-1)[..., :length]


def split_groups(rows: Tensor, size: int) -> list[Tensor]:
    """Split rows into groups.

    Args:
        rows: (rows, K).
        size: Values in a group.

    Returns:
        The full groups (rows x groups, size), then the short last ones (rows, K % size); each only if there are any.
    """
    whole = rows.shape[1] // size * size
    parts = rows[:, :whole].reshape(-1, size), rows[:, whole:]
    return [part for part in parts if part.numel()]


def join_groups(parts: Sequence[Tensor], count: int) -> Tensor:
    """Join values per group, in the order of `split_groups`, to (rows, groups).

    Args:
        parts: One or two tensors, (groups of that part,) each.
        count: Number of rows.
    """
    return torch.cat([part.reshape(count, -1) for part in parts], dim=1)


def _half(scale: Tensor) -> Tensor:
    return scale.clamp(LEAST_SCALE, MOST_SCALE).half().float()


class _Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return _half(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def half_scale(scale: Tensor) -> Tensor:
    """Return a scale as files store it, rounded to a positive fp16 value, in float32; gradients pass straight through.

    Args:
        scale: float32, any shape.
    """
    return _Half.apply(scale)


class FakeQuantizeGroups(torch.autograd.Function):
    """Fake quantization in groups with fp16 scales, with the straight-through gradient of x and LSQ's of the scales."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, params: Tensor, size: int, dim: int | None, gradient_scale: float
    ) -> Tensor:
        """Round x with the scale rounded to fp16; see `round_in_groups`."""
        scale = _half(scale)
        ctx.save_for_backward(x, scale, params)
        ctx.size, ctx.dim, ctx.gradient_scale = size, dim, gradient_scale
        return round_in_groups(x, scale, params, size, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients w.r.t. x and scale."""
        x, scale, params = ctx.saved_tensors
        learned = ctx.needs_input_grad[1]
        dx, dscale, _ = group_gradients(grads[0], x, scale, params, ctx.size, ctx.dim, learned=learned)
        return dx, None if dscale is None else dscale * ctx.gradient_scale, None, None, None, None


def round_in_groups(x: Tensor, scale: Tensor, params: Tensor, size: int, dim: int | None) -> Tensor:
    """Round a weight in groups, outside of autograd.

    Args:
        x: Any floating dtype and shape.
        scale: float32 with the shape of `scale_shape`, positive.
        params: float32 (5,) or (5, *scale.shape), see `quant.kernels.eager.rounding_params`.
        size: Values in a group.
        dim: Reduction axis; None: all axes but the first, flattened.

    Returns:
        The rounded x, with its shape, dtype and memory order.
    """
    return _like(x, kernels().round(_operands(x, scale, params, size, dim)), dim)


def group_gradients(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    params: Tensor,
    size: int,
    dim: int | None,
    *,
    learned: bool,
    again: bool = False,
) -> Gradients:
    """Return the gradients of `round_in_groups` w.r.t. x and, if learned, the scale.

    Args:
        grad: Gradient w.r.t. the rounded x, with x's shape.
        x: The unrounded weight.
        scale: float32, as for `round_in_groups`.
        params: As for `round_in_groups`.
        size: Values in a group.
        dim: Reduction axis; None: all axes but the first, flattened.
        learned: Whether to compute the scale's gradient.
        again: Whether to also return the rounded x.
    """
    on = _operands(x, scale, params, size, dim)
    dx, dscale, rounded = kernels().gradients(to_rows(grad, dim), on, learned=learned, again=again)
    return Gradients(
        _like(x, dx, dim),
        None if dscale is None else from_rows(dscale, scale.shape, group_dim(dim)),
        None if rounded is None else _like(x, rounded, dim),
    )


def _operands(x: Tensor, scale: Tensor, params: Tensor, size: int, dim: int | None) -> Operands:
    """Return x as rows (rows, K), the scale as (rows, groups) and the parameters as (5,) or (5, rows, groups)."""
    along = group_dim(dim)
    if params.dim() > 1:
        params = torch.stack([to_rows(number, along) for number in params])
    return Operands(to_rows(x.detach(), dim), to_rows(scale.detach(), along), params, group_size=size)


def _like(x: Tensor, rows: Tensor, dim: int | None) -> Tensor:
    """Return rows (rows, K) in the shape and memory order of x."""
    if rows.shape == x.shape and rows.stride() == x.stride():
        return rows.data  # a view cannot be changed in place
    values = from_rows(rows, x.shape, dim)
    order = torch.empty_like(x, device="meta").stride()  # of a copy of x; allocating one takes longer than rounding
    if values.stride() != order:
        values = torch.empty_strided(x.shape, order, dtype=values.dtype, device=x.device).copy_(values)
    return values.data


def emulate_groups(x: Tensor, scale: Tensor, params: Tensor, size: int, dim: int | None) -> Tensor:
    """Return what `round_in_groups` returns, in operations that can be traced and exported, for finite x.

    Args:
        x: Any floating dtype and shape.
        scale: float32, as for `round_in_groups`.
        params: As for `round_in_groups`.
        size: Values in a group.
        dim: Reduction axis; None: all axes but the first, flattened.

    Returns:
        float32 with x's shape.
    """
    if dim is None:
        return emulate_groups(x.flatten(1), scale, params, size, -1).view(x.shape)
    moved = x.float().movedim(dim, -1)
    length = moved.shape[-1]
    groups = torch.nn.functional.pad(moved, (0, -length % size)).unflatten(-1, (-1, size))
    wide = scale.movedim(dim, -1).unsqueeze(-1)
    own = params if params.dim() == 1 else params.movedim(dim % x.dim() + 1, -1).unsqueeze(-1)
    rounded = emulate_grid(groups / wide, own) * wide
    return rounded.flatten(-2)[..., :length].movedim(-1, dim)
