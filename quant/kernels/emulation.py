"""Rounding to any minifloat or block format with operations that every engine has: no bits are looked at.

2^floor(log2 x) comes from a logarithm, which may be wrong by one next to a power of two, and is put right by comparing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant.formats import BlockFormat, FloatFormat, IntFormat


def power_below(x: Tensor) -> Tensor:
    """The largest power of two that is not above x: float32, x positive and normal."""
    power = torch.pow(torch.full((), 2.0), torch.floor(torch.log(x) / 0.6931471805599453))
    power = torch.where(power > x, power * 0.5, power)
    return torch.where(power * 2 <= x, power * 2, power)


def round_minifloat(v: Tensor, format: FloatFormat) -> Tensor:
    """`v` rounded to `format`, ties to even, saturating; float32."""
    y = v.clamp(-format.qmax, format.qmax)
    step = power_below(y.abs().clamp(min=format.smallest_normal)) * 2.0**-format.mantissa
    return torch.round(y / step) * step


def emulate_grid(v: Tensor, row: Tensor) -> Tensor:
    """`quant.kernels.eager.round_to_grid` for finite v."""
    low, high, smallest_power, magic, keep_sign = row.unbind(0)
    y = torch.clamp(v, low, high)
    power = torch.maximum(power_below(torch.maximum(y.abs(), smallest_power)), smallest_power)
    rounded = ((y / power + magic) - magic) * power
    return torch.where(keep_sign > 0, torch.copysign(rounded, v), rounded)


def emulate(x: Tensor, format: BlockFormat, dim: int | None) -> Tensor:
    """`fake_quantize(x, format, dim=dim)` for finite x, in operations that can be traced; float32."""
    if dim is None:  # a convolution's weight sums over all axes but the first
        return emulate(x.flatten(1), format, -1).view(x.shape)
    moved = x.float().movedim(dim, -1)
    length, size = moved.shape[-1], format.block_size
    blocks = torch.nn.functional.pad(moved, (0, -length % size)).unflatten(-1, (-1, size))
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    element = format.element
    if format.two_level:
        assert isinstance(element, FloatFormat)
        block_scale = FloatFormat(4, 3, 1)
        g = largest.flatten().amax(dim=0) / (element.qmax * block_scale.qmax)
        scale = round_minifloat(largest / element.qmax / g.clamp(min=1e-38), block_scale)
        unit = scale * g
        rounded = round_minifloat(blocks / torch.where(unit > 0, unit, torch.inf), element) * scale * g
    else:
        tiny = 2.0**-126
        emax = 0 if isinstance(element, IntFormat) else element.emax
        scale = (power_below(largest.clamp(min=tiny)) * 2.0**-emax).clamp(min=tiny)
        if isinstance(element, IntFormat):
            bound = element.qmax
            rounded = torch.round((blocks / scale * 64).clamp(-bound, bound)) * (scale / 64)
        else:
            rounded = round_minifloat(blocks / scale, element) * scale
    return rounded.flatten(-2)[..., :length].movedim(-1, dim)
