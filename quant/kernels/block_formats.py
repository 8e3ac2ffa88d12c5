"""Block formats: elements that share a scale in blocks along the reduction axis (OCP MX v1.0, NVIDIA NVFP4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from quant.formats import NVFP4_SCALE, BlockFormat, mx_element
from quant.kernels.dispatch import kernels
from quant.kernels.eager import Operands, round_to_grid, rounding_params


class FakeQuantizeBlocks(torch.autograd.Function):
    """Fake quantization in blocks, straight-through within the clipping range; block scales count as constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, format: BlockFormat, dim: int | None) -> Tensor:
        """Round x; see `round_in_blocks`."""
        ctx.save_for_backward(x)
        ctx.format, ctx.dim = format, dim
        return round_in_blocks(x, format, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient w.r.t. x."""
        (x,) = ctx.saved_tensors
        return block_gradients(grads[0], x, ctx.format, ctx.dim)[0], None, None


def round_in_blocks(x: Tensor, format: BlockFormat, dim: int | None) -> Tensor:
    """Round x to a block format, outside of autograd.

    Args:
        x: Any floating dtype and shape.
        format: The block format.
        dim: Axis that blocks run along; None: all but the first, flattened.

    Returns:
        The rounded x, with its shape, dtype and memory order. NaN and infinity turn their whole block into NaN.
    """
    done = kernels().blocks(None, x.detach(), format, dim, again=True)
    return _in_blocks(x.detach(), format, dim)[0] if done is None else done[1]


def block_gradients(
    grad: Tensor, x: Tensor, format: BlockFormat, dim: int | None, *, again: bool = False, reuse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return the straight-through gradient of `round_in_blocks`.

    Args:
        grad: Gradient w.r.t. the rounded x, with x's shape.
        x: Any floating dtype and shape.
        format: The block format.
        dim: Axis that blocks run along; None: all but the first, flattened.
        again: Whether to also return the rounded x.
        reuse: Allows `grad` to be overwritten.

    Returns:
        (gradient w.r.t. x, rounded x or None), both with x's shape.
    """
    done = None
    if not torch.is_grad_enabled():  # else this backward pass will be differentiated again
        done = kernels().blocks(grad, x.detach(), format, dim, again=again, reuse=reuse)
    if done is not None:
        return done
    out, inside = _in_blocks(x.detach(), format, dim)
    return torch.where(inside, grad, 0), out if again else None


def _in_blocks(x: Tensor, format: BlockFormat, dim: int | None) -> tuple[Tensor, Tensor]:
    """Return the rounded x and, as bool, where x lies within the clipping range; both with x's shape and layout."""
    blocks, restore = _blocked(x, format.block_size, dim)
    params = rounding_params(format.element, device=x.device)
    out, v = (_round_two_level if format.two_level else _round_mx)(blocks, format, params)
    inside = (v >= params[0]) & (v <= params[1])
    return restore(out).data, restore(inside)  # .data: autograd forbids in-place changes of a view


def _blocked(x: Tensor, block_size: int, dim: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Reshape x to (blocks, block_size), the tail padded with zeros; also return the inverse, back to x's layout."""
    moved = x.reshape(x.shape[:1].numel(), -1) if dim is None or x.dim() == 0 else x.movedim(dim, -1)
    length = moved.shape[-1]
    padded = torch.nn.functional.pad(moved, (0, -length % block_size))

    def restore(blocks: Tensor) -> Tensor:
        out = blocks.view(padded.shape)[..., :length]
        out = out.reshape(x.shape) if dim is None or x.dim() == 0 else out.movedim(-1, dim)
        like_x = torch.empty_like(x, dtype=out.dtype)
        return out if out.stride() == like_x.stride() else like_x.copy_(out)

    return padded.reshape(-1, block_size), restore


def _round_mx(blocks: Tensor, format: BlockFormat, params: Tensor) -> tuple[Tensor, Tensor]:
    """Round (blocks, block_size) under power-of-two scales; also return the unrounded values in units of the scales."""
    scale, _ = _mx_scales(blocks, format)
    return kernels().round(Operands(blocks, scale, params)), blocks.float() / scale


def _mx_scales(blocks: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return scales float32 (blocks, 1) and the elements' step, 0-d, which is a factor of them (1/64 for mxint8)."""
    emax, unit = mx_element(format)
    largest_exponent = torch.full((), emax, dtype=torch.int32, device=blocks.device)
    step = torch.full((), unit, device=blocks.device)
    return kernels().mx_scale(blocks, largest_exponent, step), step


def _round_two_level(blocks: Tensor, format: BlockFormat, params: Tensor) -> tuple[Tensor, Tensor]:
    """Round (blocks, block_size) to NVFP4: e2m1(x / (b * g)) * b * g, with e4m3 block scales b and one float scale g.

    NaN and infinity turn their own block alone into NaN, as in MX: g is computed from the other blocks.

    torchao multiplies by the rounded reciprocal of b * g, as NVIDIA's kernels do: values at a tie of e2m1, or one unit
    in the last place beside it, may round to the other neighbour there. It also uses no scale b below 2^-6.

    Returns:
        The rounded values, and x / (b * g).
    """
    b, g = _two_level_scales(blocks, format)
    v = _in_units(blocks, b * g)
    return (round_to_grid(v, params) * b * g).to(blocks.dtype), v


def _two_level_scales(blocks: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor]:
    """Return b, float32 (blocks, 1), and g, float32 0-d.

    b is 0 for a block whose values vanish or underflow, and NaN for one that holds NaN or infinity.
    """
    largest = blocks.float().abs().amax(dim=-1, keepdim=True)
    finite = largest.isfinite()
    # Divide by tensors: a GPU would multiply by the rounded reciprocal of a Python number.
    qmax = torch.full_like(largest, format.element.qmax)
    g = torch.where(finite, largest, 0).amax() / (qmax[0, 0] * NVFP4_SCALE.qmax)
    b = round_to_grid(largest / qmax / g, rounding_params(NVFP4_SCALE, device=blocks.device))
    b = torch.where(finite, b, torch.nan)
    return torch.where(finite & ~(b * g > 0), 0, b), g


def _in_units(blocks: Tensor, scale: Tensor) -> Tensor:
    """Divide by the scale; where the scale is 0, return a zero with the sign of x, as x / inf does."""
    return blocks.float() / torch.where(scale == 0, torch.inf, scale)


def round_blocks(rows: Tensor, format: BlockFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round rows to a block format and return elements and scales apart, as a file stores them.

    Args:
        rows: Any floating dtype, (n, K); blocks run along K.
        format: The block format.

    Returns:
        Elements float32 (n, K) on the element format's grid; block scales float32 (n, ceil(K / block_size)), for MX
        powers of two without mxint8's unit of 1/64; tensor scale float32 0-d of nvfp4, else None. `fake_quantize` gives
        elements x block scales (x unit, x tensor scale).
    """
    blocks, restore = _blocked(rows, format.block_size, -1)
    params = rounding_params(format.element, device=rows.device)
    if format.two_level:
        scale, tensor_scale = _two_level_scales(blocks, format)
        elements = round_to_grid(_in_units(blocks, scale * tensor_scale), params)
    else:
        scale, unit = _mx_scales(blocks, format)
        elements, tensor_scale = round_to_grid(blocks.float() / scale, params), None
        scale = scale / unit
    return restore(elements), scale.view(len(rows), -1), tensor_scale
