"""The rounding arithmetic that every format shares, eager or compiled.

All of it is float32. A format is five numbers (`formats.Rounding`) held in a tensor: it can change at every step
without a branch, and one compiled graph serves integers and minifloats.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from quant.formats import FloatFormat, Format, IntFormat, IntGrid, Rounding

logger = logging.getLogger(__name__)

_EXPONENT_BITS = 0x7F800000


class Kernels(NamedTuple):
    """The four functions that do arithmetic on whole tensors, laid out as (outer, groups, inner)."""

    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    input_gradient: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    mx_scale: Callable[[Tensor, Tensor, Tensor], Tensor]


@cache
def _constant_row(rounding: Rounding, device: torch.device | str | None) -> Tensor:
    """Made once for each format and device, and never written to: copying it to a GPU each time would stall."""
    with torch.inference_mode(False):
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
    row = _constant_row(format.rounding(grid or ("narrow" if zero_point is None else "full")), device)
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


EAGER = Kernels(_forward, _input_gradient, _gradients, _mx_scale)
_active = EAGER


def kernels() -> Kernels:
    """The kernels as they run now, see `use_compiled`."""
    return _active


@cache
def _compiled() -> Kernels:
    # Without these a GPU's compiled division is approximate and drops subnormals; older versions lack some names.
    exact = ("eager_numerics.division_rounding", "eager_numerics.disable_ftz", "emulate_divison_rounding")
    known = torch._inductor.list_options()
    options: Any = {name: True for name in exact if name in known}
    # Axes of size 1 and input dtypes make graphs of their own: few, but together more than the 8 that are allowed.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # dynamic=True: one graph for all layer sizes; without it every layer's shape would compile its own.
    return Kernels(*(_region(torch.compile(kernel, dynamic=True, options=options), kernel) for kernel in EAGER))


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


def use_compiled(mode: Literal["auto", "on", "off"], device: torch.device | str = "cpu") -> bool:
    """Run the kernels compiled (True) or eager (False), and say which.

    'auto' falls back to eager with a one-line notice when there is no working compiler; 'on' raises RuntimeError then.
    """
    global _active
    _active = EAGER
    if mode == "off":
        return False
    x = torch.linspace(-1, 1, 64, device=device).view(1, 1, -1)
    scale, row = torch.full((1, 1, 1), 0.1, device=device), rounding_row(IntFormat(4), device=device)
    try:
        with torch.no_grad():
            works = torch.equal(_compiled().forward(x, scale, row), _forward(x, scale, row))
        reason = "the compiled kernel differs from the eager one"
    except (RuntimeError, OSError, ImportError) as error:  # dynamo's and inductor's errors are RuntimeErrors
        works, reason = False, (str(error).strip() or repr(error)).splitlines()[0]
    if works:
        _active = _compiled()
    elif mode == "on":
        raise RuntimeError(f"--compile on: kernels cannot be compiled here: {reason}")
    else:
        logger.warning("kernels run eager, without a compiler they are slower: %s", reason)
    return works
