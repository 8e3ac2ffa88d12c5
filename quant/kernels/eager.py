"""The rounding arithmetic that every format shares, eager or compiled.

All of it is float32. A format is five numbers (`formats.Rounding`) held in a tensor: it can change at every step
without a branch, and one compiled graph serves integers and minifloats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from quant.formats import BlockFormat, ByteGrid, FloatFormat, Format, IntFormat, IntGrid, Rounding
from quant.kernels.layout import Layout, layout_of
from quant.modes import recorded

logger = logging.getLogger(__name__)

_EXPONENT_BITS = 0x7F800000


class Kernels(Protocol):
    """What does arithmetic on whole tensors, of any shape and memory order."""

    makes_codes: bool
    """whether `codes` is known, and oneDNN computes with them"""

    def round(self, x: Tensor, scale: Tensor, row: Tensor, least: float = 0.0) -> Tensor:
        """x rounded on the grid stretched by scale, which is used as at least `least` if that is above 0."""

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        row: Tensor,
        least: float = 0.0,
        *,
        learned: bool,
        again: bool = False,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradient for x (straight-through), for scale (LSQ) where it is learned, and x rounded `again` where asked.

        reuse: `grad` belongs to the caller and may be written to. May be differentiated where gradients are enabled.
        """

    def codes(
        self, x: Tensor, scale: Tensor, row: Tensor, least: float, grid: ByteGrid, dtype: torch.dtype
    ) -> Tensor | None:
        """What `round` gives, as codes of `grid`, uint8 or int8; None: x holds NaN, or is not for these kernels."""

    def mx_scale(self, blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
        """See `_mx_scale`."""

    def blocks(
        self,
        grad: Tensor | None,
        x: Tensor,
        format: BlockFormat,
        dim: int | None,
        *,
        again: bool = False,
        reuse: bool = False,
    ) -> tuple[Any, Any] | None:
        """(gradient for x if `grad` is given, x rounded in blocks where `again`); None: not known in one pass."""


@cache
def _constant_row(rounding: Rounding, device: torch.device | str | None) -> Tensor:
    """Made once for each format and device, and never written to: copying it to a GPU each time would stall."""
    with torch.inference_mode(False):
        return _new_row(rounding, device)


def _new_row(rounding: Rounding, device: torch.device | str | None) -> Tensor:
    return torch.tensor(astuple(rounding), dtype=torch.float32, device=device)


def rounding_row(
    format: Format,
    zero_point: Tensor | None = None,
    grid: IntGrid | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """The numbers of `format.rounding` as float32 (5,), or (5, *zero_point.shape) for several zero points.

    With a zero point the integer grid is the full one, moved: low - zero_point .. high - zero_point. A one-sided tensor
    has zero_point = low, which is the unsigned grid. Raises ValueError for float and block formats.
    """
    if not isinstance(format, IntFormat | FloatFormat):
        raise ValueError(f"{format} is not rounded on one grid for the whole tensor")
    made = _new_row if recorded() else _constant_row  # what is made while recording is no tensor to keep
    row = made(format.rounding(grid or ("narrow" if zero_point is None else "full")), device)
    if zero_point is None or isinstance(format, FloatFormat):
        return row
    row = row.view(5, *(1,) * zero_point.dim()).repeat(1, *zero_point.shape)
    row[:2] -= zero_point.to(row)
    return row


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


def _forward(x: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    """x rounded on the grid stretched by scale."""
    return (round_to_grid(x.float() / scale, row) * scale).to(x.dtype)


def _input_gradient(grad: Tensor, x: Tensor, scale: Tensor, row: Tensor) -> Tensor:
    """Straight-through estimator: the gradient passes inside the clipping range, and not outside."""
    v = x.float() / scale
    return torch.where((v >= row[0]) & (v <= row[1]), grad, 0)


def _gradients(grad: Tensor, x: Tensor, scale: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients for x (straight-through) and for scale (LSQ, arXiv 1902.08153, equation 3)."""
    v = x.float() / scale
    rounded = round_to_grid(v, row)
    inside = (v >= row[0]) & (v <= row[1])
    per_element = grad.float() * torch.where(inside, rounded - v, rounded)
    return torch.where(inside, grad, 0), per_element.sum_to_size(scale.shape)


def _gradients_and_forward(grad: Tensor, x: Tensor, scale: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both, in one pass over x."""
    return *_gradients(grad, x, scale, row), _forward(x, scale, row)


def _mx_scale(blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
    """Power-of-two scale of each MX block (OCP MX v1.0, section 6.3), NaN where the block holds NaN or infinity.

    blocks: float (rows, block size); largest_exponent: int32 0-d, of the element format; unit: float32 0-d, the
    element's own step (1/64 for mxint8, else 1). Returns float32 (rows, 1). The logarithm is read from the exponent's
    bits: log2() is wrong just under a power of two.
    """
    largest = blocks.float().abs().amax(dim=-1, keepdim=True)
    exponent = ((largest.view(torch.int32) & _EXPONENT_BITS) >> 23) - 127
    exponent = (exponent - largest_exponent).clamp(-127, 127)
    # 2^-127 is subnormal, its exponent field is 0: multiply two powers of half the exponent instead.
    half = exponent.div(2, rounding_mode="floor")
    power = ((half + 127) << 23).view(torch.float32) * ((exponent - half + 127) << 23).view(torch.float32)
    return torch.where(largest.isfinite(), power * unit, torch.nan)


class PackedKernels:
    """Kernels made of functions of torch, on tensors laid out as (outer, groups, inner); eager, or each compiled."""

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
        return self._mx_scale(blocks, largest_exponent, unit)

    def blocks(self, *args: Any, **kwargs: Any) -> None:
        return None

    def codes(self, *args: Any, **kwargs: Any) -> None:
        return None

    def round(self, x: Tensor, scale: Tensor, row: Tensor, least: float = 0.0) -> Tensor:
        layout = layout_of(x, scale)
        return layout.unpack(self._forward(*_packed(layout, x, scale, row, least)))

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        row: Tensor,
        least: float = 0.0,
        *,
        learned: bool,
        again: bool = False,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        layout = layout_of(x, scale)
        packed = _packed(layout, x, scale, row, least)
        g, dscale, rounded = layout.pack(grad), None, None
        if not learned:
            dx, rounded = self._input_gradient(g, *packed), self._forward(*packed) if again else None
        elif again:
            dx, dscale, rounded = self._gradients_and_forward(g, *packed)
        else:
            dx, dscale = self._gradients(g, *packed)
        return (
            layout.unpack(dx),
            None if dscale is None else layout.unpack_scale_gradient(dscale),
            None if rounded is None else layout.unpack(rounded),
        )


def _packed(layout: Layout, x: Tensor, scale: Tensor, row: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    positive = scale.detach().clamp(min=least) if least > 0 else scale
    return layout.pack(x), layout.pack_scale(positive), layout.pack_row(row)


EAGER = PackedKernels()
_active: Kernels = EAGER


def kernels() -> Kernels:
    """The kernels as they run now, see `use_compiled`."""
    return _active


@cache
def _inductor() -> Kernels:
    """By torch.compile: for GPUs."""
    # Without these a GPU's compiled division is approximate and drops subnormals; older versions lack some names.
    exact = ("eager_numerics.division_rounding", "eager_numerics.disable_ftz", "emulate_divison_rounding")
    known = torch._inductor.list_options()
    options: Any = {name: True for name in exact if name in known}
    # Axes of size 1 and input dtypes make graphs of their own: few, but together more than the 8 that are allowed.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # dynamic=True: one graph for all layer sizes; without it every layer's shape would compile its own.
    return PackedKernels(lambda kernel: _region(torch.compile(kernel, dynamic=True, options=options), kernel))


def _region(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled` behind guards that see three-dimensional tensors and nothing else.

    A view is guarded with the tensor behind it, and a parameter apart from a buffer: left alone, layers of different
    kinds would each compile their own graph until the limit sends all of them to eager.
    """

    def run(*tensors: Tensor) -> Any:
        if torch.is_grad_enabled():  # in a backward pass that will be differentiated again
            return eager(*tensors)
        return compiled(*(tensor.data for tensor in tensors))

    return run


def _native() -> Kernels:
    from quant.kernels.native import NativeKernels  # which takes its fallback from here

    return NativeKernels.load()


Compiler = Literal["native", "inductor"]
"""a C++ compiler on `native.cpp`, for CPUs alone; torch.compile on the eager kernels, for every device"""


def use_compiled(
    mode: Literal["auto", "on", "off"], device: torch.device | str = "cpu", compiler: Compiler | None = None
) -> bool:
    """Run the kernels compiled (True) or eager (False), and say which. compiler: None is the one that suits the device.

    'auto' falls back to eager with a one-line notice when there is no working compiler; 'on' raises RuntimeError then.
    """
    global _active
    _active = EAGER
    if mode == "off":
        return False
    # As large as a layer's: torch.compile makes a graph that suits the first size it meets.
    x = torch.linspace(-1, 1, 2**20, device=device).view(4, -1)
    scale, row = torch.full((4, 1), 0.1, device=device), rounding_row(IntFormat(4), device=device)
    try:
        with torch.no_grad():
            suited = "native" if torch.device(device).type == "cpu" else "inductor"
            compiled = _native() if (compiler or suited) == "native" else _inductor()
            works = torch.equal(compiled.round(x, scale, row), EAGER.round(x, scale, row))
        reason = "the compiled kernel differs from the eager one"
    except (RuntimeError, OSError, ImportError) as error:  # dynamo's and inductor's errors are RuntimeErrors
        works, reason = False, (str(error).strip() or repr(error)).splitlines()[0]
    if works:
        _active = compiled
    elif mode == "on":
        raise RuntimeError(f"--compile on: kernels cannot be compiled here: {reason}")
    else:
        logger.warning("kernels run eager, without a compiler they are slower: %s", reason)
    return works
