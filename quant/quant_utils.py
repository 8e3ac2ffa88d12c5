"""Rounding to a number format and its gradient: the only place values are rounded.

Every format runs through `round_to_grid`, whose behaviour is five numbers (`formats.Rounding`) held in a tensor. A
format can therefore change at every step without a branch, and one compiled graph serves integers and minifloats.
All arithmetic is float32, whatever the input's dtype; the result has the input's dtype and memory layout.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from quant.formats import BlockFormat, FloatFormat, FloatOff, Format, IntFormat, IntGrid

logger = logging.getLogger(__name__)

MIN_LEARNED_SCALE = 1e-8
"""a learned scale is used as at least this, so that no optimizer step can turn the grid over"""
_EXPONENT_BITS = 0x7F800000
_TINY = torch.finfo(torch.float32).tiny


# ---------------------------------------------------------- kernels


def round_to_grid(v: Tensor, row: Tensor) -> Tensor:
    """`v` rounded to the nearest value of the grid, ties to the even code, saturating; NaN stays NaN.

    Args:
        v: float32, any shape, in units of the scale.
        row: float32 (5, ...), the numbers of `Rounding`, each broadcasting to v.

    Adding 1.5 * 2^(23 - mantissa) to a value in [1, 2) leaves the hardware no bits below the format's step, so its own
    round-to-nearest-even does the work; subtracting it again is exact. Dividing by the power of two first keeps this
    free of overflow up to the largest float32 (which bf16 needs).
    """
    low, high, smallest_power, magic, keep_sign = row.unbind(0)
    y = torch.clamp(v, low, high)
    power = torch.maximum((y.view(torch.int32) & _EXPONENT_BITS).view(torch.float32), smallest_power)
    r = ((y / power + magic) - magic) * power
    return torch.where(keep_sign > 0, torch.copysign(r, v), r)


def _forward_kernel(x: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    """x rounded on the grid stretched by scale."""
    return (round_to_grid(x.float() / scale, row) * scale).to(x.dtype)


def _input_gradient_kernel(grad: Tensor, x: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    """Straight-through estimator: the gradient passes inside the clipping range, and not outside."""
    v = x.float() / scale
    return torch.where((v >= row[0]) & (v <= row[1]), grad, 0)


def _gradients_kernel(grad: Tensor, x: Tensor, scale: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for x (straight-through) and for scale (LSQ, arXiv 1902.08153, equation 3)."""
    v = x.float() / scale
    rounded = round_to_grid(v, row)
    inside = (v >= row[0]) & (v <= row[1])
    per_element = grad.float() * torch.where(inside, rounded - v, rounded)
    return torch.where(inside, grad, 0), per_element.sum_to_size(scale.shape)


def _mx_scale_kernel(blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
    """Power-of-two scale of each MX block (OCP MX v1.0, section 6.3), NaN where the block holds NaN or infinity.

    blocks: float (rows, block size); largest_exponent: int32 0-d, of the element format; unit: float32 0-d, the
    element's own step (1/64 for mxint8, else 1). Returns float32 (rows, 1). The logarithm is read from the exponent's
    bits: log2() is wrong just under a power of two.
    """
    largest = blocks.float().abs().amax(dim=-1, keepdim=True)
    exponent = ((largest.view(torch.int32) & _EXPONENT_BITS) >> 23) - 127
    exponent = (exponent - largest_exponent).clamp(-127, 127)
    # 2^-127 is subnormal, its exponent field is 0: build 2^(e/2) twice instead.
    half = exponent.div(2, rounding_mode="floor")
    power = ((half + 127) << 23).view(torch.float32) * ((exponent - half + 127) << 23).view(torch.float32)
    return torch.where(largest.isfinite(), power * unit, torch.nan)


class _Kernels:
    """The kernels as they run now: eager, or compiled by region. `use_compiled` switches."""

    eager: dict[str, Callable[..., Any]] = {
        "forward": _forward_kernel,
        "input_gradient": _input_gradient_kernel,
        "gradients": _gradients_kernel,
        "mx_scale": _mx_scale_kernel,
    }

    def __init__(self) -> None:
        self.forward = self.input_gradient = self.gradients = self.mx_scale = None  # type: ignore[assignment]
        self.compiled = False
        self.install(self.eager, compiled=False)

    def install(self, kernels: dict[str, Callable[..., Any]], compiled: bool) -> None:
        for name, kernel in kernels.items():
            setattr(self, name, kernel)
        self.compiled = compiled


_kernels = _Kernels()


@cache
def _compiled_kernels() -> dict[str, Callable[..., Any]]:
    # dynamic=True: one graph for all layer sizes; without it every layer's shape would compile its own.
    return {name: torch.compile(kernel, dynamic=True) for name, kernel in _Kernels.eager.items()}


def use_compiled(mode: Literal["auto", "on", "off"], device: torch.device | str = "cpu") -> bool:
    """Run the kernels compiled (True) or eager (False), and say which.

    'auto' falls back to eager with a one-line notice when there is no working compiler; 'on' raises RuntimeError then.
    """
    if mode == "off":
        _kernels.install(_Kernels.eager, compiled=False)
        return False
    x = torch.linspace(-1, 1, 64, device=device).view(1, 1, -1)
    scale, row = torch.full((1, 1, 1), 0.1, device=device), rounding_row(IntFormat(4), device=device)
    try:
        compiled = _compiled_kernels()
        works = torch.equal(compiled["forward"](x, scale, row), _forward_kernel(x, scale, row))
        reason = "the compiled kernel differs from the eager one"
    except (RuntimeError, OSError, ImportError) as error:  # dynamo's and inductor's errors are RuntimeErrors
        works, reason = False, str(error).strip().splitlines()[0]
    if not works:
        if mode == "on":
            raise RuntimeError(f"--compile on: kernels cannot be compiled here: {reason}")
        logger.warning("kernels run eager, without a compiler they are slower: %s", reason)
    _kernels.install(compiled if works else _Kernels.eager, compiled=works)
    return works


# ------------------------------------------------------------------------------------------------- layout and autograd


class _Layout:
    """How a tensor of any shape and memory order is seen by the kernels: contiguous (outer, groups, inner).

    The elements of one group share a scale. channels_last is contiguous once its axes are sorted by stride; other
    non-contiguous tensors are copied. Axes between two axes of the scale join the group, with the scale repeated.
    """

    def __init__(self, x: Tensor, scale: Tensor) -> None:
        self.order = sorted(range(x.dim()), key=lambda d: (-x.stride(d), d))
        if not x.permute(self.order).is_contiguous():
            self.order = list(range(x.dim()))
        self.inverse = sorted(range(x.dim()), key=self.order.__getitem__)
        self.ordered_shape = [x.shape[d] for d in self.order]
        self.lead = (1,) * (x.dim() - scale.dim())
        shared = [size > 1 for size in (*self.lead, *scale.shape)]
        axes = [i for i, d in enumerate(self.order) if shared[d]]
        self.first, self.last = (axes[0], axes[-1] + 1) if axes else (0, 0)
        outer, groups = (
            math.prod(self.ordered_shape[: self.first]),
            math.prod(self.ordered_shape[self.first : self.last]),
        )
        self.shape = (outer, groups, math.prod(self.ordered_shape[self.last :]))

    def pack(self, x: Tensor) -> Tensor:
        """x's shape -> (outer, groups, inner)."""
        return x.permute(self.order).contiguous().view(self.shape)

    def unpack(self, x: Tensor) -> Tensor:
        """(outer, groups, inner) -> x's shape and memory order."""
        return x.view(self.ordered_shape).permute(self.inverse)

    def pack_scale(self, scale: Tensor) -> Tensor:
        """The scale's shape -> (1, groups, 1)."""
        wide = scale.reshape(self.lead + tuple(scale.shape)).permute(self.order)
        within = range(self.first, self.last)
        sizes = [self.ordered_shape[d] if d in within else 1 for d in range(len(self.order))]
        return wide.expand(sizes).reshape(1, self.shape[1], 1)

    def unpack_scale(self, gradient: Tensor, scale: Tensor) -> Tensor:
        """(1, groups, 1) -> the scale's shape, repeated scales summed."""
        within = range(self.first, self.last)
        sizes = [self.ordered_shape[d] if d in within else 1 for d in range(len(self.order))]
        wide = gradient.view(sizes).permute(self.inverse)
        return wide.sum_to_size(self.lead + tuple(scale.shape)).view(scale.shape)

    def pack_row(self, row: Tensor) -> Tensor:
        """(5,) as it is; one row for each scale, (5, *scale's shape), -> (5, 1, groups, 1)."""
        return row if row.dim() == 1 else torch.stack([self.pack_scale(number) for number in row])


class _FakeQuantize(torch.autograd.Function):
    """Rounds forward; backward with the scale and row of its own forward, whatever the module uses by then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, row: Tensor, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale, row)
        ctx.gradient_scale = gradient_scale
        return _round(x, scale, row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, scale, row = ctx.saved_tensors
        layout, used = _Layout(x, scale), _positive(scale)
        arguments = layout.pack(grads[0]), layout.pack(x), layout.pack_scale(used), layout.pack_row(row)
        if not ctx.needs_input_grad[1]:
            return layout.unpack(_kernels.input_gradient(*arguments)), None, None, None
        dx, dscale = _kernels.gradients(*arguments)
        return layout.unpack(dx), layout.unpack_scale(dscale, scale).mul_(ctx.gradient_scale), None, None


def _positive(scale: Tensor) -> Tensor:
    """What a learned scale is used as; a given scale is used as it is."""
    return scale.detach().clamp(min=MIN_LEARNED_SCALE) if scale.requires_grad else scale


def _round(x: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    """x rounded, without autograd."""
    if x.numel() == 0:
        return x.clone()
    layout = _Layout(x, scale)
    out = _kernels.forward(layout.pack(x), layout.pack_scale(_positive(scale)), layout.pack_row(row))
    return layout.unpack(out)


# ---------------------------------------------------------- block formats


def _blocked(x: Tensor, block_size: int, dim: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x as (blocks, block_size), blocks along `dim`, the tail padded with zeros; and the way back."""
    moved = x.movedim(dim, -1)
    length = moved.shape[-1]
    padded = torch.nn.functional.pad(moved, (0, -length % block_size))

    def restore(blocks: Tensor) -> Tensor:
        return blocks.view(padded.shape)[..., :length].movedim(-1, dim)

    return padded.reshape(-1, block_size), restore


def _round_blocks(x: Tensor, format: BlockFormat, dim: int) -> tuple[Tensor, Tensor]:
    """x rounded in blocks along `dim`, and the mask of elements inside the clipping range."""
    element = format.element
    row = rounding_row(element, device=x.device)
    blocks, restore = _blocked(x.detach(), format.block_size, dim)
    if format.two_level:
        largest = blocks.float().abs().amax(dim=-1, keepdim=True)
        tensor_scale = largest.amax() / (448.0 * 6.0)
        e4m3 = rounding_row(FloatFormat(4, 3, 1), device=x.device)
        block_scale = round_to_grid((largest / 6.0) / tensor_scale, e4m3)
        v = blocks.float() / (block_scale * tensor_scale)
        out = (round_to_grid(v, row) * block_scale) * tensor_scale
        out = torch.where(block_scale == 0, torch.zeros_like(out), out)
        out = torch.where(tensor_scale == 0, torch.zeros_like(out), out).to(x.dtype)
    else:
        unit = 2.0**-6 if isinstance(element, IntFormat) else 1.0
        emax = 0 if isinstance(element, IntFormat) else element.emax
        scale = _kernels.mx_scale(
            blocks, torch.tensor(emax, dtype=torch.int32, device=x.device), torch.tensor(unit, device=x.device)
        )
        v = blocks.float() / scale
        out = _kernels.forward(blocks.unsqueeze(0), scale.unsqueeze(0), row).squeeze(0)
    return restore(out), restore((v >= row[0]) & (v <= row[1]))


class _FakeQuantizeBlocks(torch.autograd.Function):
    """Rounds in blocks; straight-through gradient inside the clipping range, the block scales taken as constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: BlockFormat, dim: int) -> Tensor:
        out, inside = _round_blocks(x, format, dim)
        ctx.save_for_backward(inside)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grads[0], 0), None, None


# ---------------------------------------------------------- public


def rounding_row(
    format: Format,
    zero_point: Tensor | None = None,
    grid: IntGrid | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The numbers of `format.rounding` as float32 (5,), or (5, *zero_point.shape) for several zero points.

    With a zero point the integer grid is the full one, moved: low - zero_point .. high - zero_point. A one-sided tensor
    has zero_point = low, which is the unsigned grid.
    """
    if isinstance(format, FloatOff | BlockFormat):
        raise ValueError(f"{format} is not rounded on one grid for the whole tensor")
    numbers = format.rounding(grid or ("narrow" if zero_point is None else "full"))
    row = torch.tensor(
        [numbers.low, numbers.high, numbers.smallest_power, numbers.magic, numbers.keep_sign], device=device
    )
    if zero_point is None or not isinstance(format, IntFormat):
        return row
    row = row.view(5, *(1,) * zero_point.dim()).repeat(1, *zero_point.shape)
    row[:2] -= zero_point.to(row)
    return row


def fake_quantize(
    x: Tensor,
    format: Format,
    scale: Tensor | float | None = None,
    zero_point: Tensor | None = None,
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
        zero_point: integers in any dtype, the shape of scale or 0-d; integer formats only.
        grid: codes of an integer format; default 'narrow', with a zero point 'full'.
        dim: the reduction axis, along which block formats form their blocks; None: all axes but the first, flattened
            (a convolution's weight sums over channels and kernel positions).
        gradient_scale: factor on the gradient of scale, see `lsq_gradient_scale`.
    """
    if isinstance(format, FloatOff) or x.numel() == 0:
        return x.clone()
    if isinstance(format, BlockFormat):
        reduced, axis = (x.flatten(1), -1) if dim is None else (x.reshape(1) if x.dim() == 0 else x, dim)
        return _FakeQuantizeBlocks.apply(reduced, format, axis).view_as(x)
    scale = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=x.device)
    if zero_point is not None and zero_point.dim():
        zero_point = zero_point.expand(scale.shape)
    return fake_quantize_row(x, scale, rounding_row(format, zero_point, grid, x.device), gradient_scale)


def fake_quantize_row(x: Tensor, scale: Tensor, row: Tensor, gradient_scale: float = 1.0) -> Tensor:
    """`fake_quantize` with the format as its `rounding_row`: what the modules call, without a Python value that changes."""
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
    if symmetric or isinstance(format, FloatFormat):
        return (torch.maximum(-low, high) / format.qmax).clamp(min=_TINY), None
    qmin, qmax = format.bounds("full")
    scale = ((high - low) / (qmax - qmin)).clamp(min=_TINY)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax)
