"""WeightGrid: the values that each element of a weight may take, with the scales that the quantizer has chosen.

Reconstruction moves values on this grid and never the grid itself, so that rounding the result in the ordinary way
gives it back bit for bit: files, saved models and evaluation need nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quant.formats import BlockFormat, GroupFormat, mx_element
from quant.kernels.block_formats import round_blocks
from quant.kernels.eager import rounding_params
from quant.kernels.groups import from_rows, group_dim, spread, to_rows
from quant.quant_module import QuantModule
from quant.quant_utils import used_scale
from quant.quantizers.quantizer import Quantizer, Rounder
from quant.reconstruction.matrices import to_matrices

LEAST_SCALE = 1e-300
"""Scale of blocks whose values vanish in float32."""
SETTLING = 4
"""Times that a weight may be rounded again until it no longer changes, by one unit in the last place of its scale."""


@dataclass(frozen=True)
class WeightGrid:
    """The grid of a weight (G, R, C), see `matrices`; all tensors float64, broadcasting to it."""

    scale: Tensor
    """Positive; LEAST_SCALE where only 0 can be stored."""
    low: Tensor
    """Smallest value in units of the scale."""
    high: Tensor
    """Largest value in units of the scale."""
    smallest_power: float
    """See `quant.formats.Rounding`."""
    step: float
    """Distance of the values in [1, 2), in units of the scale."""
    offset: Tensor | None = None
    """LSQ+'s beta, relative to which the weight is rounded."""
    fixed: Tensor | None = None
    """Values that must not change, since others' scales follow from them, in units of the scale; NaN elsewhere."""

    def units(self, weight: Tensor) -> Tensor:
        """Return a weight, or some of its columns, in units of the scale."""
        weight = weight if self.offset is None else weight - self.offset
        return weight / self.scale

    def values(self, units: Tensor) -> Tensor:
        """Return the weight of values in units of the scale."""
        return units * self.scale if self.offset is None else units * self.scale + self.offset

    def step_at(self, units: Tensor) -> Tensor:
        """Return the distance of neighbouring values around these units."""
        power = torch.ldexp(torch.ones_like(units), torch.frexp(units).exponent - 1)
        return power.clamp(min=self.smallest_power) * self.step

    def nearest(self, units: Tensor) -> Tensor:
        """Round to the nearest values, ties to even; both in units of the scale."""
        units = units.clamp(self.low, self.high)
        step = self.step_at(units) if self.smallest_power * self.step != 1 else 1.0
        rounded = torch.round(units / step) * step
        return rounded if self.fixed is None else torch.where(self.fixed.isnan(), rounded, self.fixed)

    def round(self, weight: Tensor) -> Tensor:
        """Round a weight (G, R, C) to the nearest values."""
        return self.values(self.nearest(self.units(weight)))

    def part(self, matrices: slice) -> WeightGrid:
        """Return the grid of some of the G matrices."""
        return self._changed(lambda value: value if len(value) == 1 else value[matrices])

    def columns(self, order: Tensor) -> list[WeightGrid]:
        """Return the grids, (G, R) or broadcasting to it, of columns of each matrix.

        Args:
            order: int64 (G, columns), the columns of each matrix.
        """

        def taken(value: Tensor) -> Sequence[Tensor]:
            if value.shape[2] == 1:
                return [value[:, :, 0]] * order.shape[1]
            index = order.unsqueeze(1).expand(-1, value.shape[1], -1)
            return value.expand(len(order), -1, -1).gather(2, index).movedim(2, 0).contiguous().unbind()

        parts = {name: taken(value) for name, value in self._tensors()}
        return [replace(self, **{name: part[i] for name, part in parts.items()}) for i in range(order.shape[1])]  # type: ignore[arg-type]

    def _changed(self, change: Callable[[Tensor], Tensor]) -> WeightGrid:
        return replace(self, **{name: change(value) for name, value in self._tensors()})  # type: ignore[arg-type]

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = {name: getattr(self, name) for name in ("scale", "low", "high", "offset", "fixed")}
        return [(name, value) for name, value in named.items() if value is not None]


@torch.no_grad()
def grid_of(module: QuantModule) -> WeightGrid:
    """Return the grid of a layer's weight in its current format, under scales fixed from now on.

    A quantizer whose range is 'dynamic' would compute other scales from a weight that has changed; it becomes
    'calibrated'.

    Args:
        module: A layer whose weight format is not float.
    """
    quantizer, weight = module.weight_quantizer, module.weight.detach()
    format = quantizer.format
    if isinstance(format, BlockFormat):
        return _block_grid(module, format)
    _fix_scale(quantizer, weight)
    rounder = quantizer.rounding(weight)
    assert rounder is not None and rounder.scale is not None and rounder.rounding_params is not None
    params = rounder.rounding_params
    low, high = (_wide(module, bound) for bound in params[:2])
    numbers = params.reshape(len(params), -1)[:, 0].tolist()
    offset = None if rounder.offset is None else _wide(module, rounder.offset.detach())
    return WeightGrid(
        _wide(module, used_scale(rounder.scale)), low, high, numbers[2], numbers[3] / (1.5 * 2**23), offset
    )


def _fix_scale(quantizer: Quantizer, weight: Tensor) -> None:
    if quantizer.config.range == "dynamic" and quantizer.format.scaled:
        quantizer.config = replace(quantizer.config, range="calibrated")
        for format in list(quantizer.prepared):
            quantizer.prepare(format)
        quantizer.observe(weight)
        quantizer.finish_calibration()


def _wide(module: QuantModule, values: Tensor) -> Tensor:
    """Return values of a scale's shape as float64 that broadcasts to (G, R, C)."""
    if values.numel() == 1:
        return values.double().view(1, 1, 1)
    weight, dim = module.weight, module.reduction_dim
    format = module.weight_quantizer.format
    if not isinstance(format, GroupFormat):
        return to_matrices(module, values.double().expand(weight.shape))
    rows = to_rows(values.double(), group_dim(dim))
    length = weight[0].numel() if dim is None else weight.shape[dim]
    return to_matrices(module, from_rows(spread(rows, format.size, length), weight.shape, dim))


def _block_grid(module: QuantModule, format: BlockFormat) -> WeightGrid:
    """Return the grid under the block scales of the current weight.

    nvfp4 computes block and tensor scales from the largest values, which therefore stay; those of MX are powers of two,
    and a block whose largest value has shrunk is stored with a smaller one without loss.
    """
    matrices = to_matrices(module, module.weight.detach().float())
    rows = matrices.reshape(-1, matrices.shape[-1])
    elements, scale, tensor_scale = round_blocks(rows, format)
    unit = mx_element(format)[1] if tensor_scale is None else float(tensor_scale)
    wide = spread((scale.double() * unit).clamp(min=LEAST_SCALE), format.block_size, rows.shape[1])
    params = rounding_params(format.element).tolist()
    low, high = (torch.full((1, 1, 1), bound, dtype=torch.float64, device=rows.device) for bound in params[:2])
    fixed = None
    if tensor_scale is not None:
        fixed = torch.where(_is_largest(rows, format.block_size), elements.double(), torch.nan)
        fixed = torch.where(elements.abs() == format.qmax, fixed, torch.nan).view(matrices.shape)
    return WeightGrid(wide.view(matrices.shape), low, high, params[2], params[3] / (1.5 * 2**23), fixed=fixed)


def _is_largest(rows: Tensor, size: int) -> Tensor:
    """Return bool of the shape of rows (n, K): the first value of largest magnitude in each block."""
    padded = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % size), value=-1.0).view(len(rows), -1, size)
    largest = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, padded.argmax(-1, keepdim=True), True)
    return largest.view(len(rows), -1)[:, : rows.shape[1]]


def settled(rounder: Rounder, weight: Tensor) -> Tensor | None:
    """Round a weight until rounding it again changes nothing.

    Args:
        rounder: Rounds the weight in the ordinary way.
        weight: Values on the grid, in the weight's shape and dtype.

    Returns:
        The values that ordinary rounding gives back bit for bit; None if there are none.
    """
    for _ in range(SETTLING):
        rounded = rounder(weight)
        if torch.equal(rounded, weight):
            return weight
        weight = rounded
    return None
