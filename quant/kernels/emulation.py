"""Rounding to minifloats and block formats in operations that ONNX and other engines have: no access to a float's bits.

2^floor(log2 x) is computed with a logarithm, which may be off by one next to a power of two; a comparison corrects it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.formats import NVFP4_SCALE, BlockFormat, FloatFormat, IntFormat, mx_element


def power_below(x: Tensor) -> Tensor:
    """Return the largest power of two <= x; x and the result are float32 of any shape, x positive and normal."""
    power = torch.pow(torch.full((), 2.0), torch.floor(torch.log(x) / 0.6931471805599453))
    power = torch.where(power > x, power * 0.5, power)
    return torch.where(power * 2 <= x, power * 2, power)


def round_minifloat(v: Tensor, format: FloatFormat) -> Tensor:
    """Round v, float32 of any shape, to a minifloat: ties to even, saturating."""
    y = v.clamp(-format.qmax, format.qmax)
    step = power_below(y.abs().clamp(min=format.smallest_normal)) * 2.0**-format.mantissa
    return torch.round(y / step) * step


def emulate_grid(v: Tensor, params: Tensor) -> Tensor:
    """Return what `quant.kernels.eager.round_to_grid` returns, for finite v."""
    low, high, smallest_power, magic, keep_sign = params.unbind(0)
    y = torch.clamp(v, low, high)
    power = torch.maximum(power_below(torch.maximum(y.abs(), smallest_power)), smallest_power)
    rounded = ((y / power + magic) - magic) * power
    return torch.where(keep_sign > 0, torch.copysign(rounded, v), rounded)


def emulate(x: Tensor, format: BlockFormat, dim: int | None) -> Tensor:
    """Return what `fake_quantize(x, format, dim=dim)` returns, in operations that can be traced and exported.

    Args:
        x: Any floating dtype and shape, finite.
        format: The block format.
        dim: Axis that blocks run along; None: all but the first, flattened.

    Returns:
        float32 with x's shape.
    """
    if dim is None:  # a convolution's weight sums over all axes but the first
        return emulate(x.flatten(1), format, -1).view(x.shape)
    moved = x.float().movedim(dim, -1)
    length, size = moved.shape[-1], format.block_size
    blocks = torch.nn.functional.pad(moved, (0, -length % size)).unflatten(-1, (-1, size))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    element = format.element
    if format.two_level:
        assert isinstance(element, FloatFormat)
        g = largest.flatten().amax(dim=0) / (element.qmax * NVFP4_SCALE.qmax)
        scale = round_minifloat(largest / element.qmax / g.clamp(min=1e-38), NVFP4_SCALE)
        unit = scale * g
        rounded = round_minifloat(blocks / torch.where(unit > 0, unit, torch.inf), element) * scale * g
    else:
        tiny = 2.0**-126
        emax, unit = mx_element(format)
        scale = (power_below(largest.clamp(min=tiny)) * 2.0**-emax).clamp(min=tiny)
        if isinstance(element, IntFormat):
            bound = element.qmax
            rounded = torch.round((blocks / scale / unit).clamp(-bound, bound)) * (scale * unit)
        else:
            rounded = round_minifloat(blocks / scale, element) * scale
    return rounded.flatten(-2)[..., :length].movedim(-1, dim)
