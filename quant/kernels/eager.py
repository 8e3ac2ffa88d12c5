"""The rounding arithmetic that all formats share, as functions of torch; `PackedKernels` runs them eager or compiled.

All arithmetic is float32. A format is a tensor of five numbers (`formats.Rounding`): it can change at every step
without a branch, and one compiled graph serves integers and minifloats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant.formats import FloatFormat, Format, IntFormat, IntGrid, Rounding
from quant.kernels.layout import GroupLayout, Layout, layout_of
from quant.module_utils import is_tracing

_EXPONENT_BITS = 0x7F800000


class Operands(NamedTuple):
    """A tensor, and the grid that it is rounded on."""

    x: Tensor
    """Any floating dtype, shape and memory order."""
    scale: Tensor
    """float32, broadcasts to x; positive unless `least_scale` makes it so."""
    params: Tensor
    """float32 (5,) or (5, *scale.shape), see `rounding_params`."""
    least_scale: float = 0.0
    """Lower bound applied to the scale; 0 disables it."""
    group_size: int = 0
    """If positive: x is (rows, K), contiguous, and the scale (rows, groups), one for each `group_size` values."""


class Gradients(NamedTuple):
    """What a backward pass through the rounding of x gives."""

    x: Tensor
    """Straight-through gradient, with x's shape and dtype."""
    scale: Tensor | None
    """LSQ gradient, float32 with the scale's shape; None if the scale is not learned."""
    rounded: Tensor | None
    """x rounded again; None if not requested."""


@cache
def _cached_params(rounding: Rounding, device: torch.device | str | None) -> Tensor:
    """Cached for each format and device, and never written to: a copy to a GPU at every call would stall it."""
    with torch.inference_mode(False):
        return _new_params(rounding, device)


def _new_params(rounding: Rounding, device: torch.device | str | None) -> Tensor:
    return torch.tensor(astuple(rounding), dtype=torch.float32, device=device)


def rounding_params(
    format: Format,
    zero_point: Tensor | None = None,
    grid: IntGrid | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the five numbers of `format.rounding` as a tensor.

    Args:
        format: An integer format or a minifloat.
        zero_point: Whole numbers in any dtype and shape. An integer grid then becomes the full one, moved to
            low - zero_point .. high - zero_point; zero_point = low gives the unsigned grid of a one-sided tensor.
        grid: Codes of an integer format; None is 'narrow', with a zero point 'full'.
        device: Device of the result.

    Returns:
        float32 (5,), or (5, *zero_point.shape) for integers with a zero point. Must not be written to.

    Raises:
        ValueError: For float and block formats, which have no single grid.
    """
    if not isinstance(format, IntFormat | FloatFormat):
        raise ValueError(f"{format} is not rounded on one grid for the whole tensor")
    make = _new_params if is_tracing() else _cached_params  # a tensor of a trace must not outlive it in a cache
    params = make(format.rounding(grid or ("narrow" if zero_point is None else "full")), device)
    if zero_point is None or isinstance(format, FloatFormat):
        return params
    params = params.view(5, *(1,) * zero_point.dim()).repeat(1, *zero_point.shape)
    params[:2] -= zero_point.to(params)
    return params


def round_to_grid(v: Tensor, params: Tensor) -> Tensor:
    """Round to the nearest value of the grid, ties to the even code, saturating; NaN stays NaN.

    Adding 1.5 * 2^(23 - mantissa) to a value in [1, 2) leaves no bits below the format's step, so the hardware's own
    round-to-nearest-even does the work; the subtraction that follows is exact. Dividing by the power of two first
    avoids overflow up to the largest float32, which bf16 needs.

    Args:
        v: float32, any shape, in units of the scale.
        params: float32 (5, ...), see `rounding_params`; each of the five broadcasts to v.

    Returns:
        float32 with v's shape, in units of the scale.
    """
    low, high, smallest_power, magic, keep_sign = params.unbind(0)
    y = torch.clamp(v, low, high)
    power = torch.maximum((y.view(torch.int32) & _EXPONENT_BITS).view(torch.float32), smallest_power)
    r = ((y / power + magic) - magic) * power
    return torch.where(keep_sign > 0, torch.copysign(r, v), r)


def _forward(x: Tensor, scale: Tensor, params: Tensor) -> Tensor:
    """Fake-quantize x: round x / scale, times scale, in x's dtype."""
    return (round_to_grid(x.float() / scale, params) * scale).to(x.dtype)


def _input_gradient(grad: Tensor, x: Tensor, scale: Tensor, params: Tensor) -> Tensor:
    """Straight-through estimator: the gradient passes where x lies within the clipping range, and is 0 elsewhere."""
    v = x.float() / scale
    return torch.where((v >= params[0]) & (v <= params[1]), grad, 0)


def _gradients(grad: Tensor, x: Tensor, scale: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients w.r.t. x (straight-through) and scale (LSQ, arXiv 1902.08153, equation 3)."""
    v = x.float() / scale
    rounded = round_to_grid(v, params)
    inside = (v >= params[0]) & (v <= params[1])
    per_element = grad.float() * torch.where(inside, rounded - v, rounded)
    return torch.where(inside, grad, 0), per_element.sum_to_size(scale.shape)


def _gradients_and_forward(grad: Tensor, x: Tensor, scale: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients and the rounded x; compiled, this is a single pass over x."""
    return *_gradients(grad, x, scale, params), _forward(x, scale, params)


def _mx_scale(blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
    """Return the power-of-two scale of each MX block (OCP MX v1.0, section 6.3).

    The exponent is read from the bits of the float, because log2() is wrong just below a power of two.

    Args:
        blocks: Any floating dtype, (blocks, block size).
        largest_exponent: int32 0-d, exponent of the largest value of the element format.
        unit: float32 0-d, step of the elements: 1/64 for mxint8, else 1.

    Returns:
        float32 (blocks, 1); NaN for a block that holds NaN or infinity.
    """
    largest = blocks.float().abs().amax(dim=-1, keepdim=True)
    exponent = ((largest.view(torch.int32) & _EXPONENT_BITS) >> 23) - 127
    exponent = (exponent - largest_exponent).clamp(-127, 127)
    # 2^-127 is subnormal, its exponent field is 0: multiply two powers of half the exponent instead.
    half = exponent.div(2, rounding_mode="floor")
    power = ((half + 127) << 23).view(torch.float32) * ((exponent - half + 127) << 23).view(torch.float32)
    return torch.where(largest.isfinite(), power * unit, torch.nan)


class PackedKernels:
    """The functions above on tensors laid out as (outer, groups, inner); see `dispatch.Kernels` for the methods.

    Args:
        compiled: Compiles a function of tensors; the default leaves it eager.
    """

    makes_codes = False

    def __init__(
        self, compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    ) -> None:
        self._forward = compiled(_forward)
        self._input_gradient = compiled(_input_gradient)
        self._gradients = compiled(_gradients)
        self._gradients_and_forward = compiled(_gradients_and_forward)
        self._mx_scale = compiled(_mx_scale)

    def mx_scale(self, blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
        """See `_mx_scale`."""
        return self._mx_scale(blocks, largest_exponent, unit)

    def blocks(self, *args: Any, **kwargs: Any) -> None:
        """Return None: there is no single-pass kernel for block formats."""
        return None

    def codes(self, *args: Any, **kwargs: Any) -> None:
        """Return None: there is no kernel that writes codes."""
        return None

    def round(self, on: Operands) -> Tensor:
        """Fake-quantize x."""
        layout = _layout(on)
        return layout.unpack(self._forward(*_packed(layout, on)))

    def gradients(
        self, grad: Tensor, on: Operands, *, learned: bool, again: bool = False, reuse: bool = False
    ) -> Gradients:
        """Return the gradients w.r.t. x and scale; `grad` is never written to."""
        layout = _layout(on)
        packed = _packed(layout, on)
        g, dscale, rounded = layout.pack(grad), None, None
        if not learned:
            dx, rounded = self._input_gradient(g, *packed), self._forward(*packed) if again else None
        elif again:
            dx, dscale, rounded = self._gradients_and_forward(g, *packed)
        else:
            dx, dscale = self._gradients(g, *packed)
        return Gradients(
            layout.unpack(dx),
            None if dscale is None else layout.unpack_scale_gradient(dscale),
            None if rounded is None else layout.unpack(rounded),
        )


def _layout(on: Operands) -> Layout | GroupLayout:
    return GroupLayout(on.x.shape, on.group_size) if on.group_size else layout_of(on.x, on.scale)


def _packed(layout: Layout | GroupLayout, on: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (outer, groups, inner), scale (1, groups, 1) and params (5, ...)."""
    scale = on.scale.detach().clamp(min=on.least_scale) if on.least_scale > 0 else on.scale
    return layout.pack(on.x), layout.pack_scale(scale), layout.pack_params(on.params)


EAGER = PackedKernels()
