"""oneDNN's products and convolutions of bytes, as torch has them: exact sums of integers, given out as float32."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

LONGEST_SUM = (2**31 - 1) // (255 * 128)
"""products of two bytes that int32 holds the sum of, whatever they are"""

_FLOAT_OUTPUT = 1.0, 0, torch.float32, "none", (), ""
"""scale, zero point, dtype, and no further operation"""


def pack_matrix(weight: Tensor) -> Tensor:
    """int8 (out, in) as `multiply` reads it."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
    return packed


def multiply(x: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """scale * ((x - zero_point) W^T) + bias, float32 (..., out); x uint8 (..., in), scale float32 (1,) or (out,)."""
    made: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero_point, packed, scale, _zero_points(len(scale)), bias, *_FLOAT_OUTPUT
    )
    return made


def pack_filters(weight: Tensor, zero_point: int, place: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """int8 (out, in / groups, ...) as `convolve` reads it for inputs of that shape and zero point."""
    scale = torch.ones(1)  # of no effect on the packed weight
    packed: Tensor = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, zero_point, *place, list(shape))
    return packed


def convolve(
    x: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None, place: tuple[Any, ...]
) -> Tensor:
    """scale * ((x - zero_point) * W) + bias, float32 (N, out, ...) with the channels innermost in memory.

    x uint8 (N, in, ...), padded with its zero point; scale float32 (1,) or (out,); place: stride, padding, dilation,
    groups.
    """
    made: Tensor = torch.ops.onednn.qconv_pointwise(
        x, 1.0, zero_point, packed, scale, _zero_points(len(scale)), bias, *place, *_FLOAT_OUTPUT
    )
    return made


@cache
def _zero_points(channels: int) -> Tensor:
    """The weight's, for so many scales: none."""
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=torch.int64)


@cache
def exact() -> bool:
    """Whether the operators are here and exact: on processors without VNNI, sums of two products saturate."""
    x = torch.full((8, 64), 255, dtype=torch.uint8)
    weight = torch.tensor([[127], [-127], [1]], dtype=torch.int8).repeat(1, 64)
    images, filters, place = x.view(8, 64, 1, 1), weight.view(3, 64, 1, 1), ([1, 1], [0, 0], [1, 1], 1)
    wanted, scale = ((x.long() - 3) @ weight.long().t()).float(), torch.ones(3)
    try:
        rows = multiply(x, 3, pack_matrix(weight), scale, None)
        pixels = convolve(images, 3, pack_filters(filters, 3, place, images.shape), scale, None, place)
    except (AttributeError, RuntimeError) as error:
        logger.info("layers of integers are computed in float32: %s", error)
        return False
    return torch.equal(rows, wanted) and torch.equal(pixels.view(8, 3), wanted)
