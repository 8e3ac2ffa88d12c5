"""Range estimators: from the values a tensor takes to the range its format should span."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.calibrators import (
    Histogram,
    histogram_entropy,
    histogram_mse,
    histogram_percentile,
    quantile_bins,
)
from quant.formats import FloatFormat, IntFormat
from quant.quant_utils import fake_quantize, scale_from_range

SAMPLE_SIZE = 1 << 16
"""values kept of a tensor for percentiles and the MSE search; the extrema see every value"""
_GROUP_SAMPLE_SIZE = 512
"""values kept for each scale where many share SAMPLE_SIZE: a weight with thousands of channels still searches well"""
_MSE_STEPS = 40
_MSE_NARROWEST = 0.1


@dataclass(frozen=True)
class Observation:
    """What was seen of a tensor: running extrema and a uniform sample of its values.

    low, high: float32 (groups,), one entry for each scale; values: float32 (groups, samples); count: values seen of
    each group.
    """

    low: Tensor
    high: Tensor
    values: Tensor
    count: int

    def merge(self, other: Observation) -> Observation:
        """Both together, each with its share of the sample: early batches count as much as late ones."""
        count = self.count + other.count
        size = min(_sample_size(self.low.numel()), self.values.shape[1] + other.values.shape[1])
        mine = round(size * self.count / count)
        values = torch.cat([_choose(self.values, mine), _choose(other.values, size - mine)], dim=1)
        return Observation(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), values, count)


def observe(groups: Tensor, sample: bool = True) -> Observation:
    """Extrema and sample of a tensor laid out as (groups, values), neither of them 0."""
    groups = groups.detach()
    values = _choose(groups, _sample_size(groups.shape[0])) if sample else groups[:, :0]
    return Observation(groups.amin(dim=1).float(), groups.amax(dim=1).float(), values.float(), groups.shape[1])


def _sample_size(groups: int) -> int:
    return max(SAMPLE_SIZE // groups, _GROUP_SAMPLE_SIZE)


def _choose(values: Tensor, size: int) -> Tensor:
    """`size` of the values, at random (an even distance could follow the layout) and the same at every call."""
    count = values.shape[1]
    if count <= size:
        return values
    generator = torch.Generator().manual_seed(count)
    # Permuting a large tensor's positions takes seconds; drawing from many with repetition hardly repeats.
    if count <= 4 * size:
        index = torch.randperm(count, generator=generator)[:size]
    else:
        index = torch.randint(count, (size,), generator=generator)
    return values[:, index.to(values.device)]


def minmax_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The extrema themselves: nothing is clipped."""
    return seen.low, seen.high


def percentile_range(percentile: float) -> RangeEstimator:
    """Clips at the given percentile of |x|, in (0, 100]."""

    def estimate(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        parts = seen.values.abs().split(1024)  # torch.quantile has refused more than 2^24 values
        bound = torch.cat([torch.quantile(part, percentile / 100, dim=1) for part in parts])
        return torch.maximum(seen.low, -bound), torch.minimum(seen.high, bound)

    return estimate


def mse_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The share of the extrema, in 40 steps down to a tenth, that quantizes the sample with the least squared error."""
    best = torch.full_like(seen.low, torch.inf)
    share = torch.ones_like(seen.low)
    for candidate in torch.linspace(1.0, _MSE_NARROWEST, _MSE_STEPS).tolist():
        scale, zero_point = scale_from_range(seen.low * candidate, seen.high * candidate, format, symmetric)
        zero_point = None if zero_point is None else zero_point.unsqueeze(1)
        error = (fake_quantize(seen.values, format, scale.unsqueeze(1), zero_point) - seen.values).square().mean(dim=1)
        better = error < best
        best, share = torch.where(better, error, best), torch.where(better, candidate, share)
    return seen.low * share, seen.high * share


# ------------------------------------------------------ the squared error, searched wider

_GRID_STEPS = 100
_POINTS = 2048
"""points that stand for a group's sample in the wider searches"""
_MANY_ZERO_POINTS, _FEW_ZERO_POINTS = 256, 16
"""zero points tried: for one scale, and for each of many"""
_CHUNK = 1 << 20
_GOLDEN = (math.sqrt(5) - 1) / 2

Ranges = tuple[Tensor, Tensor]
"""(low, high), each float32 (candidates, groups)"""


@dataclass(frozen=True)
class SquaredError:
    """What quantizing costs under a range: points and their weights, each float32 (groups, points)."""

    points: Tensor
    weights: Tensor
    format: IntFormat | FloatFormat
    symmetric: bool

    @classmethod
    def of(cls, seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> SquaredError:
        """Large samples become the means of 2048 bins between the extrema: outliers keep bins of their own."""
        values = seen.values
        if values.shape[1] <= _POINTS:
            return cls(values, torch.ones_like(values), format, symmetric)
        width = ((seen.high - seen.low) / _POINTS).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        index = ((values - seen.low.unsqueeze(1)) / width).long().clamp(0, _POINTS - 1)
        zeros = values.new_zeros(len(values), _POINTS)
        counts = zeros.scatter_add(1, index, torch.ones_like(values))
        return cls(zeros.scatter_add(1, index, values) / counts.clamp(min=1), counts, format, symmetric)

    def __call__(self, low: Tensor, high: Tensor) -> Tensor:
        """Weighted sum of squared errors under the ranges low..high: (candidates, groups) each, and so the result."""
        parts = max(_CHUNK // self.points.numel(), 1)
        errors = []
        for lows, highs in zip(low.split(parts), high.split(parts), strict=True):
            scale, zero_point = scale_from_range(lows, highs, self.format, self.symmetric)
            zero_point = None if zero_point is None else zero_point.unsqueeze(2)
            points = self.points.expand(len(lows), -1, -1).contiguous()
            rounded = fake_quantize(points, self.format, scale.unsqueeze(2), zero_point)
            errors.append((rounded.sub_(points).square_() * self.weights).sum(dim=2))
        return torch.cat(errors)

    def best(self, candidates: Ranges) -> Ranges:
        """The candidate of least error for each group: (1, groups) each."""
        index = self(*candidates).argmin(dim=0, keepdim=True)
        return candidates[0].gather(0, index), candidates[1].gather(0, index)


def mse_grid_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """MSEObserver: the best of 100 bounds; on an asymmetric grid of two-sided data, of 100 widths x zero points."""
    error = SquaredError.of(seen, format, symmetric)
    low, high = error.best(_candidates(seen, format, symmetric, _GRID_STEPS))
    return low[0], high[0]


def mse_fast_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """MSEFastObserver: a coarse grid, then golden-section search of each bound around its best point."""
    error = SquaredError.of(seen, format, symmetric)
    steps = 20
    low, high = error.best(_candidates(seen, format, symmetric, steps, zero_points=_FEW_ZERO_POINTS))
    reach = torch.maximum(-seen.low, seen.high) / steps
    if _one_dimensional(seen, format, symmetric).all():
        below, above = low < 0, high > 0

        def both(t: Tensor) -> Tensor:
            return error(torch.where(below, -t, 0.0), torch.where(above, t, 0.0))

        start = torch.maximum(-low, high)
        t = _golden_section(both, (start - reach).clamp(min=0), start + reach)
        better = both(t) < both(start)
        t = torch.where(better, t, start)
        return torch.where(below, -t, 0.0)[0], torch.where(above, t, 0.0)[0]
    for _ in range(2):
        moved = _golden_section(partial(_swapped, error, high), low - reach, (low + reach).clamp(max=0))
        low = torch.where(error(moved, high) < error(low, high), moved, low)
        moved = _golden_section(partial(error, low), (high - reach).clamp(min=0), high + reach)
        high = torch.where(error(low, moved) < error(low, high), moved, high)
    return low[0], high[0]


def _swapped(error: SquaredError, high: Tensor, low: Tensor) -> Tensor:
    return error(low, high)


def _one_dimensional(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> Tensor:
    """Whether one bound says it all: bool (groups,)."""
    if symmetric or isinstance(format, FloatFormat):
        return torch.ones_like(seen.low, dtype=torch.bool)
    return (seen.low >= 0) | (seen.high <= 0)


def _candidates(
    seen: Observation,
    format: IntFormat | FloatFormat,
    symmetric: bool,
    steps: int,
    zero_points: int = _MANY_ZERO_POINTS,
) -> Ranges:
    """Ranges to try, (candidates, groups): `steps` bounds, or widths with each of the zero points."""
    shares = torch.arange(1, steps + 1, device=seen.low.device).unsqueeze(1) / steps
    bound = shares * torch.maximum(-seen.low, seen.high)
    one = torch.where(seen.low >= 0, 0.0, -bound), torch.where(seen.high <= 0, 0.0, bound)
    flat = _one_dimensional(seen, format, symmetric)
    if flat.all():
        return one
    assert isinstance(format, IntFormat)
    codes = 2**format.width - 1
    count = min(codes + 1, zero_points if len(seen.low) == 1 else _FEW_ZERO_POINTS)
    below = torch.linspace(0, codes, count, device=shares.device).round() / codes  # share of the width under zero
    width = (shares * (seen.high - seen.low)).unsqueeze(1)
    low = torch.maximum(-below.view(1, -1, 1) * width, seen.low).flatten(0, 1)
    high = torch.minimum((1 - below.view(1, -1, 1)) * width, seen.high).flatten(0, 1)
    # One-sided groups beside two-sided ones get their bounds, and what is repeated costs time only.
    repeat = [side.repeat_interleave(count, dim=0) for side in one]
    return torch.where(flat, repeat[0], low), torch.where(flat, repeat[1], high)


def _golden_section(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int = 12) -> Tensor:
    """Where `function` is smallest between low and high, entry by entry, if it has one minimum there."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    for _ in range(steps):
        keep_left = at_left < at_right
        low, high = torch.where(keep_left, low, left), torch.where(keep_left, right, high)
        probe = torch.where(keep_left, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        value = function(probe)
        left, right = torch.where(keep_left, probe, right), torch.where(keep_left, left, probe)
        at_left, at_right = torch.where(keep_left, value, at_right), torch.where(keep_left, at_left, value)
    return (low + high) / 2


# ------------------------------------------------------ mean and deviation


@dataclass(frozen=True)
class Moments:
    """Sum and sum of squares, float64 (groups,); count: values seen of each group."""

    total: Tensor
    squares: Tensor
    count: int

    @classmethod
    def of(cls, groups: Tensor, before: Moments | None = None) -> Moments:
        values = groups.detach().double()
        seen = cls(values.sum(dim=1), values.square().sum(dim=1), values.shape[1])
        if before is None:
            return seen
        return cls(before.total + seen.total, before.squares + seen.squares, before.count + seen.count)


def lsq_plus_range(seen: Moments, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """LSQ+ (arXiv 2004.09576): mean +- 3 sigma; a symmetric integer scale is max|mean +- 3 sigma| / 2^(k-1)."""
    mean = seen.total / seen.count
    sigma = (seen.squares / seen.count - mean.square()).clamp(min=0).sqrt()
    low, high = (mean - 3 * sigma).float(), (mean + 3 * sigma).float()
    if not symmetric or isinstance(format, FloatFormat):
        return low, high
    bound = torch.maximum(low.abs(), high.abs()) * format.qmax / (format.qmax + 1)
    return -bound, bound


# ------------------------------------------------------ averages over batches


@dataclass(frozen=True)
class Tokens:
    """Extrema of each token: float32 (tokens,)."""

    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, tokens: Tensor) -> Tokens:
        """Of a tensor laid out as (tokens, features)."""
        low, high = torch.aminmax(tokens.detach().float(), dim=1)
        return cls(low, high)


def pruned_range(quantile: float) -> RangeEstimator:
    """Token-Wise Clipping (Outlier Suppression, arXiv 2209.13325): clips at the token bounds' quantile, in (0, 1].

    The upper bound is the largest token maximum of at most the quantile of their magnitudes; the lower one likewise.
    """

    def estimate(seen: Tokens, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        high, low = _largest_within(seen.high, quantile), -_largest_within(-seen.low, quantile)
        return low.unsqueeze(0), high.unsqueeze(0)

    return estimate


def _largest_within(bounds: Tensor, quantile: float) -> Tensor:
    """The largest of `bounds` (tokens,) that is at most the quantile of their magnitudes: 0-d."""
    within = bounds <= torch.quantile(bounds.abs(), quantile)
    return torch.where(within, bounds, -torch.inf).max()


def _quantile_clipped(groups: Tensor) -> Observation:
    """Extrema clipped at the centre of the bin, of 2048 over |x|, where 99.999 % of the values are reached."""
    seen = Histogram.of(groups)
    low, high = seen.clipped((quantile_bins(seen.counts, _AVG_QUANTILE) + 0.5) * seen.width)
    return Observation(low, high, groups[:, :0].float(), groups.shape[1])


_AVG_QUANTILE = 0.99999


# ------------------------------------------------------ by name

RangeEstimator = Callable[[Any, IntFormat | FloatFormat, bool], tuple[Tensor, Tensor]]
"""(what was seen, format, symmetric) -> (low, high), each float32 (groups,)"""


@dataclass(frozen=True)
class Observer:
    """What to keep of the values a tensor takes, and how that makes a range."""

    see: Callable[[Tensor, Any], Any]
    """(groups, values) and what was seen before (None at first) -> what has been seen since"""
    estimate: RangeEstimator
    per_token: bool = False
    """`see` is given (tokens, features)"""

    def __call__(self, seen: Any, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        return self.estimate(seen, format, symmetric)


def _see_extrema(groups: Tensor, before: Observation | None) -> Observation:
    seen = observe(groups, sample=False)
    return seen if before is None else before.merge(seen)


def _see_sample(groups: Tensor, before: Observation | None) -> Observation:
    seen = observe(groups)
    return seen if before is None else before.merge(seen)


def averaged(see: Callable[[Tensor], Any], estimate: RangeEstimator, per_token: bool = False) -> Observer:
    """The mean of the ranges that each batch has by itself, with one scale for the whole tensor.

    What was seen is a tuple with one entry a batch.
    """

    def mean(seen: Any, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        lows, highs = zip(*(estimate(batches, format, symmetric) for batches in _side_by_side(seen)), strict=True)
        return torch.cat(lows).mean(dim=0, keepdim=True), torch.cat(highs).mean(dim=0, keepdim=True)

    return Observer(lambda groups, before: (*(before or ()), see(groups)), mean, per_token)


def _side_by_side(batches: Sequence[Any]) -> list[Any]:
    """Observations of as many values as groups of one, so that a search for ranges works on all of them at once."""
    if not isinstance(batches[0], Observation):
        return list(batches)
    sizes: dict[int, list[Observation]] = {}
    for batch in batches:
        sizes.setdefault(batch.values.shape[1], []).append(batch)
    return [
        Observation(
            torch.cat([batch.low for batch in alike]),
            torch.cat([batch.high for batch in alike]),
            torch.cat([batch.values for batch in alike]),
            alike[0].count,
        )
        for alike in sizes.values()
    ]


def percentile_observer(percentile: float) -> Observer:
    """Clips at a percentile of the sample, see `percentile_range`."""
    return Observer(_see_sample, percentile_range(percentile))


def token_observer(quantile: float) -> Observer:
    """Token-Wise Clipping at the given quantile, averaged over batches; 1 clips nothing. See `pruned_range`."""
    return averaged(Tokens.of, pruned_range(quantile), per_token=True)


OBSERVERS: dict[str, Observer] = {
    "minmax": Observer(_see_extrema, minmax_range),
    "mse": Observer(_see_sample, mse_range),
    "mse_grid": Observer(_see_sample, mse_grid_range),
    "mse_fast": Observer(_see_sample, mse_fast_range),
    "lsq_plus": Observer(Moments.of, lsq_plus_range),
    "percentile": Observer(Histogram.of, histogram_percentile),
    "mse_histogram": Observer(Histogram.of, histogram_mse),
    "entropy": Observer(Histogram.of, histogram_entropy),
    "avg_minmax": averaged(lambda groups: observe(groups, sample=False), minmax_range),
    "avg_quantile": averaged(_quantile_clipped, minmax_range),
    "avg_mse_fast": averaged(observe, mse_fast_range),
    "avg_prune_minmax": token_observer(1.0),
}
"""by name; a percentile other than 99.99 carries its number: `percentile_observer(99.9)`"""
AVERAGING = frozenset(name for name in OBSERVERS if name.startswith("avg_"))
"""the observers that average over batches: they know one scale for the whole tensor"""
