"""A layer's weight and input range as engines store them: elements of a format, scales, zero points."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from quant.channel_groups import groups_of
from quant.engines.rules import holds
from quant.errors import UserError
from quant.formats import (
    BlockFormat,
    FloatFormat,
    FloatOff,
    Format,
    GroupFormat,
    IntFormat,
    MixedFormat,
    mx_element,
    values_per_scale,
)
from quant.kernels.block_formats import round_blocks
from quant.kernels.eager import round_to_grid
from quant.kernels.groups import group_dim, spread, to_rows
from quant.quant_module import QuantModule
from quant.quant_utils import used_scale
from quant.quantizers.quant_params import QuantParams
from quant.quantizers.quantizer import Quantizer, Rounder
from quant.transforms.computed_weights import weight_of


@dataclass(frozen=True)
class RoundedWeight:
    """A rounded weight as elements x scale (nvfp4: x tensor_scale; mxint8: x 1/64).

    For block and group formats, the reduction axis is the last one: elements (rows, K), scale (rows, blocks), one for
    each `in_block` elements; `from_rows` restores the weight's layout. Otherwise elements has the weight's shape, and
    scale broadcasts to it.
    """

    format: IntFormat | FloatFormat | BlockFormat | GroupFormat | MixedFormat
    elements: Tensor
    """float32, values of the element format."""
    scale: Tensor
    """float32; for MX a power of two, without mxint8's 1/64."""
    tensor_scale: Tensor | None = None
    """float32 0-d, of nvfp4."""
    zero_point: Tensor | None = None
    """float32 whole numbers with the scale's shape; the code of an integer is element + zero point."""
    groups: tuple[Tensor, ...] = ()
    """Of a mix of formats: the output channels of each group, int64."""

    @property
    def channels(self) -> int:
        """Axis of the output channels of a weight with a scale for each: the one along which the scales differ."""
        return max(range(self.scale.dim()), key=lambda axis: self.scale.shape[axis])

    @property
    def element(self) -> IntFormat | FloatFormat:
        """Format of the elements; of a mix, the one that holds all values. Raises UserError if none does."""
        if isinstance(self.format, MixedFormat):
            return widest(self.format)
        return self.format.element if isinstance(self.format, BlockFormat | GroupFormat) else self.format

    @property
    def in_block(self) -> int | None:
        """Number of elements that share a scale; None if whole channels or the tensor do."""
        return values_per_scale(self.format)

    def values(self) -> Tensor:
        """Return the values that the layer computes with, bit for bit; float32 with the shape of `elements`."""
        if self.in_block is None:
            return self.elements * self.scale
        unit = mx_element(self.format)[1] if isinstance(self.format, BlockFormat) else 1.0
        values = self.elements * spread(self.scale * unit, self.in_block, self.elements.shape[1])
        return values if self.tensor_scale is None else values * self.tensor_scale


def widest(mix: MixedFormat) -> IntFormat | FloatFormat:
    """Return the format of a mix that holds the values of all the others; raise UserError if none does."""
    found = next((part for part in mix.parts if holds(part, mix)), None)
    if found is None:
        raise UserError(f"{mix}: none of these formats holds the values of the others, as one tensor has to")
    return found


def plain_weight(name: str, module: QuantModule) -> Tensor:
    """Return the float weight of a layer, computed if necessary (weight norm).

    Args:
        name: Name of the layer, for the error.
        module: The layer.

    Raises:
        UserError: If the weight holds NaN or infinity.
    """
    weight = weight_of(module)
    if not bool(weight.isfinite().all()):
        raise UserError(f"layer {name}: its weight holds NaN or infinity and cannot be exported")
    return weight


@torch.no_grad()
def round_weight(name: str, module: QuantModule) -> RoundedWeight | None:
    """Round the weight of a layer in its current format.

    Args:
        name: Name of the layer, for errors.
        module: The layer.

    Returns:
        The rounded weight; None in float.

    Raises:
        UserError: If the weight is not finite or has a learned offset.
    """
    quantizer, weight = module.weight_quantizer, plain_weight(name, module)
    format = quantizer.format
    if isinstance(format, FloatOff):
        return None
    if isinstance(format, BlockFormat):
        rows = to_rows(weight, quantizer.reduction_dim)
        return RoundedWeight(format, *round_blocks(rows, format))
    rounder = quantizer.rounding(weight)
    assert rounder is not None and rounder.scale is not None and rounder.rounding_params is not None
    if isinstance(format, GroupFormat):
        return _round_groups(to_rows(weight.float(), quantizer.reduction_dim), format, rounder, quantizer.reduction_dim)
    if rounder.offset is not None:
        raise UserError(f"layer {name}: its weight has a learned offset (LSQ+), which no export holds")
    scale = used_scale(rounder.scale)
    elements = round_to_grid(weight.float() / scale, rounder.rounding_params)
    zero_point = None
    if not isinstance(format, FloatFormat) and not quantizer.config.symmetric:
        zero_point = (_lowest_codes(quantizer) - rounder.rounding_params[0]).reshape(scale.shape)
    groups = groups_of(module) if isinstance(format, MixedFormat) else []
    return RoundedWeight(format, elements, scale.detach(), zero_point=zero_point, groups=tuple(groups))


def _lowest_codes(quantizer: Quantizer) -> Tensor | float:
    """Return the smallest code of the current integers, for each channel of a mix; minifloats have zero point 0."""
    format = quantizer.format
    parts = format.parts if isinstance(format, MixedFormat) else (format,)
    lowest: Tensor | float = 0.0
    for number, part in enumerate(parts):
        used = quantizer.used_range(part)  # type: ignore[arg-type]
        low = used.bounds("full")[0] if isinstance(used, IntFormat) else -used.qmax
        lowest = low if len(parts) == 1 else torch.where(quantizer.channel_group == number, low, lowest)
    return lowest


def _round_groups(rows: Tensor, format: GroupFormat, rounder: Rounder, dim: int | None) -> RoundedWeight:
    """Round a weight, (rows, K), in groups."""
    assert rounder.scale is not None and rounder.rounding_params is not None
    along = group_dim(dim)
    scale, params = to_rows(rounder.scale, along), rounder.rounding_params
    wide = spread(scale, format.size, rows.shape[1])
    if params.dim() == 1:
        return RoundedWeight(format, round_to_grid(rows / wide, params), scale)
    own = torch.stack([to_rows(number, along) for number in params])
    elements = round_to_grid(rows / wide, spread(own, format.size, rows.shape[1]))
    return RoundedWeight(format, elements, scale, zero_point=format.element.bounds("full")[0] - own[0])


@dataclass(frozen=True)
class StaticRange:
    """The fixed range of a layer's input: scale, zero point and bounds of the grid."""

    format: IntFormat | FloatFormat
    scale: float
    zero_point: int
    """0 for minifloats and symmetric integers."""
    low: float
    """Smallest value of the grid, in units of the scale."""
    high: float
    """Largest value of the grid, in units of the scale."""
    offset: float | None = None
    """LSQ+: subtracted from the input before rounding, and added afterwards."""


def static_range(name: str, module: QuantModule) -> StaticRange | None:
    """Return the fixed range of a layer's input; formats without a scale, such as bf16, have scale 1.

    Args:
        name: Name of the layer, for errors.
        module: The layer.

    Returns:
        The range; None in float, in block formats and for dynamic ranges.

    Raises:
        UserError: If the range was never calibrated, or has a scale per channel.
    """
    quantizer = module.input_quantizer
    format: Format = quantizer.format
    if not isinstance(format, IntFormat | FloatFormat):
        return None
    if not format.scaled:
        return StaticRange(format, 1.0, 0, -format.qmax, format.qmax)
    params = _fixed_params(quantizer)
    if params is None:
        return None
    if not params.is_ready:
        raise UserError(f"layer {name}: its {format} inputs were never calibrated: call quant.convert.calibrate first")
    if params.scale.numel() > 1:
        raise UserError(
            f"layer {name}: its inputs have a scale for each channel (--act_per_channel), which no export holds"
        )
    params.keep_positive()
    zero_point = int(params.zero_point) if params.moved else 0
    low, high = params.rounding_params[:2].flatten().tolist()
    offset = None if params.offset is None else float(params.offset.detach())
    return StaticRange(format, float(used_scale(params.scale)), zero_point, low, high, offset)


def _fixed_params(quantizer: Quantizer) -> QuantParams | None:
    """Return the parameters that calibration sets for the current format; None if it sets none."""
    format = quantizer.format
    fixed = isinstance(format, IntFormat | FloatFormat) and format.scaled and quantizer.config.range != "dynamic"
    return cast(QuantParams, quantizer.grids[format.name]) if fixed else None


def never_called(modules: Mapping[str, QuantModule]) -> dict[str, QuantModule]:
    """Return the layers that calibration never reached although it reached others: the model does not call them.

    Code that reads their weights without calling them reads these in float.

    Args:
        modules: The quantized layers, by name.
    """
    inputs = {name: module.input_quantizer for name, module in modules.items()}
    reached = {
        name: any(cast(QuantParams, params).is_ready for params in own.grids.values()) for name, own in inputs.items()
    }
    if not any(reached.values()):
        return {}
    return {name: modules[name] for name, own in inputs.items() if _fixed_params(own) is not None and not reached[name]}
