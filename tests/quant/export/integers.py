"""Integer-only execution, as on a device with int8 inputs and outputs: an oracle for the emulation.

q_y = clamp(round(M * acc) + z_y) with M = s_x * s_w / s_y and the int32 accumulator
acc = sum q_x q_w - z_x sum q_w - z_w sum q_x + n z_x z_w + round(b / (s_x s_w)).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats import IntFormat
from quant.quant_linear import QuantConv1D, QuantLinear
from quant.quantizers.quantizer import Quantizer

INT32 = 2**31


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: int64 codes, with float64 scale and int64 zero point that broadcast to them."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def values(self) -> Tensor:
        """Return the values, float64."""
        return (self.codes - self.zero_point) * self.scale


def to_codes(quantizer: Quantizer, x: Tensor) -> Codes:
    """Return x in the integer format of `quantizer`. Raises ValueError for any other format."""
    rounder = quantizer.rounding(x)
    if (
        not isinstance(quantizer.format, IntFormat)
        or rounder is None
        or rounder.rounding_params is None
        or rounder.scale is None
    ):
        raise ValueError(f"only integer formats run in integers, got {quantizer.format}")
    if rounder.offset is not None:
        raise ValueError("a learned offset is no zero point: it does not run in integers")
    low, high = rounder.rounding_params[0], rounder.rounding_params[1]
    steps = torch.round(x.detach() / rounder.scale.detach()).clamp(low, high).long()
    lowest = quantizer.format.bounds("full")[0]
    zero_point = torch.zeros_like(low) if quantizer.config.symmetric else lowest - low
    zero_point = torch.round(zero_point).long().expand(rounder.scale.shape)
    return Codes(steps + zero_point, rounder.scale.detach().double(), zero_point)


def accumulate(layer: QuantLinear | QuantConv1D, x: Codes, weight: Codes) -> Tensor:
    """Return the accumulators, bias included, int64 (..., out_features). Raises OverflowError if int32 would overflow.

    weight: codes (out_features, in_features), scale and zero point (out_features, 1) or for all.
    """
    products = x.codes @ weight.codes.T
    crossed = x.zero_point * weight.codes.sum(dim=1) + x.codes.sum(dim=-1, keepdim=True) * weight.zero_point.view(-1)
    total = products - crossed + weight.codes.shape[1] * x.zero_point * weight.zero_point.view(-1)
    if layer.bias is not None:
        total = total + torch.round(layer.bias.detach().double() / (x.scale * weight.scale.view(-1))).long()
    if total.abs().max() >= INT32:
        raise OverflowError(f"the accumulator reaches {int(total.abs().max())}, more than int32 holds")
    return total


def run_in_integers(layer: QuantLinear | QuantConv1D, x: Tensor | Codes, output: Quantizer) -> Codes:
    """Return the layer's output for x (..., in_features) on a device: int64 codes of `output`'s format.

    The layer and `output` are calibrated and set to integer formats with ranges per tensor, weights also per channel.
    """
    weight = to_codes(layer.weight_quantizer, layer.weight)
    activation = x if isinstance(x, Codes) else to_codes(layer.input_quantizer, x)
    if isinstance(layer, QuantConv1D):
        weight = Codes(weight.codes.T, weight.scale.T, weight.zero_point.T)
    multiplier = activation.scale * weight.scale.view(-1) / grid_of(output).scale
    return requantized(multiplier * accumulate(layer, activation, weight), output)


def grid_of(output: Quantizer) -> Codes:
    """Return scale and zero point of a calibrated quantizer, and the codes of 0."""
    return to_codes(output, torch.zeros(1))


def requantized(steps: Tensor, output: Quantizer) -> Codes:
    """Return the codes of values, float64, in units of `output`'s scale."""
    grid, format = grid_of(output), output.format
    assert isinstance(format, IntFormat)
    low, high = format.bounds("narrow" if output.config.symmetric else "full")
    codes = torch.round(steps).long() + grid.zero_point
    return Codes(codes.clamp(low, high), grid.scale, grid.zero_point)


def look_up(function: Callable[[Tensor], Tensor], x: Codes, output: Quantizer) -> Codes:
    """Apply an elementwise function, such as GELU, as a table with an entry for each code of x."""
    first = int(x.codes.min())
    every = Codes(torch.arange(first, int(x.codes.max()) + 1), x.scale, x.zero_point)
    table = requantized(function(every.values()) / grid_of(output).scale, output)
    return Codes(table.codes[x.codes - first], table.scale, table.zero_point)


def add(first: Codes, second: Codes, output: Quantizer) -> Codes:
    """Add two tensors, each rescaled to the output's scale in multiples of 2^-24."""
    scale = grid_of(output).scale
    first_step, second_step = (torch.round(side.scale / scale * 2**24).long() for side in (first, second))
    total = first_step * (first.codes - first.zero_point) + second_step * (second.codes - second.zero_point)
    return requantized(total.double() / 2**24, output)
