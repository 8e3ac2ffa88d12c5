"""Quantizer: one tensor's format, scale and zero point: dynamic, calibrated or learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_type_hints

import torch
from torch import Tensor, nn

from quant.formats import FLOAT, BlockFormat, FloatFormat, FloatOff, Format, IntFormat, parse_format
from quant.grid import Grid
from quant.observers import OBSERVERS, Observation, RangeEstimator, minmax_range, observe, percentile_range
from quant.quant_utils import (
    MIN_LEARNED_SCALE,
    fake_quantize,
    fake_quantize_row,
    lsq_gradient_scale,
    rounding_row,
    scale_from_range,
)


@dataclass(frozen=True)
class QuantizerConfig:
    """How the scale of one tensor is found."""

    range: Literal["dynamic", "calibrated", "learned"] = "learned"
    """dynamic: from the tensor itself at every use. calibrated: fixed by `calibrate`. learned: LSQ, from there on"""
    granularity: Literal["tensor", "channel", "token"] = "tensor"
    """what shares a scale: the whole tensor, an output channel (weights), the features of one token (activations)"""
    observer: Literal["minmax", "mse"] = "mse"
    """range estimator; percentile > 0 replaces it"""
    percentile: float = 0.0
    """percentile of |x| in (0, 100] at which the range is clipped; 0: use the observer"""
    symmetric: bool = True
    """integers: a symmetric grid; False moves the grid by a zero point (unsigned after ReLU)"""

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(type(self)).items():
            if (choices := get_args(hint)) and getattr(self, field) not in choices:
                raise ValueError(f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}")
        if self.granularity == "token" and self.range != "dynamic":
            raise ValueError(
                f"per-token scales exist only while the token does: range must be dynamic, got {self.range}"
            )
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must lie in (0, 100], or be 0 for none, got {self.percentile}")

    @property
    def estimator(self) -> RangeEstimator:
        return percentile_range(self.percentile) if self.percentile else OBSERVERS[self.observer]


WEIGHT = QuantizerConfig(granularity="channel")
ACTIVATION = QuantizerConfig(symmetric=False)


class Quantizer(nn.Module):
    """Rounds one tensor to the format it is set to; formats change at every step without a new module or graph.

    Args:
        config: how scales are found.
        shape: of the scale, broadcasting to the tensor: () for per tensor, (C, 1, 1, 1) for a Conv2d's weight.
        reduction_dim: axis along which block formats form their blocks, None: all but the first, flattened.
        batched: the tensor's first axis is the batch (activations), which LSQ's gradient scale does not count.
    """

    anchor: Tensor

    def __init__(
        self,
        config: QuantizerConfig,
        shape: tuple[int, ...] = (),
        reduction_dim: int | None = -1,
        batched: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.reduction_dim = reduction_dim
        self.batched = batched
        self.register_buffer("anchor", torch.empty(0, device=device), persistent=False)  # where new scales belong
        self.format: Format = FLOAT
        self.grids = nn.ModuleDict()
        self.prepared: set[Format] = set()
        self.observation: Observation | None = None

    def prepare(self, format: Format) -> None:
        """Make room for the scale of `format`. Learned scales must exist before the optimizer does."""
        self.prepared.add(format)
        if not format.scaled or self.config.range == "dynamic" or format.name in self.grids:
            return
        assert isinstance(format, IntFormat | FloatFormat)
        learned, symmetric = self.config.range == "learned", self.config.symmetric
        with torch.inference_mode(False):
            self.grids[format.name] = Grid(format, self.shape, learned, symmetric, self.anchor.device)

    def set_format(self, format: Format) -> None:
        """Round to `format` from now on."""
        if format not in self.prepared:
            self.prepare(format)
        self.__dict__["format"] = format  # past nn.Module's bookkeeping: this runs for every layer at every step

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Makes room for the formats that are loaded: a freshly quantized model takes what a trained one saved."""
        start = f"{prefix}grids."
        for key in state_dict:
            if key.startswith(start):
                self.prepare(parse_format(key.removeprefix(start).split(".")[0]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ------------------------------------------------------ calibration

    def observe(self, x: Tensor) -> None:
        """Add x to what `finish_calibration` will choose ranges from."""
        if x.numel() == 0 or not self.grids:
            return
        seen = observe(self._grouped(x))
        self.observation = seen if self.observation is None else self.observation.merge(seen)

    @torch.no_grad()
    def finish_calibration(self, only: Format | None = None) -> None:
        """Set the scale of every prepared format (or of `only`) from what was observed, and forget that."""
        if self.observation is None:
            return
        for name, grid in self.grids.items():
            if only is None or name == only.name:
                grid = cast(Grid, grid)
                low, high = self.config.estimator(self.observation, grid.format, self.config.symmetric)
                scale, zero_point = scale_from_range(low, high, grid.format, self.config.symmetric)
                grid.set(scale.clamp(min=MIN_LEARNED_SCALE), zero_point)
        self.observation = None

    def _grouped(self, x: Tensor) -> Tensor:
        """x as (groups, values), one group for each scale."""
        if math.prod(self.shape) == 1:
            return x.reshape(1, -1)
        axis = next(d for d, size in enumerate(self.shape) if size > 1)
        return x.movedim(axis, 0).reshape(x.shape[axis], -1)

    # ------------------------------------------------------ rounding

    def forward(self, x: Tensor) -> Tensor:
        """x rounded: same shape and dtype. Raises RuntimeError in eval mode if the format was never calibrated."""
        rounding = self.rounding(x)
        return x if rounding is None else rounding(x)

    def rounding(self, x: Tensor) -> Rounder | None:
        """What rounds x now, with the scale of this moment; None in float."""
        format = self.format
        if isinstance(format, FloatOff) or x.numel() == 0:
            return None
        if isinstance(format, BlockFormat):
            return Rounder(format=format, dim=self.reduction_dim)
        if not format.scaled or self.config.range == "dynamic":
            scale, row = self._dynamic(x, format)
            return Rounder(scale=scale, row=row)
        grid = cast(Grid, self.grids[format.name])
        if not grid.is_ready:
            if self.observation is not None:
                return None  # in the middle of the calibration that will find its scale
            self._calibrate_on(x, format)
        elements = x.numel() // x.shape[0] if self.batched else x.numel()
        gradient = lsq_gradient_scale(elements // grid.scale.numel(), grid.largest_code)
        return Rounder(scale=grid.scale, row=grid.row, gradient_scale=gradient)

    def _calibrate_on(self, x: Tensor, format: Format) -> None:
        if self.batched and not self.training:
            raise RuntimeError(
                f"activation ranges of {format} were never calibrated: call quant.convert.calibrate(...) first, or "
                "quantize the model with activation range 'dynamic'"
            )
        self.observe(x)
        self.finish_calibration(only=format)

    @torch.no_grad()
    def _dynamic(self, x: Tensor, format: IntFormat | FloatFormat) -> tuple[Tensor, Tensor]:
        """Scale and row from x itself."""
        if not format.scaled:
            return torch.ones((), device=x.device), rounding_row(format, device=x.device)
        groups, shape = self._grouped(x), list(self.shape)
        if self.config.granularity == "token":  # the features of a convolution's position are its channels
            assert self.reduction_dim is not None
            tokens, shape = x.movedim(self.reduction_dim, -1), list(x.shape)
            groups, shape[self.reduction_dim] = tokens.reshape(-1, tokens.shape[-1]), 1
        estimator = self.config.estimator
        seen = observe(groups, sample=estimator is not minmax_range)
        low, high = estimator(seen, format, self.config.symmetric)
        scale, zero_point = scale_from_range(low, high, format, self.config.symmetric)
        zero_point = None if zero_point is None else zero_point.view(shape)
        return scale.view(shape), rounding_row(format, zero_point, device=x.device)

    def extra_repr(self) -> str:
        return f"format={self.format}, range={self.config.range}, granularity={self.config.granularity}"


@dataclass(frozen=True)
class Rounder:
    """One tensor's rounding as decided at one moment; calling it again gives the same values."""

    scale: Tensor | None = None
    row: Tensor | None = None
    gradient_scale: float = 1.0
    format: Format = FLOAT
    dim: int | None = -1

    def __call__(self, x: Tensor) -> Tensor:
        if self.row is None or self.scale is None:
            return fake_quantize(x, self.format, dim=self.dim)
        return fake_quantize_row(x, self.scale, self.row, self.gradient_scale)
