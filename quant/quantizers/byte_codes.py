"""Layers computed on their codes: where weight and input fit into bytes, a product is a sum of integers.

Rounding then writes one byte instead of four, and oneDNN's integer kernels do the forward pass, on processors that have
instructions for it several times as fast as in float32 (benchmarks/SPEED.md). The sums are exact and only their result
is rounded to float32, so a layer's output is nearer to the true one than float32 products of rounded tensors are.
Gradients are computed in float32, on the values that the codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quant.formats import ByteGrid
from quant.kernels.eager import kernels
from quant.quant_utils import least_scale
from quant.quantizers.quantizer import Rounder


class Packed(NamedTuple):
    """A weight as oneDNN reads it."""

    codes: Tensor
    scale: Tensor
    """float32 1-d: of all channels or one for each"""


class ByteCodes(NamedTuple):
    """A tensor of values scale * (codes - zero_point)."""

    codes: Tensor
    """uint8 for inputs, int8 for weights"""
    scale: Tensor
    """float32 1-d"""
    zero_point: int


class ByteLayer(Protocol):
    """A layer whose arithmetic oneDNN has for bytes."""

    def takes_codes(self, input: Tensor, weight: Tensor, zero_point: int) -> bool:
        """Whether the two below compute what the float layer does with tensors like these and this zero point."""

    def pack_codes(self, weight: ByteCodes, input: ByteCodes) -> Tensor:
        """The weight as the kernel reads it; of the input, shape and zero point count."""

    def compute_codes(self, input: ByteCodes, packed: Tensor, scale: Tensor) -> Tensor:
        """The layer's output, float32, in memory as the float layer's. scale: of the products, float32 (1 or out,)."""


def fits_bytes(layer: ByteLayer, x: Tensor, weight: Tensor, x_bytes: ByteGrid | None, w_bytes: ByteGrid | None) -> bool:
    """Whether the layer can be computed on codes now."""
    if x_bytes is None or w_bytes is None or not w_bytes.signed or not kernels().makes_codes:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
        return False
    plain = all(type(t) in (Tensor, nn.Parameter) and t.is_cpu and t.dtype == torch.float32 for t in (x, weight))
    return plain and layer.takes_codes(x, weight, x_bytes.zero_point)


def compute_on_codes(
    layer: ByteLayer,
    x: Tensor,
    x_rounder: Rounder,
    pack: Callable[[ByteCodes], Packed | None],
) -> Tensor | None:
    """The layer's output on the rounded x, if `fits_bytes`; None where x or the weight holds NaN, which has no code."""
    input = codes_of(x_rounder, x, torch.uint8)
    packed = None if input is None else pack(input)
    if input is None or packed is None:
        return None
    return layer.compute_codes(input, packed.codes, input.scale * packed.scale)


def pack_weight(layer: ByteLayer, rounder: Rounder, weight: Tensor, input: ByteCodes) -> Packed | None:
    """The weight rounded and packed for inputs like this one; None where it holds NaN."""
    codes = codes_of(rounder, weight, torch.int8)
    return None if codes is None else Packed(layer.pack_codes(codes, input), codes.scale)


def codes_of(rounder: Rounder, x: Tensor, dtype: torch.dtype) -> ByteCodes | None:
    """x rounded, as codes of the dtype; None where it holds NaN."""
    assert rounder.bytes is not None and rounder.scale is not None
    codes = rounder.codes(x, dtype)
    scale = rounder.scale.detach().clamp(min=least_scale(rounder.scale)) * rounder.bytes.step
    zero_point = 0 if dtype == torch.int8 else rounder.bytes.zero_point
    return None if codes is None else ByteCodes(codes, scale.reshape(-1), zero_point)
