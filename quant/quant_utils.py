"""fake_quantize and its gradient: the only implementation of rounding, for modules, calibration and tests alike.

All arithmetic is float32, whatever the dtype of the input; the result has the input's dtype and memory layout. The
arithmetic itself is in `quant.kernels.eager`, that of block formats in `quant.kernels.block_formats`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from quant.formats import BlockFormat, FloatFormat, FloatOff, Format, GroupFormat, IntFormat, IntGrid
from quant.kernels.block_formats import FakeQuantizeBlocks
from quant.kernels.dispatch import kernels, use_compiled
from quant.kernels.eager import Operands, round_to_grid, rounding_params
from quant.kernels.groups import FakeQuantizeGroups, scale_shape

__all__ = [
    "MIN_LEARNED_SCALE",
    "fake_quantize",
    "fake_quantize_with_params",
    "least_scale",
    "lsq_gradient_scale",
    "round_to_grid",
    "rounding_params",
    "scale_from_range",
    "use_compiled",
    "used_scale",
]

MIN_LEARNED_SCALE = 1e-8
"""Lower bound applied to learned scales, so that no optimizer step can mirror the grid."""
_TINY = torch.finfo(torch.float32).tiny


class _FakeQuantize(torch.autograd.Function):
    """Fake quantization; the backward pass uses the scale and parameters of its own forward, not the current ones."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, params: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale, params)
        ctx.gradient_scale = gradient_scale
        # .data: autograd forbids in-place changes of a view.
        return kernels().round(Operands(x, scale, params, least_scale(scale))).data

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, params = ctx.saved_tensors
        on = Operands(x, scale, params, least_scale(scale))
        dx, dscale, _ = kernels().gradients(grads[0], on, learned=ctx.needs_input_grad[1])
        return dx, None if dscale is None else dscale * ctx.gradient_scale, None, None


def least_scale(scale: Tensor) -> float:
    """Return the lower bound applied to a scale: MIN_LEARNED_SCALE for learned ones, frozen or not, else 0 (none)."""
    return MIN_LEARNED_SCALE if scale.requires_grad or isinstance(scale, nn.Parameter) else 0.0


def used_scale(scale: Tensor) -> Tensor:
    """Return the scale as the kernels use it: a learned one is at least MIN_LEARNED_SCALE."""
    return scale.detach().clamp(min=MIN_LEARNED_SCALE) if isinstance(scale, nn.Parameter) else scale.detach()


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
    """Round x to the values of a format.

    Integers: (clamp(rne(x / scale) + zero_point, qmin, qmax) - zero_point) * scale, where rne rounds ties to even.
    Minifloats: the nearest value of the format, times scale, saturating. Block formats: OCP MX v1.0, NVIDIA NVFP4.

    Args:
        x: Any floating dtype and shape; not changed.
        format: The format.
        scale: float32, broadcasting to x, positive; None is 1. Receives the LSQ gradient (arXiv 1902.08153) if it
            requires gradients. Block formats compute their scales from x and take none. Groups: the shape of
            `quant.kernels.groups.scale_shape`; rounded to fp16.
        zero_point: Whole numbers in any dtype, broadcasting with scale; integer formats only.
        grid: Codes of an integer format; default 'narrow', with a zero point 'full'.
        dim: Reduction axis, along which block formats form their blocks; None: all axes but the first, flattened
            (a convolution's weight sums over channels and kernel positions).
        gradient_scale: Factor on the gradient of scale, see `lsq_gradient_scale`.

    Returns:
        A new tensor with x's shape, dtype and memory order. Its gradient passes straight through to x within the
        clipping range, and is 0 outside.
    """
    if isinstance(format, FloatOff) or x.numel() == 0:
        return x.clone()
    if isinstance(format, BlockFormat):
        return FakeQuantizeBlocks.apply(x, format, dim)
    factor = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=x.device)
    if isinstance(format, GroupFormat):
        shape = scale_shape(x.shape, format.size, dim)
        shift = None if zero_point is None else torch.as_tensor(zero_point, device=x.device).expand(shape)
        params = rounding_params(format.element, shift, grid, x.device)
        return FakeQuantizeGroups.apply(x, factor.expand(shape), params, format.size, dim, gradient_scale)
    shift = None
    if zero_point is not None:
        factor, shift = torch.broadcast_tensors(factor, torch.as_tensor(zero_point, device=x.device))
    return fake_quantize_with_params(x, factor, rounding_params(format, shift, grid, x.device), gradient_scale)


def fake_quantize_with_params(x: Tensor, scale: Tensor, params: Tensor, gradient_scale: float = 1.0) -> Tensor:
    """Round x as `fake_quantize` does, with the format given as a tensor; the modules call this.

    Args:
        x: Any floating dtype and shape.
        scale: float32, broadcasting to x.
        params: float32 (5,) or (5, *scale.shape), from `rounding_params`.
        gradient_scale: Factor on the gradient of scale.

    Returns:
        A new tensor with x's shape, dtype and memory order.
    """
    return _FakeQuantize.apply(x, scale, params, gradient_scale)


def lsq_gradient_scale(elements: int, largest_code: float) -> float:
    """Return LSQ's factor on the gradient of a scale, 1 / sqrt(N * Qp) (arXiv 1902.08153, section 2.2).

    Args:
        elements: N, the number of elements that share the scale, the batch not counted.
        largest_code: Qp, the largest magnitude of the grid.
    """
    return 1.0 / math.sqrt(max(elements, 1) * largest_code)


def scale_from_range(
    low: Tensor, high: Tensor, format: IntFormat | FloatFormat, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the scale and zero point that map a format to the range low..high.

    Args:
        low: float32, any shape; values above 0 count as 0.
        high: float32 of the same shape; values below 0 count as 0.
        format: The format.
        symmetric: For integers: scale = absmax / (2^(k-1) - 1), without a zero point. Minifloats are always symmetric.

    Returns:
        float32 scale > 0 and float32 zero point (whole numbers in -2^(k-1)..2^(k-1)-1, None if symmetric), of low's
        shape.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if not format.scaled:
        return torch.ones_like(low), None
    # Divide by tensors: a GPU would multiply by the rounded reciprocal of a Python number.
    if symmetric or isinstance(format, FloatFormat):
        return (torch.maximum(-low, high) / torch.full_like(low, format.qmax)).clamp(min=_TINY), None
    qmin, qmax = format.bounds("full")
    scale = ((high - low) / torch.full_like(low, qmax - qmin)).clamp(min=_TINY)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax)
