"""Block formats: elements that share a scale in blocks along the reduction axis (OCP MX v1.0, NVIDIA NVFP4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant.formats import BlockFormat, FloatFormat, IntFormat
from quant.kernels.eager import kernels, round_to_grid, rounding_row

NVFP4_SCALE = FloatFormat(4, 3, 1)


class FakeQuantizeBlocks(torch.autograd.Function):
    """Rounds in blocks; straight-through gradient inside the clipping range, the block scales taken as constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: BlockFormat, dim: int | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.format, ctx.dim = format, dim
        return round_in_blocks(x, format, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return block_gradients(grads[0], x, ctx.format, ctx.dim)[0], None, None


def round_in_blocks(x: Tensor, format: BlockFormat, dim: int | None) -> Tensor:
    """x rounded, past autograd: see `fake_quantize`."""
    known = kernels().blocks(None, x.detach(), format, dim, again=True)
    return _in_blocks(x.detach(), format, dim)[0] if known is None else known[1]


def block_gradients(
    grad: Tensor, x: Tensor, format: BlockFormat, dim: int | None, *, again: bool = False, reuse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradient for x, and x rounded `again` where asked. reuse: `grad` may be written to."""
    known = None
    if not torch.is_grad_enabled():  # else this backward pass will be differentiated again
        known = kernels().blocks(grad, x.detach(), format, dim, again=again, reuse=reuse)
    if known is not None:
        return known
    out, inside = _in_blocks(x.detach(), format, dim)
    return torch.where(inside, grad, 0), out if again else None


def _in_blocks(x: Tensor, format: BlockFormat, dim: int | None) -> tuple[Tensor, Tensor]:
    """x rounded, and where it lies inside the clipping range, both in x's layout."""
    blocks, restore = _blocked(x, format.block_size, dim)
    row = rounding_row(format.element, device=x.device)
    out, v = (_round_two_level if format.two_level else _round_mx)(blocks, format, row)
    return restore(out).data, restore((v >= row[0]) & (v <= row[1]))  # no view: that may not be changed in place


def _blocked(x: Tensor, block_size: int, dim: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """x as (blocks, block_size), blocks along `dim`, the tail padded with zeros; and the way back to x's layout."""
    moved = x.reshape(x.shape[:1].numel(), -1) if dim is None or x.dim() == 0 else x.movedim(dim, -1)
    length = moved.shape[-1]
    padded = torch.nn.functional.pad(moved, (0, -length % block_size))

    def restore(blocks: Tensor) -> Tensor:
        out = blocks.view(padded.shape)[..., :length]
        out = out.reshape(x.shape) if dim is None or x.dim() == 0 else out.movedim(-1, dim)
        like_x = torch.empty_like(x, dtype=out.dtype)
        return out if out.stride() == like_x.stride() else like_x.copy_(out)

    return padded.reshape(-1, block_size), restore


def _round_mx(blocks: Tensor, format: BlockFormat, row: Tensor) -> tuple[Tensor, Tensor]:
    """blocks rounded under power-of-two scales, and their values in units of these. NaN and infinity spoil a block."""
    scale, _ = _mx_scales(blocks, format)
    return kernels().round(blocks, scale, row), blocks.float() / scale


def _mx_scales(blocks: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor]:
    """Scale (rows, 1) of each block, and the unit it contains: mxint8's elements are whole numbers of 1/64."""
    emax, unit = mx_element(format)
    largest_exponent = torch.full((), emax, dtype=torch.int32, device=blocks.device)
    step = torch.full((), unit, device=blocks.device)
    return kernels().mx_scale(blocks, largest_exponent, step), step


def mx_element(format: BlockFormat) -> tuple[int, float]:
    """Exponent of the element's largest value, and the element's own step."""
    element = format.element
    return (0, 2.0**-6) if isinstance(element, IntFormat) else (element.emax, 1.0)


def _round_two_level(blocks: Tensor, format: BlockFormat, row: Tensor) -> tuple[Tensor, Tensor]:
    """blocks rounded under e4m3 scales b that share one float scale g of the tensor: e2m1(x / (b * g)) * b * g.

    NaN and infinity spoil their block alone, as in MX: g is taken over the others. Also returns x / (b * g).

    torchao rounds the reciprocal of b * g and multiplies by it, as NVIDIA's kernels do: values at a tie of e2m1, or one
    unit in the last place beside it, may go to the other neighbour there. It also takes no scale b below 2^-6.
    """
    b, g = _two_level_scales(blocks, format)
    v = _in_units(blocks, b * g)
    return (round_to_grid(v, row) * b * g).to(blocks.dtype), v


def _two_level_scales(blocks: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor]:
    """b (rows, 1), 0 for a block that vanishes and NaN for one that is spoiled, and g (0-d)."""
    largest = blocks.float().abs().amax(dim=-1, keepdim=True)
    finite = largest.isfinite()
    # Divided by tensors: a GPU multiplies by the rounded reciprocal of a Python number.
    qmax = torch.full_like(largest, format.element.qmax)
    g = torch.where(finite, largest, 0).amax() / (qmax[0, 0] * NVFP4_SCALE.qmax)
    b = round_to_grid(largest / qmax / g, rounding_row(NVFP4_SCALE, device=blocks.device))
    b = torch.where(finite, b, torch.nan)
    return torch.where(finite & ~(b * g > 0), 0, b), g  # an all-zero block, or a scale that underflowed


def _in_units(blocks: Tensor, scale: Tensor) -> Tensor:
    """blocks / scale; under a scale of 0 a zero of x's sign, as x / inf is."""
    return blocks.float() / torch.where(scale == 0, torch.inf, scale)


def round_blocks(rows: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (n, K), blocks along K, taken apart: (elements, block scales, tensor scale of nvfp4).

    Elements float32 (n, K) on the element format's grid, block scales float32 (n, ceil(K / block_size)): MX powers of
    two, without mxint8's unit of 1/64. The values that `fake_quantize` gives are elements x scales (x unit).
    """
    blocks, restore = _blocked(rows, format.block_size, -1)
    row = rounding_row(format.element, device=rows.device)
    if format.two_level:
        scale, tensor_scale = _two_level_scales(blocks, format)
        elements = round_to_grid(_in_units(blocks, scale * tensor_scale), row)
    else:
        scale, unit = _mx_scales(blocks, format)
        elements, tensor_scale = round_to_grid(blocks.float() / scale, row), None
        scale = scale / unit
    return restore(elements), scale.view(len(rows), -1), tensor_scale
