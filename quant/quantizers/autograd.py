"""A quantized layer as a single autograd function: rounding, the layer's arithmetic, and the gradients of both.

As separate functions, the backward pass would round every input twice more: for the layer's gradient, which needs the
rounded input, and for the scale's gradient. Here the gradient w.r.t. the rounded input comes first, which needs only
the weight; then a single pass over the input gives the gradients w.r.t. input and scale, and the rounded input for the
weight's gradient. Weights are rounded again as well: storing them took as long and more memory (benchmarks/SPEED.md).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from quant.quant_utils import least_scale
from quant.quantizers.byte_codes import ByteLayer, compute_on_codes, fits_bytes, pack_weight
from quant.quantizers.quantizer import Rounder


class Differentiable(ByteLayer, Protocol):
    """A layer that implements the gradients of its arithmetic."""

    bias: Any
    """A tensor or None."""

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the float layer's output."""

    def input_gradient(self, grad: Tensor, input: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of `compute` w.r.t. the input.

        Args:
            grad: Gradient w.r.t. the output, with the output's shape.
            input: The input; only its shape and memory order matter.
            weight: The rounded weight.

        Returns:
            A new tensor with the input's shape.
        """

    def parameter_gradients(
        self, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of `compute` w.r.t. weight and bias.

        Args:
            grad: Gradient w.r.t. the output, with the output's shape.
            input: The rounded input.
            weight: The weight; only its shape matters.
            wanted: Whether to compute the gradient w.r.t. (weight, bias).

        Returns:
            (gradient w.r.t. weight, gradient w.r.t. bias); None where not wanted.
        """


def run_quantized(
    layer: Differentiable, x: Tensor, weight: Tensor, x_rounder: Rounder | None, w_rounder: Rounder | None
) -> Tensor:
    """Return layer.compute on the rounded input and weight, with gradients.

    Args:
        layer: The layer.
        x: The layer's input.
        weight: The layer's weight.
        x_rounder: Rounds x; `plain`, or None to leave x as it is.
        w_rounder: Rounds the weight; `plain`, or None to leave it as it is.

    Returns:
        The layer's output.
    """
    scales = (None if rounder is None else rounder.scale for rounder in (x_rounder, w_rounder))
    return _QuantizedLayer.apply(x, weight, layer.bias, *scales, layer, x_rounder, w_rounder)


class _QuantizedLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_scale: Tensor | None,
        w_scale: Tensor | None,
        layer: Differentiable,
        x_rounder: Rounder | None,
        w_rounder: Rounder | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, x_scale, w_scale)
        ctx.layer, ctx.rounders = layer, (x_rounder, w_rounder)
        made = None
        if x_rounder and w_rounder and fits_bytes(layer, x, weight, x_rounder.bytes, w_rounder.bytes):
            made = compute_on_codes(layer, x, x_rounder, partial(pack_weight, layer, w_rounder, weight))
        return layer.compute(_rounded(x_rounder, x), _rounded(w_rounder, weight)) if made is None else made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_differentiable_gradients(ctx, grads[0]), None, None, None
        x, weight, _, x_scale, w_scale = ctx.saved_tensors  # raises if one was changed in place meanwhile
        (x_rounder, w_rounder), layer, grad = ctx.rounders, ctx.layer, grads[0]
        needs_x, needs_weight, needs_bias, needs_x_scale, needs_w_scale = ctx.needs_input_grad[:5]
        needs_weight = needs_weight or needs_w_scale
        dx = dx_scale = dw = db = dw_scale = None
        x_again: Tensor | None = x if x_rounder is None else None
        # Under autocast the layer has computed in the dtype of its output.
        w_again = _rounded(w_rounder, weight).to(grad.dtype) if needs_x or needs_x_scale else None
        if needs_x:
            assert w_again is not None
            dx = layer.input_gradient(grad, x, w_again).to(x.dtype)
            if x_rounder is not None:
                dx, dx_scale, x_again = x_rounder.gradients(dx, x, x_scale, needs_x_scale, again=needs_weight)
        elif needs_x_scale:
            assert w_again is not None
            dx_scale, x_again = _scale_gradient_of_data(layer, grad, x, weight, w_again, x_rounder, x_scale)
        if needs_weight or needs_bias:
            x_again = _rounded(x_rounder, x) if x_again is None else x_again
            wanted = needs_weight, needs_bias
            dw, db = layer.parameter_gradients(grad, x_again.to(grad.dtype), weight, wanted)
        if dw is not None and w_rounder is not None:
            dw, dw_scale, _ = w_rounder.gradients(dw.to(weight.dtype), weight, w_scale, needs_w_scale)
        return dx, dw, db, dx_scale, dw_scale, None, None, None


def _scale_gradient_of_data(
    layer: Differentiable, grad: Tensor, x: Tensor, weight: Tensor, w_rounded: Tensor, rounder: Rounder, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient w.r.t. the input's scale when the input itself needs none, and the rounded input.

    The gradient is <g, d>, with g the gradient w.r.t. the rounded input and d the derivative of the rounded input by
    the scale: q - x/s inside the range, q outside. The layer is linear in both arguments, so <g, d> equals <gradient
    w.r.t. the weight at input d, weight>. For the first convolution of a network this takes a fifth of the time of g,
    which is needed for nothing else.
    """
    inside, _, rounded = rounder.gradients(x.clone(), x, scale, False, again=True)  # x where it is not clipped, else 0
    assert rounded is not None
    by_scale = (rounded.float() - inside.float()) / scale.clamp(min=least_scale(scale))
    dw, _ = layer.parameter_gradients(grad, by_scale.to(grad.dtype), weight, (True, False))
    assert dw is not None
    return (dw.float() * w_rounded.float()).sum().view(scale.shape) * rounder.gradient_scale, rounded


def _rounded(rounder: Rounder | None, x: Tensor) -> Tensor:
    return x if rounder is None else rounder.values(x)


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Return the gradients through autograd, for a backward pass that will itself be differentiated."""
    inputs = ctx.saved_tensors
    wanted = [tensor for tensor, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
    x, weight = (
        tensor if rounder is None else rounder(tensor) for rounder, tensor in zip(ctx.rounders, inputs, strict=False)
    )
    output = ctx.layer.compute(x, weight)
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]
