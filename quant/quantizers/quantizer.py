"""Quantizer: rounds one tensor to a format, with dynamic, calibrated or learned scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from quant.errors import UserError
from quant.formats import (
    FLOAT,
    BlockFormat,
    ByteGrid,
    FloatFormat,
    FloatOff,
    Format,
    GroupFormat,
    IntFormat,
    MixedFormat,
    group_sizes,
    parse_format,
)
from quant.kernels.block_formats import block_gradients, round_in_blocks
from quant.kernels.dispatch import kernels
from quant.kernels.eager import Gradients, Operands
from quant.kernels.emulation import emulate, emulate_grid
from quant.kernels.groups import (
    FakeQuantizeGroups,
    emulate_groups,
    from_rows,
    group_dim,
    group_gradients,
    half_scale,
    join_groups,
    round_in_groups,
    scale_shape,
    split_groups,
    to_rows,
)
from quant.module_utils import is_tracing
from quant.quant_utils import (
    MIN_LEARNED_SCALE,
    fake_quantize,
    fake_quantize_with_params,
    least_scale,
    lsq_gradient_scale,
    rounding_params,
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
from quant.quantizers.quant_params import QuantParams
from quant.quantizers.weighted_mse import InputSketch, Weighed
from quant.validation import WEIGHTS_ONLY, check_choices


@dataclass(frozen=True)
class QuantizerConfig:
    """How the scales of one tensor are chosen."""

    range: Literal["dynamic", "calibrated", "learned"] = "learned"
    """dynamic: from the tensor at every use. calibrated: fixed by `calibrate`. learned: calibrated, then trained
    (LSQ)."""
    granularity: Literal["tensor", "channel", "token"] = "tensor"
    """What shares a scale: the whole tensor, a channel (weights: an output channel; activations: an input channel), or
    the features of one token (activations only)."""
    observer: str = "mse"
    """Range estimator, a name of `OBSERVERS`; percentile > 0 replaces it. 'weighted_mse', for weights alone, needs
    `calibrate`, and acts as 'mse' on layers that it does not call."""
    percentile: float = 0.0
    """Percentile of |x| in (0, 100] at which the range is clipped; 0: use the observer."""
    symmetric: bool = True
    """Integers: a symmetric grid; False moves the grid by a zero point (unsigned after ReLU)."""
    learned_offset: bool = False
    """LSQ+: a learned offset replaces the zero point of an asymmetric integer grid; range 'learned' only."""
    reduce_range: bool = False
    """Weights: int8 uses only 7 bits. On processors without VNNI, the sum of two int8 products saturates at 16 bits; 7
    bits avoid this (ONNX Runtime's reduce_range)."""
    ignore_padding: bool = False
    """Activations: leave out padding tokens, according to a batch's `attention_mask`."""
    channel_groups: int = 1
    """Weights: groups of output channels that may differ in format, see `quant.channel_groups`."""

    def __post_init__(self) -> None:
        if self.channel_groups > 1 and (self.granularity != "channel" or self.learned_offset):
            raise ValueError(
                f"channel_groups {self.channel_groups} needs granularity channel and no learned_offset, "
                f"got {self.granularity} and {self.learned_offset}"
            )
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
        """The observer that chooses the tensor's range."""
        return percentile_observer(self.percentile) if self.percentile else OBSERVERS[self.observer]


WEIGHT = QuantizerConfig(granularity="channel", observer="weighted_mse")
ACTIVATION = QuantizerConfig(symmetric=False)


class Quantizer(nn.Module):
    """Rounds one tensor to the format it is set to; formats can change at every step without a new module or graph.

    Args:
        config: How scales are chosen.
        shape: Shape of the scale, broadcasting to the tensor: () per tensor, (C, 1, 1, 1) for a Conv2d's weight.
        reduction_dim: Axis along which block formats form their blocks; None: all but the first, flattened.
        batched: Whether the first axis is the batch (activations), which LSQ's gradient scale does not count.
        device: Device of the scales.
        weight_shape: Shape of the weight; without it there are no group formats.
    """

    anchor: Tensor
    channel_group: Tensor
    """With `channel_groups`: the group of each output channel, uint8 of the scale's shape; part of the state dict."""

    def __init__(
        self,
        config: QuantizerConfig,
        shape: tuple[int, ...] = (),
        reduction_dim: int | None = -1,
        batched: bool = True,
        device: torch.device | str = "cpu",
        weight_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.shape = shape
        self.weight_shape = weight_shape
        self.reduction_dim = reduction_dim
        self.batched = batched
        self.register_buffer("anchor", torch.empty(0, device=device), persistent=False)  # device of new scales
        self.format: Format = FLOAT
        self.grids = nn.ModuleDict()
        """Format name -> its `QuantParams`. The name `grids` is part of the keys of saved state dicts."""
        self.prepared: set[Format] = set()
        self.observation: Any = None
        """What the observer has seen so far."""
        self.saw_finite: Tensor | bool = True
        """Whether all of that is finite: bool 0-d, on the device of the data because reading it would stall a GPU."""
        self.rows: Tensor | None = None
        """The observed weight as (rows, K), for the ranges of groups."""
        self.token_quantiles: dict[str, float] = {}
        """For 'avg_prune_minmax': format name -> quantile of the token bounds to clip at, see `clip_tokens`."""
        self.inputs: InputSketch | None = None
        """Weights: what the layer multiplies them with, while `calibrate` runs and if the observer asks for it."""
        self.real_tokens: tuple[Tensor, ...] = ()
        """Masks, bool (B, T), False for padding; observed tensors (B, T, ...) leave padding out."""
        if config.channel_groups > 1:
            self.split(config.channel_groups)

    def split(self, groups: int) -> None:
        """Divide the channels of a weight into groups of neighbours, which may differ in format from now on."""
        self.config = replace(self.config, channel_groups=groups)
        sizes = torch.tensor(group_sizes(math.prod(self.shape), groups))
        group = torch.arange(groups, dtype=torch.uint8).repeat_interleave(sizes).view(self.shape)
        self.register_buffer("channel_group", group.to(self.anchor.device))

    def prepare(self, format: Format) -> None:
        """Create the scale of a format. Learned scales must exist before the optimizer is created.

        Raises:
            UserError: For a group format, if the tensor is no weight; for a mix of other groups than the weight has.
        """
        if isinstance(format, MixedFormat):
            self._prepare_parts(format)
            return
        if isinstance(format, GroupFormat) and self.weight_shape is None:
            raise UserError(f"{format} is a format of weights: activations have no groups along their channels")
        self.prepared.add(format)
        if not format.scaled or self.config.range == "dynamic" or format.name in self.grids:
            return
        assert isinstance(format, IntFormat | FloatFormat | GroupFormat)
        learned, offset = self.config.range == "learned", self.config.learned_offset
        with torch.inference_mode(False):
            self.grids[format.name] = QuantParams(
                self.used_range(format),
                self.scale_shape(format),
                learned,
                self.is_symmetric(format),
                self.anchor.device,
                offset and not isinstance(format, GroupFormat),
            )

    def _prepare_parts(self, mix: MixedFormat) -> None:
        if len(mix.parts) != self.config.channel_groups:
            raise UserError(
                f"{mix} is for {len(mix.parts)} groups of output channels, this weight has {self.config.channel_groups}"
            )
        for part in mix.parts:
            self.prepare(part)
        self.prepared.add(mix)

    def scale_shape(self, format: Format) -> tuple[int, ...]:
        """Return the shape of a format's scale."""
        if not isinstance(format, GroupFormat):
            return self.shape
        assert self.weight_shape is not None
        return scale_shape(self.weight_shape, format.size, self.reduction_dim)

    def is_symmetric(self, format: Format) -> bool:
        """Whether a format's integers have no zero point; groups say so themselves, others by the config."""
        return not format.zero_point if isinstance(format, GroupFormat) else self.config.symmetric

    def used_range(self, format: IntFormat | FloatFormat | GroupFormat) -> IntFormat | FloatFormat:
        """Return the format whose grid is used: int7 for int8 with `reduce_range`, a group's integers, or `format`."""
        if isinstance(format, GroupFormat):
            return format.element
        return IntFormat(7) if self.config.reduce_range and format == IntFormat(8) else format

    def set_format(self, format: Format) -> None:
        """Round to `format` from now on."""
        if format not in self.prepared:
            self.prepare(format)
        self.__dict__["format"] = format  # faster than nn.Module.__setattr__; runs for every layer at every step

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Create the scales of all formats in the state dict, so that a newly quantized model loads a trained one."""
        start = f"{prefix}grids."
        for key in state_dict:
            if key.startswith(start):
                self.prepare(parse_format(key.removeprefix(start).split(".")[0]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ------------------------------------------------------ calibration

    def observe(self, x: Tensor) -> None:
        """Add a tensor, any floating dtype, to the data that `finish_calibration` chooses ranges from."""
        if not self.grids:
            return
        x = without_padding(x, self.real_tokens)
        if x.numel():
            self.observation = self._see(x, self.observation)
            if any(isinstance(format, GroupFormat) for format in self.prepared):
                self.rows = to_rows(x.detach(), self.reduction_dim)
            self.saw_finite = all_finite(x) & self.saw_finite

    @property
    def wants_inputs(self) -> bool:
        """Whether the observer of a weight chooses ranges by the layer's inputs, too."""
        weighs = not self.batched and self.config.observer in WEIGHTS_ONLY and not self.config.percentile
        return weighs and (bool(self.grids) or self.config.range == "dynamic")

    @property
    def keeps_ranges(self) -> bool:
        """Whether calibration that leaves learned scales alone has nothing to set: all scales are learned and set."""
        ready = all(cast(QuantParams, params).is_ready for params in self.grids.values())
        return ready and (self.config.range == "learned" or not self.grids)

    def forget(self) -> None:
        """Discard what was observed."""
        self.observation, self.saw_finite, self.rows = None, True, None

    def finish_calibration(self, only: Format | None = None, again: bool = True) -> None:
        """Set the scales from what was observed, and discard that.

        Args:
            only: The format to set; None: all prepared formats.
            again: Whether to replace scales that were already set.
        """
        for name, params in self.grids.items():
            if (only is None or name == only.name) and (again or not cast(QuantParams, params).is_ready):
                clipped = token_observer(self.token_quantiles[name]) if name in self.token_quantiles else None
                self.set_ranges(clipped or self.estimator, parse_format(name))
        self.forget()

    @torch.no_grad()
    def set_ranges(self, estimate: RangeEstimator, format: Format) -> None:
        """Set the scale of a prepared format; does nothing if nothing was observed.

        Args:
            estimate: Chooses the range from the observation.
            format: The format.
        """
        if self.observation is None or format.name not in self.grids:
            return
        params = cast(QuantParams, self.grids[format.name])
        if isinstance(format, GroupFormat):
            assert self.rows is not None
            scale, zero_point = self._group_scales(self.rows, format)
        else:
            low, high = estimate(self.observation, params.format, self.config.symmetric)
            scale, zero_point = scale_from_range(low, high, params.format, self.config.symmetric)
        params.set(scale.clamp(min=MIN_LEARNED_SCALE), zero_point)

    def _group_scales(self, rows: Tensor, format: GroupFormat) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zero points of a weight (rows, K), float32 in the shape of the format's scale."""
        observer, symmetric = self.estimator, not format.zero_point
        ranges, start = [], 0
        for part in split_groups(rows, format.size):
            seen, stop = observer.see(part, None), start + part.numel() // len(rows)
            if isinstance(seen, Weighed) and self.inputs is not None and (sketch := self.inputs.halves()) is not None:
                seen = replace(seen, rows=part.float(), sketch=sketch[..., start:stop])
            ranges.append(observer(seen, format.element, symmetric))
            start = stop
        low, high = (join_groups(side, len(rows)) for side in zip(*ranges, strict=True))
        scale, zero_point = scale_from_range(low, high, format.element, symmetric)
        shape, along = torch.Size(self.scale_shape(format)), group_dim(self.reduction_dim)
        return from_rows(scale, shape, along), None if zero_point is None else from_rows(zero_point, shape, along)

    @property
    def estimator(self) -> Observer:
        """The observer that chooses the tensor's range; for weights it sees all values, not a sample."""
        observer = self.config.estimator
        return observer if self.batched else on_weights(observer, guarded=not self.config.percentile)

    def _see(self, x: Tensor, before: Any) -> Any:
        """Return the observer's state after x, given its state before."""
        observer = self.estimator
        seen = observer.see(self._tokens(x) if observer.per_token else self._grouped(x), before)
        if self.inputs is None or not isinstance(seen, Weighed):
            return seen
        return replace(seen, rows=to_rows(x.detach(), self.reduction_dim).float(), sketch=self.inputs.halves())

    def _tokens(self, x: Tensor) -> Tensor:
        """Reshape x to (tokens, features); of a convolution's input, the features of a position are its channels."""
        rows = x if self.reduction_dim is None else x.movedim(self.reduction_dim, -1)
        return rows.reshape(-1, rows.shape[-1])

    def _grouped(self, x: Tensor) -> Tensor:
        """Reshape x to (groups, values), one group per scale."""
        if math.prod(self.shape) == 1:
            return x.reshape(1, -1)
        axes = [d - len(self.shape) for d, size in enumerate(self.shape) if size > 1]
        groups = math.prod(x.shape[axis] for axis in axes)  # fewer than scales if x is a part of a weight
        return x.movedim(axes, list(range(len(axes)))).reshape(groups, -1)

    # ------------------------------------------------------ rounding

    @property
    def bytes(self) -> ByteGrid | None:
        """Byte codes of the current format, or None if there are none."""
        if self.format.name not in self.grids or isinstance(self.format, GroupFormat):
            return None
        return cast(QuantParams, self.grids[self.format.name]).bytes

    def rounding_tensors(self) -> list[Tensor]:
        """Return all tensors, other than x, that rounding to the current format depends on."""
        mixed = isinstance(self.format, MixedFormat)
        parts = self.format.parts if isinstance(self.format, MixedFormat) else (self.format,)
        params = [self.grids[part.name] for part in parts if part.name in self.grids]
        own = [tensor for each in params for tensor in (*each.parameters(), *each.buffers())]
        return [*own, self.channel_group] if mixed else own

    def forward(self, x: Tensor) -> Tensor:
        """Round x to the current format.

        Args:
            x: Any floating dtype; the scale broadcasts to it.

        Returns:
            A tensor with x's shape and dtype.

        Raises:
            RuntimeError: In eval mode, if activation ranges of the format were never calibrated.
        """
        rounding = self.rounding(x)
        return x if rounding is None else rounding(x)

    def rounding(self, x: Tensor) -> Rounder | None:
        """Return what rounds x with the current format and scale; None in float. Raises as `forward` does."""
        if isinstance(self.format, MixedFormat):
            rounders = [self._rounding_in(part, x) for part in self.format.parts]
            known = [rounder for rounder in rounders if rounder is not None]
            return mixed_rounder(known, self.channel_group) if len(known) == len(rounders) else None
        return self._rounding_in(self.format, x)

    def _rounding_in(self, format: Format, x: Tensor) -> Rounder | None:
        """Return what rounds x in a format that is no mix."""
        assert not isinstance(format, MixedFormat)
        if isinstance(format, FloatOff) or x.numel() == 0:
            return None
        if isinstance(format, BlockFormat):
            return Rounder(format=format, dim=self.reduction_dim)
        grouped = isinstance(format, GroupFormat)
        if not format.scaled or self.config.range == "dynamic":
            scale, rounding_params = self._dynamic(x, format)
            return Rounder(half_scale(scale) if grouped else scale, rounding_params, 1.0, format, self.reduction_dim)
        params = cast(QuantParams, self.grids[format.name])
        if not params.is_ready:
            if self.observation is not None:
                return None  # calibration is under way and will set the scale
            self._calibrate_on(x, format)
        params.keep_positive()
        if not self.batched and params.scale.numel() > 1 and len(x) < len(params.scale):
            return self._rounding_part(x, params, format)
        gradient = lsq_gradient_scale(self._elements(x) // params.scale.numel(), params.largest_code)
        if grouped:
            return Rounder(half_scale(params.scale), params.rounding_params, gradient, format, self.reduction_dim)
        # With a scale per input channel, the sum over channels is not a sum of integers.
        bytes = params.bytes if params.scale.numel() == 1 or not self.batched else None
        return Rounder(params.scale, params.rounding_params, gradient, offset=params.offset, bytes=bytes)

    def _rounding_part(self, x: Tensor, params: QuantParams, format: Format) -> Rounder:
        """Return what rounds the first channels of a weight (`quant.elastic`), with the first of its scales."""
        if isinstance(format, GroupFormat):
            raise ValueError(f"{format}: the groups of a part of a weight are not those of the whole")
        scale, rounding = params.scale[: len(x)], params.rounding_params
        rounding = rounding if rounding.numel() == len(rounding) else rounding[:, : len(x)]
        offset = None if params.offset is None else params.offset[: len(x)]
        gradient = lsq_gradient_scale(x.numel() // len(x), params.largest_code)
        return Rounder(scale, rounding, gradient, offset=offset, bytes=params.bytes)

    def _elements(self, x: Tensor) -> int:
        """Number of elements of one example."""
        alone = self.reduction_dim is not None and x.dim() + self.reduction_dim <= 0  # an example without batch axis
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
    def _dynamic(self, x: Tensor, format: IntFormat | FloatFormat | GroupFormat) -> tuple[Tensor, Tensor]:
        """Return scale and rounding parameters computed from x."""
        if isinstance(format, GroupFormat):
            group_scale, point = self._group_scales(to_rows(x.detach(), self.reduction_dim), format)
            return group_scale, rounding_params(format.element, point, device=x.device)
        if not format.scaled:
            return torch.ones((), device=x.device), rounding_params(format, device=x.device)
        format = self.used_range(format)
        shape = list(self.shape)
        if self.config.granularity == "token":
            assert self.reduction_dim is not None
            shape = list(x.shape)
            shape[self.reduction_dim] = 1
            seen = self.estimator.see(self._tokens(x), None)
        else:
            seen = self._see(x, None)
        if not self.batched and math.prod(shape) > 1:
            shape[:1] = [min(shape[0], len(x))]  # of a part of a weight, see `quant.elastic`
        low, high = self.estimator(seen, format, self.config.symmetric)
        scale, zero_point = scale_from_range(low, high, format, self.config.symmetric)
        zero_point = None if zero_point is None else zero_point.view(shape)
        return scale.view(shape), rounding_params(format, zero_point, device=x.device)

    def extra_repr(self) -> str:
        """Describe the quantizer in the printed model."""
        return f"format={self.format}, range={self.config.range}, granularity={self.config.granularity}"


@dataclass(frozen=True)
class Rounder:
    """The rounding of one tensor, as decided at one moment; calling it again gives the same values."""

    scale: Tensor | None = None
    rounding_params: Tensor | None = None
    gradient_scale: float = 1.0
    format: Format = FLOAT
    dim: int | None = -1
    offset: Tensor | None = None
    """LSQ+'s beta: the tensor is rounded relative to it."""
    bytes: ByteGrid | None = None
    """Byte codes of the rounded values, if they fit."""

    @property
    def plain(self) -> bool:
        """Whether `values` and `gradients` apply: there is no learned offset."""
        return self.offset is None

    def recordable(self, x: Tensor) -> Tensor:
        """Round a finite x in operations that torch.export and torch.jit.trace record, without gradients."""
        if self.rounding_params is None or self.scale is None:
            assert isinstance(self.format, BlockFormat)
            return emulate(x, self.format, self.dim).to(x.dtype)
        if isinstance(self.format, GroupFormat):
            return emulate_groups(x, self.scale, self.rounding_params, self.format.size, self.dim).to(x.dtype)
        scale = self.scale.clamp(min=least_scale(self.scale))
        centred = x.float() if self.offset is None else x.float() - self.offset
        rounded = emulate_grid(centred / scale, self.rounding_params) * scale
        return (rounded if self.offset is None else rounded + self.offset).to(x.dtype)

    def values(self, x: Tensor) -> Tensor:
        """Round x outside of autograd. Requires `plain`."""
        if self.rounding_params is None or self.scale is None:
            assert isinstance(self.format, BlockFormat)
            return round_in_blocks(x, self.format, self.dim)
        if isinstance(self.format, GroupFormat):
            return round_in_groups(x, self.scale, self.rounding_params, self.format.size, self.dim)
        return kernels().round(self._operands(x, self.scale))

    def codes(self, x: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Round x to codes of `bytes`, uint8 or int8; None if x holds NaN. Requires `bytes`."""
        assert self.bytes is not None and self.scale is not None
        return kernels().codes(self._operands(x, self.scale), self.bytes, dtype)

    def gradients(
        self, grad: Tensor, x: Tensor, scale: Tensor | None, learned: bool = False, *, again: bool = False
    ) -> Gradients:
        """Return the gradients w.r.t. x and, if learned, the scale. Requires `plain`.

        Args:
            grad: Gradient w.r.t. the rounded x, with x's shape; may be overwritten.
            x: The unrounded tensor.
            scale: The scale of the forward pass, as autograd has saved it.
            learned: Whether to compute the scale's gradient.
            again: Whether to also return the rounded x.
        """
        if self.rounding_params is None or scale is None:
            assert isinstance(self.format, BlockFormat)
            dx, rounded = block_gradients(grad, x, self.format, self.dim, again=again, reuse=True)
            return Gradients(dx, None, rounded)
        if isinstance(self.format, GroupFormat):
            size, dim = self.format.size, self.dim
            found = group_gradients(grad, x, scale, self.rounding_params, size, dim, learned=learned, again=again)
        else:
            found = kernels().gradients(grad, self._operands(x, scale), learned=learned, again=again, reuse=True)
        return found if found.scale is None else found._replace(scale=found.scale * self.gradient_scale)

    def _operands(self, x: Tensor, scale: Tensor) -> Operands:
        assert self.rounding_params is not None
        return Operands(x, scale, self.rounding_params, least_scale(scale))

    def __call__(self, x: Tensor) -> Tensor:
        """Round x, any floating dtype and shape, with gradients."""
        if is_tracing():
            return self.recordable(x)
        if self.rounding_params is None or self.scale is None:
            return fake_quantize(x, self.format, dim=self.dim)
        if isinstance(self.format, GroupFormat):
            arguments = self.rounding_params, self.format.size, self.dim, self.gradient_scale
            return FakeQuantizeGroups.apply(x, self.scale, *arguments)
        if self.offset is None:
            return fake_quantize_with_params(x, self.scale, self.rounding_params, self.gradient_scale)
        # Autograd derives the offset's gradient from this: the whole gradient minus what passes within the range.
        offset = _with_gradient_scaled(self.offset, self.gradient_scale)
        moved = fake_quantize_with_params(x.float() - offset, self.scale, self.rounding_params, self.gradient_scale)
        return (moved + offset).to(x.dtype)


def mixed_rounder(rounders: Sequence[Rounder], group: Tensor) -> Rounder:
    """Return what rounds each channel of a weight as the rounder of its group does, in one pass over the weight.

    Args:
        rounders: One for each group, with a scale for each channel.
        group: The group of each channel, uint8 of the scales' shape.
    """
    scale, params = torch.empty_like(group, dtype=torch.float32), torch.empty((5, *group.shape), device=group.device)
    for number, rounder in enumerate(rounders):
        assert rounder.scale is not None and rounder.rounding_params is not None
        own = rounder.rounding_params
        wide = own.view(5, *(1,) * group.dim()) if own.dim() == 1 else own
        scale = torch.where(group == number, _with_gradient_scaled(rounder.scale, rounder.gradient_scale), scale)
        params = torch.where(group == number, wide, params)
    return Rounder(scale, params)


def _with_gradient_scaled(values: Tensor, factor: float) -> Tensor:
    """Return the same values with a scaled gradient, as LSQ does with scales, and LSQ+ (arXiv 2004.09576) offsets."""
    return values.detach() + (values - values.detach()) * factor


def all_finite(x: Tensor) -> Tensor:
    """Return bool 0-d: whether x is free of NaN and infinity. Both show in the extrema: one pass, and no copy."""
    return torch.stack(x.detach().aminmax()).isfinite().all()


def without_padding(x: Tensor, masks: Iterable[Tensor]) -> Tensor:
    """Drop padding.

    Args:
        x: (B, T, ...) or (B * T, features).
        masks: bool (B, T) each, False for padding; the first that fits x's shape is used.

    Returns:
        The other tokens, (tokens, ...); x itself if no mask fits.
    """
    for real in masks:
        if x.dim() >= 3 and x.shape[:2] == real.shape:
            return x[real]
        if x.dim() == 2 and len(x) == real.numel():
            return x[real.flatten()]
    return x
