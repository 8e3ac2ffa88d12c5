"""oneDNN's matrix products and convolutions of bytes, through torch: exact integer sums, returned as float32."""

from __future__ import annotations

import logging
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

LONGEST_SUM = (2**31 - 1) // (255 * 128)
"""Number of products of two bytes whose sum always fits into int32."""

_FLOAT_OUTPUT = 1.0, 0, torch.float32, "none", (), ""
"""Output scale, zero point and dtype, and no operation fused behind."""


def pack_matrix(weight: Tensor) -> Tensor:
    """Pack an int8 matrix (out, in) for `multiply`."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    return packed


def multiply(x: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Return scale * ((x - zero_point) W^T) + bias.

    Args:
        x: uint8 (..., in).
        zero_point: Zero point of x.
        packed: W, from `pack_matrix`.
        scale: float32 (1,) or (out,).
        bias: float32 (out,) or None.

    Returns:
        float32 (..., out).
    """
    made: Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero_point, packed, scale, _zero_points(len(scale)), bias, *_FLOAT_OUTPUT
    )
    return made


def pack_filters(weight: Tensor, zero_point: int, place: tuple[Any, ...], shape: torch.Size) -> Tensor:
    """Pack filters for `convolve`.

    Args:
        weight: int8 (out, in / groups, ...).
        zero_point: Zero point of the inputs.
        place: Stride, padding, dilation, groups.
        shape: Shape of the inputs, (N, in, ...).
    """
    scale = torch.ones(1, device="cpu")  # does not affect the packed weight
    packed: Tensor = torch.ops.onednn.qconv_prepack(weight.contiguous(), scale, 1.0, zero_point, *place, list(shape))
    return packed


def convolve(
    x: Tensor, zero_point: int, packed: Tensor, scale: Tensor, bias: Tensor | None, place: tuple[Any, ...]
) -> Tensor:
    """Return scale * ((x - zero_point) * W) + bias, where * is a convolution that pads x with its zero point.

    Args:
        x: uint8 (N, in, ...).
        zero_point: Zero point of x.
        packed: W, from `pack_filters`.
        scale: float32 (1,) or (out,).
        bias: float32 (out,) or None.
        place: Stride, padding, dilation, groups.

    Returns:
        float32 (N, out, ...), with the channels innermost in memory.
    """
    made: Tensor = torch.ops.onednn.qconv_pointwise(
        x, 1.0, zero_point, packed, scale, _zero_points(len(scale)), bias, *place, *_FLOAT_OUTPUT
    )
    return made


def channels_innermost(x: Tensor) -> bool:
    """Whether x (N, C, ...) has its channels innermost in memory (torch's channels_last)."""
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return order is not None and not x.is_contiguous() and x.is_contiguous(memory_format=order)


def multiplies(weight: Tensor, x: Tensor, bias: Tensor | None) -> bool:
    """Whether `multiply` supports these shapes; it does not check them itself.

    Args:
        weight: (out, in), any dtype.
        x: (..., in), any dtype.
        bias: The layer's bias, or None.
    """
    out, features = weight.shape
    return x.dim() > 0 and x.shape[-1] == features <= LONGEST_SUM and _is_plain(bias, out)


def convolves(weight: Tensor, x: Tensor, bias: Tensor | None, zero_point: int, place: tuple[Any, ...]) -> bool:
    """Whether `convolve` is exact for these shapes and x's memory order.

    oneDNN, in torch 2.15, returns arbitrary values if an output depends on padding alone, if strides differ from each
    other, and for single channels of volumes. These cases are excluded; every other case is tested once.

    Args:
        weight: (out, in / groups, ...), any dtype.
        x: (N, in, ...), any dtype.
        bias: The layer's bias, or None.
        zero_point: Zero point of x's codes.
        place: Stride, padding, dilation, groups.
    """
    stride, padding, dilation, groups = place
    axes = list(zip(x.shape[2:], weight.shape[2:], padding, dilation, strict=True))
    fits = all(size + 2 * p > (k - 1) * d for size, k, p, d in axes) and x.shape[1] == weight.shape[1] * groups
    sees = all(2 * p <= (k - 1) * d and size >= d for size, k, p, d in axes)
    single = weight.shape[1] == 1 and len(axes) == 3
    if not (fits and sees) or single or len(set(stride)) > 1 or weight[0].numel() > LONGEST_SUM:
        return False
    if not _is_plain(bias, len(weight)):
        return False
    where = tuple(stride), tuple(padding), tuple(dilation)
    return _tried(weight.shape, x.shape, channels_innermost(x), bool(zero_point), where, groups)


def _is_plain(bias: Tensor | None, channels: int) -> bool:
    """Whether the bias has the memory layout that the operators assume."""
    return bias is None or (bias.shape == (channels,) and bias.is_contiguous() and bias.dtype == torch.float32)


@lru_cache(maxsize=4096)
@torch.no_grad()
def _tried(
    weight_shape: torch.Size, shape: torch.Size, innermost: bool, moved: bool, where: tuple[Any, ...], groups: int
) -> bool:
    with torch.inference_mode(False), torch.device("cpu"):
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        weight = torch.randint(-1, 2, weight_shape, dtype=torch.int8, generator=generator)
        if innermost:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        zero_point, place = 128 if moved else 0, (*where, groups)
        # Sums of these fit float32's 24 bits, in any order.
        plain = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3]
        wanted = plain(x.float() - zero_point, weight.float(), None, *place)
        packed, scale = pack_filters(weight, zero_point, place, x.shape), torch.ones(1)
        made = [convolve(x, zero_point, packed, scale, None, place) for _ in range(2)]
    return all(torch.equal(values, wanted) for values in made)


@cache
def _zero_points(channels: int) -> Tensor:
    """Return the weight's zero points, all 0."""
    with torch.inference_mode(False):
        return torch.zeros(channels, dtype=torch.int64, device="cpu")


@cache
def exact() -> bool:
    """Whether the operators exist and are exact; on processors without VNNI, sums of two products saturate."""
    with torch.device("cpu"):
        return _exact_extremes()


def _exact_extremes() -> bool:
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
