"""Layers computed in integers: if weight and input fit into bytes, oneDNN multiplies their codes.

Rounding then writes one byte per value instead of four, and the forward pass is several times as fast as in float32 on
processors with int8 instructions (benchmarks/SPEED.md). The integer sums are exact and only their result is rounded to
float32, so a layer's output is more accurate than with float32 products of rounded tensors. Gradients are computed in
float32, on the values that the codes represent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from quant.formats import ByteGrid
from quant.kernels.dispatch import kernels
from quant.quant_utils import least_scale
from quant.quantizers.quantizer import Rounder


class Packed(NamedTuple):
    """A weight in the layout that oneDNN reads."""

    codes: Tensor
    scale: Tensor
    """float32 (1,) or (channels,)."""


class ByteCodes(NamedTuple):
    """A tensor whose values are scale * (codes - zero_point)."""

    codes: Tensor
    """uint8 for inputs, int8 for weights."""
    scale: Tensor
    """float32 (1,) or (channels,)."""
    zero_point: int


class ByteLayer(Protocol):
    """A layer whose arithmetic oneDNN implements for bytes."""

    def takes_codes(self, input: Tensor, weight: Tensor, zero_point: int) -> bool:
        """Whether the two methods below reproduce the float layer.

        Args:
            input: The layer's input.
            weight: The layer's weight.
            zero_point: Zero point of the input's codes.
        """

    def pack_codes(self, weight: ByteCodes, input: ByteCodes) -> Tensor:
        """Return the weight as the kernel reads it.

        Args:
            weight: int8 codes.
            input: uint8 codes; only shape and zero point matter.
        """

    def compute_codes(self, input: ByteCodes, packed: Tensor, scale: Tensor) -> Tensor:
        """Return the layer's output.

        Args:
            input: uint8 codes.
            packed: What `pack_codes` returned.
            scale: Scale of the products, float32 (1,) or (out_channels,).

        Returns:
            float32, with the shape and memory order of the float layer's output.
        """


def fits_bytes(layer: ByteLayer, x: Tensor, weight: Tensor, x_bytes: ByteGrid | None, w_bytes: ByteGrid | None) -> bool:
    """Whether the layer can be computed on codes in the current context.

    Args:
        layer: The layer.
        x: Its input.
        weight: Its weight.
        x_bytes: Byte codes of the input's format, None if there are none.
        w_bytes: Byte codes of the weight's format, None if there are none.
    """
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
    """Compute the layer's output in integers; `fits_bytes` must hold.

    Args:
        layer: The layer.
        x: Its input, float32.
        x_rounder: Rounds x.
        pack: Returns the packed weight for inputs with these codes.

    Returns:
        The output, float32; None if x or the weight holds NaN, which has no code.
    """
    input = codes_of(x_rounder, x, torch.uint8)
    packed = None if input is None else pack(input)
    if input is None or packed is None:
        return None
    return layer.compute_codes(input, packed.codes, input.scale * packed.scale)


def pack_weight(layer: ByteLayer, rounder: Rounder, weight: Tensor, input: ByteCodes) -> Packed | None:
    """Round the weight and pack it for inputs like this one.

    Args:
        layer: The layer.
        rounder: Rounds the weight.
        weight: The weight, float32.
        input: The input's codes.

    Returns:
        The packed weight; None if the weight holds NaN.
    """
    codes = codes_of(rounder, weight, torch.int8)
    return None if codes is None else Packed(layer.pack_codes(codes, input), codes.scale)


def codes_of(rounder: Rounder, x: Tensor, dtype: torch.dtype) -> ByteCodes | None:
    """Round x to byte codes.

    Args:
        rounder: Rounds x; has byte codes.
        x: float32, any shape.
        dtype: torch.uint8 or torch.int8.

    Returns:
        The codes with x's shape; None if x holds NaN.
    """
    assert rounder.bytes is not None and rounder.scale is not None
    codes = rounder.codes(x, dtype)
    scale = rounder.scale.detach().clamp(min=least_scale(rounder.scale)) * rounder.bytes.step
    zero_point = 0 if dtype == torch.int8 else rounder.bytes.zero_point
    return None if codes is None else ByteCodes(codes, scale.reshape(-1), zero_point)
