"""Which kernels round: eager ones, those of torch.compile, or those in C++."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from quant.formats import BlockFormat, ByteGrid, IntFormat
from quant.kernels.eager import EAGER, Gradients, Operands, PackedKernels, rounding_params
from quant.kernels.native import NativeKernels

logger = logging.getLogger(__name__)


class Kernels(Protocol):
    """Rounding and its gradients on whole tensors, of any shape and memory order."""

    makes_codes: bool
    """Whether `codes` is implemented and oneDNN computes exactly with codes on this machine."""

    def round(self, on: Operands) -> Tensor:
        """Fake-quantize x.

        Returns:
            The rounded x, with its shape, dtype and memory order.
        """

    def gradients(
        self, grad: Tensor, on: Operands, *, learned: bool, again: bool = False, reuse: bool = False
    ) -> Gradients:
        """Return the gradients w.r.t. x (straight-through) and scale (LSQ), differentiable if gradients are enabled.

        Args:
            grad: Gradient w.r.t. the rounded x, with x's shape.
            on: The operands of the forward pass.
            learned: Whether to compute the scale's gradient.
            again: Whether to also return the rounded x.
            reuse: Allows the kernel to overwrite `grad`.
        """

    def codes(self, on: Operands, grid: ByteGrid, dtype: torch.dtype) -> Tensor | None:
        """Round x to codes: x is about scale * grid.step * (code - grid.zero_point).

        Args:
            on: x float32, params (5,).
            grid: The byte codes of the format's grid.
            dtype: torch.uint8, or torch.int8 for codes with zero point 0.

        Returns:
            Codes with x's shape; None if x holds NaN or these kernels cannot handle it.
        """

    def mx_scale(self, blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
        """See `eager._mx_scale`."""

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
        """Round x in blocks, and compute the gradient, in a single pass.

        Args:
            grad: Gradient w.r.t. the rounded x; None: compute no gradient.
            x: Any floating dtype and shape.
            format: The block format.
            dim: Axis that blocks run along; None: all but the first, flattened.
            again: Whether to return the rounded x.
            reuse: Allows the kernel to overwrite `grad`.

        Returns:
            (gradient w.r.t. x or None, rounded x or None); None if these kernels cannot handle x.
        """


_active: Kernels = EAGER


def kernels() -> Kernels:
    """Return the kernels in use, as chosen by `use_compiled`."""
    return _active


@cache
def _inductor() -> Kernels:
    """Return kernels compiled by torch.compile, the choice for GPUs."""
    # Without these a GPU's compiled division is approximate and drops subnormals; older versions lack some names.
    exact = ("eager_numerics.division_rounding", "eager_numerics.disable_ftz", "emulate_divison_rounding")
    known = torch._inductor.list_options()
    options: Any = {name: True for name in exact if name in known}
    # Axes of size 1 and input dtypes make graphs of their own: few, but more than the default limit of 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    # dynamic=True: one graph for all layer sizes; without it every layer's shape would compile its own.
    return PackedKernels(lambda kernel: _shapes_only(torch.compile(kernel, dynamic=True, options=options), kernel))


def _shapes_only(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """Call `compiled` on plain three-dimensional tensors, so that its guards depend on nothing else.

    torch.compile guards a view together with its base, and parameters apart from buffers: layers of different kinds
    would each compile a graph of their own until the recompile limit sends all of them to eager.
    """

    def run(*tensors: Tensor) -> Any:
        if torch.is_grad_enabled():  # this backward pass will be differentiated again
            return eager(*tensors)
        return compiled(*(tensor.data for tensor in tensors))

    return run


Compiler = Literal["native", "inductor"]
"""native: a C++ compiler on `native.cpp`, CPUs only. inductor: torch.compile on the eager kernels, any device."""


def use_compiled(
    mode: Literal["auto", "on", "off"], device: torch.device | str = "cpu", compiler: Compiler | None = None
) -> bool:
    """Switch between compiled and eager kernels, after a check that both give the same values.

    Args:
        mode: 'auto' falls back to eager, with a one-line warning, if there is no working compiler.
        device: Device that the kernels will run on.
        compiler: How to compile; None: 'native' on CPUs, else 'inductor'.

    Returns:
        Whether the kernels now run compiled.

    Raises:
        RuntimeError: If the mode is 'on' and the kernels cannot be compiled or differ from the eager ones.
    """
    global _active
    _active = EAGER
    if mode == "off":
        return False
    # As large as a layer's: torch.compile specializes on the first size it meets.
    x = torch.linspace(-1, 1, 2**20, device=device).view(4, -1)
    on = Operands(x, torch.full((4, 1), 0.1, device=device), rounding_params(IntFormat(4), device=device))
    try:
        with torch.no_grad():
            suited = "native" if torch.device(device).type == "cpu" else "inductor"
            compiled: Kernels = NativeKernels.load() if (compiler or suited) == "native" else _inductor()
            works = torch.equal(compiled.round(on), EAGER.round(on))
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
