"""fake_quantize and its gradient: the only way to round values, for modules, calibration and tests alike.

All arithmetic is float32, whatever the input's dtype; the result has the input's dtype and memory layout. The
arithmetic itself is in `quant.kernels.eager`, that of block formats in `quant.kernels.block_formats`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quant.formats import BlockFormat, FloatFormat, FloatOff, Format, IntFormat, IntGrid
from quant.kernels.block_formats import FakeQuantizeBlocks
from quant.kernels.eager import kernels, round_to_grid, rounding_row, use_compiled

__all__ = [
    "MIN_LEARNED_SCALE",
    "fake_quantize",
    "fake_quantize_row",
    "least_scale",
    "lsq_gradient_scale",
    "round_to_grid",
    "rounding_row",
    "scale_from_range",
    "use_compiled",
]

MIN_LEARNED_SCALE = 1e-8
"""a learned scale is used as at least this, so that no optimizer step can turn the grid over"""
_TINY = torch.finfo(torch.float32).tiny


class _FakeQuantize(torch.autograd.Function):
    """Rounds forward; backward with the scale and row of its own forward, whatever the module uses by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, row: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale, row)
        ctx.gradient_scale = gradient_scale
        # Without autograd's view of it: a view may not be changed in place.
        return kernels().round(x, scale, row, least_scale(scale)).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, row = ctx.saved_tensors
        learned = ctx.needs_input_grad[1]
        dx, dscale, _ = kernels().gradients(grads[0], x, scale, row, least_scale(scale), learned=learned)
        return dx, None if dscale is None else dscale * ctx.gradient_scale, None, None


def least_scale(scale: Tensor) -> float:
    """What a learned scale (also once frozen, hence the type) is used as at least; 0: a given one, used as it is."""
    return MIN_LEARNED_SCALE if scale.requires_grad or isinstance(scale, nn.Parameter) else 0.0


def fake_quantize(
    x: Tensor,
    format: Format,
    scale: Tensor | float | None = None,
    zero_point: Tensor | float | None = None,
    *,
    grid: IntGrid | None = None,
    dim: int | None = -1,
    gradient_scale: float = 1.0,
) -> Tensor:
    """`x` rounded to `format` on the grid stretched by `scale`: same shape, dtype and memory order; x is not changed.

    Integers: (clamp(rne(x / scale) + zero_point, qmin, qmax) - zero_point) * scale. Minifloats: the nearest
    value of the format times scale, saturating. specs: OCP MX v1.0 for the block formats, which take no scale.

    Args:
        x: any floating dtype, any shape.
        scale: float32, broadcasting to x, positive; None is 1. With requires_grad it gets the LSQ gradient.
        zero_point: integers in any dtype, broadcasting with scale; integer formats only.
        grid: codes of an integer format; default 'narrow', with a zero point 'full'.
        dim: the reduction axis, along which block formats form their blocks; None: all axes but the first, flattened
            (a convolution's weight sums over channels and kernel positions).
        gradient_scale: factor on the gradient of scale, see `lsq_gradient_scale`.
    """
    if isinstance(format, FloatOff) or x.numel() == 0:
        return x.clone()
    if isinstance(format, BlockFormat):
        return FakeQuantizeBlocks.apply(x, format, dim)
    factor = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=x.device)
    shift = None
    if zero_point is not None:
        factor, shift = torch.broadcast_tensors(factor, torch.as_tensor(zero_point, device=x.device))
    return fake_quantize_row(x, factor, rounding_row(format, shift, grid, x.device), gradient_scale)


def fake_quantize_row(x: Tensor, scale: Tensor, row: Tensor, gradient_scale: float = 1.0) -> Tensor:
    """`fake_quantize` with the format as its `rounding_row`, a tensor: what the modules call."""
    return _FakeQuantize.apply(x, scale, row, gradient_scale)


def lsq_gradient_scale(elements: int, largest_code: float) -> float:
    """1 / sqrt(N * Qp) of LSQ (arXiv 1902.08153, section 2.2): N elements share the scale, the batch not counted."""
    return 1.0 / math.sqrt(max(elements, 1) * largest_code)


def scale_from_range(
    low: Tensor, high: Tensor, format: IntFormat | FloatFormat, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Scale, and zero point for an asymmetric integer grid, that spread `format` over low..high.

    Args:
        low, high: float32, any equal shape; the range is widened to hold 0.
        symmetric: integers: scale = absmax / (2^(k-1) - 1) and no zero point. Minifloats are always symmetric.

    Returns float32 scale > 0 and float32 zero point (integers in -2^(k-1)..2^(k-1)-1) of low's shape.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if not format.scaled:
        return torch.ones_like(low), None
    # Divided by tensors: a GPU multiplies by the rounded reciprocal of a Python number.
    if symmetric or isinstance(format, FloatFormat):
        return (torch.maximum(-low, high) / torch.full_like(low, format.qmax)).clamp(min=_TINY), None
    qmin, qmax = format.bounds("full")
    scale = ((high - low) / torch.full_like(low, qmax - qmin)).clamp(min=_TINY)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax)
