"""Quantizer: one tensor's format, scale and zero point: dynamic, calibrated or learned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from quant.formats import FLOAT, BlockFormat, ByteGrid, FloatFormat, FloatOff, Format, IntFormat, parse_format
from quant.kernels.block_formats import block_gradients, round_in_blocks
from quant.kernels.eager import kernels
from quant.kernels.emulation import emulate, emulate_grid
from quant.modes import recorded
from quant.quant_utils import (
    MIN_LEARNED_SCALE,
    fake_quantize,
    fake_quantize_row,
    least_scale,
    lsq_gradient_scale,
    rounding_row,
    scale_from_range,
)
from quant.quantizers.observers import (
    AVERAGING,
    OBSERVERS,
    Observer,
    RangeEstimator,
    on_weights,
    percentile_observer,
    token_observer,
)
from quant.quantizers.quant_params import Grid
from quant.validation import check_choices


@dataclass(frozen=True)
class QuantizerConfig:
    """How the scale of one tensor is found."""

    range: Literal["dynamic", "calibrated", "learned"] = "learned"
    """dynamic: from the tensor itself at every use. calibrated: fixed by `calibrate`. learned: LSQ, from there on"""
    granularity: Literal["tensor", "channel", "token"] = "tensor"
    """what shares a scale: the whole tensor, a channel (of weights an output channel, of activations an input channel),
    or the features of one token (activations)"""
    observer: str = "mse"
    """range estimator, a name of `OBSERVERS`; percentile > 0 replaces it"""
    percentile: float = 0.0
    """percentile of |x| in (0, 100] at which the range is clipped; 0: use the observer"""
    symmetric: bool = True
    """integers: a symmetric grid; False moves the grid by a zero point (unsigned after ReLU)"""
    learned_offset: bool = False
    """LSQ+: an asymmetric integer grid is moved by a learned number instead of a zero point; range 'learned' only"""
    reduce_range: bool = False
    """weights: int8 uses 7 of its bits, so that processors without VNNI, whose sums of two int8 products saturate at 16
    bits, compute them right (ONNX Runtime calls it reduce_range too)"""
    ignore_padding: bool = False
    """activations: leave out the tokens that a batch's `attention_mask` says are padding"""

    def __post_init__(self) -> None:
        if self.observer not in OBSERVERS:
            raise ValueError(f"observer must be one of {', '.join(OBSERVERS)}, got {self.observer!r}")
        check_choices(self)
        if self.granularity == "token" and self.range != "dynamic":
            raise ValueError(
                f"per-token scales exist only while the token does: range must be dynamic, got {self.range}"
            )
        if self.granularity != "tensor" and self.observer in AVERAGING and not self.percentile:
            raise ValueError(
                f"observer {self.observer} averages over batches and needs granularity tensor, got {self.granularity}"
            )
        if self.learned_offset and (self.range != "learned" or self.symmetric):
            raise ValueError(
                f"learned_offset needs range learned and symmetric False, got {self.range} and {self.symmetric}"
            )
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must lie in (0, 100], or be 0 for none, got {self.percentile}")

    @property
    def estimator(self) -> Observer:
        """What watches the tensor and chooses its range."""
        return percentile_observer(self.percentile) if self.percentile else OBSERVERS[self.observer]


WEIGHT = QuantizerConfig(granularity="channel")
ACTIVATION = QuantizerConfig(symmetric=False)


class Quantizer(nn.Module):
    """Rounds one tensor to the format it is set to; formats change at every step without a new module or graph.

    Args:
        config: how scales are found.
        shape: of the scale, broadcasting to the tensor: () for per tensor, (C, 1, 1, 1) for a Conv2d's weight.
        reduction_dim: axis along which block formats form their blocks, None: all but the first, flattened.
        batched: an axis before all others is the batch (activations), which LSQ's gradient scale does not count.
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
        self.observation: Any = None
        """what the observer has seen so far"""
        self.saw_finite: Tensor | bool = True
        """whether all of that is finite: bool 0-d on the device of what was seen, since reading it stalls a GPU"""
        self.token_quantiles: dict[str, float] = {}
        """'avg_prune_minmax': name of a format -> quantile of the token bounds at which it clips, see `clip_tokens`"""
        self.real_tokens: tuple[Tensor, ...] = ()
        """bool (B, T) of each sequence that is read: False for tokens to leave out of what is observed, (B, T, ...)"""

    def prepare(self, format: Format) -> None:
        """Make room for the scale of `format`. Learned scales must exist before the optimizer does."""
        self.prepared.add(format)
        if not format.scaled or self.config.range == "dynamic" or format.name in self.grids:
            return
        assert isinstance(format, IntFormat | FloatFormat)
        learned, symmetric = self.config.range == "learned", self.config.symmetric
        with torch.inference_mode(False):
            self.grids[format.name] = Grid(
                self.used_range(format), self.shape, learned, symmetric, self.anchor.device, self.config.learned_offset
            )

    def used_range(self, format: IntFormat | FloatFormat) -> IntFormat | FloatFormat:
        """The format whose codes are used of `format`: of int8 those of int7 under `reduce_range`."""
        return IntFormat(7) if self.config.reduce_range and format == IntFormat(8) else format

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
        if not self.grids:
            return
        x = without_padding(x, self.real_tokens)
        if x.numel():
            self.observation = self._see(x, self.observation)
            self.saw_finite = all_finite(x) & self.saw_finite

    def forget(self) -> None:
        """Start observing anew."""
        self.observation, self.saw_finite = None, True

    def finish_calibration(self, only: Format | None = None, again: bool = True) -> None:
        """Set the scale of every prepared format (or of `only`) from what was observed, and forget that.

        again: also where there is a scale already.
        """
        for name, grid in self.grids.items():
            if (only is None or name == only.name) and (again or not cast(Grid, grid).is_ready):
                clipped = token_observer(self.token_quantiles[name]) if name in self.token_quantiles else None
                self.set_ranges(clipped or self.estimator, parse_format(name))
        self.forget()

    @torch.no_grad()
    def set_ranges(self, estimate: RangeEstimator, format: Format) -> None:
        """Set the scale of a prepared format to what `estimate` makes of the observation, if there is one."""
        if self.observation is None or format.name not in self.grids:
            return
        grid = cast(Grid, self.grids[format.name])
        low, high = estimate(self.observation, grid.format, self.config.symmetric)
        scale, zero_point = scale_from_range(low, high, grid.format, self.config.symmetric)
        grid.set(scale.clamp(min=MIN_LEARNED_SCALE), zero_point)

    @property
    def estimator(self) -> Observer:
        """What watches the tensor and chooses its range: of weights, which have no batch, the whole of them."""
        observer = self.config.estimator
        return observer if self.batched else on_weights(observer, guarded=not self.config.percentile)

    def _see(self, x: Tensor, before: Any) -> Any:
        """What the observer keeps of x, on top of what it kept before."""
        observer = self.estimator
        return observer.see(self._tokens(x) if observer.per_token else self._grouped(x), before)

    def _tokens(self, x: Tensor) -> Tensor:
        """x as (tokens, features); the features of a convolution's position are its channels."""
        rows = x if self.reduction_dim is None else x.movedim(self.reduction_dim, -1)
        return rows.reshape(-1, rows.shape[-1])

    def _grouped(self, x: Tensor) -> Tensor:
        """x as (groups, values), one group for each scale."""
        if math.prod(self.shape) == 1:
            return x.reshape(1, -1)
        axes = [d - len(self.shape) for d, size in enumerate(self.shape) if size > 1]
        return x.movedim(axes, list(range(len(axes)))).reshape(math.prod(self.shape), -1)

    # ------------------------------------------------------ rounding

    @property
    def bytes(self) -> ByteGrid | None:
        """How values of the format set now are held in bytes, None where they are not."""
        return cast(Grid, self.grids[self.format.name]).bytes if self.format.name in self.grids else None

    def grid_tensors(self) -> list[Tensor]:
        """What is held of the format set now: everything but x that the rounding depends on."""
        if self.format.name not in self.grids:
            return []
        grid = self.grids[self.format.name]
        return [*grid.parameters(), *grid.buffers()]

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
        grid.keep_positive()
        gradient = lsq_gradient_scale(self._elements(x) // grid.scale.numel(), grid.largest_code)
        # A sum over channels of inputs with a scale each is no sum of integers.
        bytes = grid.bytes if grid.scale.numel() == 1 or not self.batched else None
        return Rounder(scale=grid.scale, row=grid.row, gradient_scale=gradient, offset=grid.offset, bytes=bytes)

    def _elements(self, x: Tensor) -> int:
        """Of one example."""
        alone = self.reduction_dim is not None and x.dim() + self.reduction_dim <= 0  # an example without a batch axis
        return x.numel() // x.shape[0] if self.batched and not alone else x.numel()

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
        format = self.used_range(format)
        shape = list(self.shape)
        if self.config.granularity == "token":
            assert self.reduction_dim is not None
            shape = list(x.shape)
            shape[self.reduction_dim] = 1
            seen = self.estimator.see(self._tokens(x), None)
        else:
            seen = self._see(x, None)
        low, high = self.estimator(seen, format, self.config.symmetric)
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
    offset: Tensor | None = None
    """LSQ+'s beta: what the middle of the grid stands at"""
    bytes: ByteGrid | None = None
    """how the rounded values are held in bytes, where they fit"""

    @property
    def plain(self) -> bool:
        """Whether it is a rounding and nothing else, whose `gradients` are known."""
        return self.offset is None

    def recordable(self, x: Tensor) -> Tensor:
        """The same values for finite x, in operations that torch.export and torch.jit.trace record; no gradients."""
        if self.row is None or self.scale is None:
            assert isinstance(self.format, BlockFormat)
            return emulate(x, self.format, self.dim).to(x.dtype)
        scale = self.scale.clamp(min=least_scale(self.scale))
        centred = x.float() if self.offset is None else x.float() - self.offset
        rounded = emulate_grid(centred / scale, self.row) * scale
        return (rounded if self.offset is None else rounded + self.offset).to(x.dtype)

    def values(self, x: Tensor) -> Tensor:
        """If plain: the same as calling it, past autograd."""
        if self.row is None or self.scale is None:
            assert isinstance(self.format, BlockFormat)
            return round_in_blocks(x, self.format, self.dim)
        return kernels().round(x, self.scale, self.row, least_scale(self.scale))

    def codes(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """If plain: x as codes of `bytes`, uint8 or int8; None where x holds NaN or the kernels do not know."""
        assert self.bytes is not None and self.scale is not None and self.row is not None
        return kernels().codes(x, self.scale, self.row, least_scale(self.scale), self.bytes, dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, scale: Tensor | None, learned: bool, again: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """If plain: for x and, if learned, for scale, from the gradient of what it gave; and that `again` if asked.

        `grad` may be overwritten. scale: the one of the forward pass, as autograd has saved it.
        """
        if self.row is None or scale is None:
            assert isinstance(self.format, BlockFormat)
            dx, rounded = block_gradients(grad, x, self.format, self.dim, again=again, reuse=True)
            return dx, None, rounded
        dx, dscale, rounded = kernels().gradients(
            grad, x, scale, self.row, least_scale(scale), learned=learned, again=again, reuse=True
        )
        return dx, None if dscale is None else dscale * self.gradient_scale, rounded

    def __call__(self, x: Tensor) -> Tensor:
        if recorded():
            return self.recordable(x)
        if self.row is None or self.scale is None:
            return fake_quantize(x, self.format, dim=self.dim)
        if self.offset is None:
            return fake_quantize_row(x, self.scale, self.row, self.gradient_scale)
        # The offset's gradient is what autograd makes of this: all of g, less what passes inside the range.
        offset = _with_gradient_scaled(self.offset, self.gradient_scale)
        moved = fake_quantize_row(x.float() - offset, self.scale, self.row, self.gradient_scale)
        return (moved + offset).to(x.dtype)


def _with_gradient_scaled(offset: Tensor, factor: float) -> Tensor:
    """The same values, whose gradient is multiplied: LSQ+ (arXiv 2004.09576) scales those of offsets as of scales."""
    return offset.detach() + (offset - offset.detach()) * factor


def all_finite(x: Tensor) -> Tensor:
    """Whether x holds neither NaN nor infinity, bool 0-d: both show in its extrema, which take one pass and no copy."""
    return torch.stack(x.detach().aminmax()).isfinite().all()


def without_padding(x: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """The tokens of x where the mask (B, T) of its shape is true: (tokens, ...). x itself where no mask fits."""
    for real in masks:
        if x.dim() >= 3 and x.shape[:2] == real.shape:
            return x[real]
        if x.dim() == 2 and len(x) == real.numel():
            return x[real.flatten()]
    return x
