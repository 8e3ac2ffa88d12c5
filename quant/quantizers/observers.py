"""Observers: collect statistics of a tensor and choose the range low..high that its format should cover."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from quant.formats import FloatFormat, IntFormat
from quant.quant_utils import fake_quantize, scale_from_range
from quant.quantizers.histogram import (
    Histogram,
    histogram_entropy,
    histogram_mse,
    histogram_percentile,
    quantile_bins,
)
from quant.quantizers.weighted_mse import CHUNK, SHARES, Weighed, least_output_error

SAMPLE_SIZE = 1 << 16
"""Values sampled of an activation, for percentiles and MSE searches; extrema are computed from all values."""
_GROUP_SAMPLE_SIZE = 512
"""Least number of values sampled per scale, if many share SAMPLE_SIZE."""
_TAIL_SHARE = 64
"""The largest values are stored in addition: one per so many sampled values."""


@dataclass(frozen=True)
class Observation:
    """Statistics of a tensor: running extrema, a uniform sample of its values, and its largest values.

    A sample alone misses rare outliers, and an MSE search on it would clip them at no cost. A group is the set of
    values that share a scale.
    """

    low: Tensor
    """float32 (groups,): smallest value."""
    high: Tensor
    """float32 (groups,): largest value."""
    values: Tensor
    """float32 (groups, samples): all values, or a sample of them."""
    count: int
    """Number of values seen per group."""
    tails: Tensor
    """float32 (groups, k): contains all values with |x| > edge; other entries are to be ignored."""
    edge: Tensor
    """float32 (groups,); infinite if `values` holds all values."""

    @classmethod
    def of(cls, low: Tensor, high: Tensor, values: Tensor, count: int) -> Observation:
        """Create an observation whose `values` are complete or unused.

        Args:
            low: float32 (groups,).
            high: float32 (groups,).
            values: float32 (groups, values).
            count: Number of values seen per group.
        """
        return cls(low, high, values, count, values[:, :0], torch.full_like(low, torch.inf))

    def merge(self, other: Observation) -> Observation:
        """Combine two observations; each contributes to the sample in proportion to its count."""
        count = self.count + other.count
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        size, have = _sample_size(self.low.numel()), self.values.shape[1] + other.values.shape[1]
        if have <= size:
            return Observation.of(low, high, torch.cat([self.values, other.values], dim=1), count)
        mine = round(size * self.count / count)
        values = torch.cat([_choose(self.values, mine), _choose(other.values, size - mine)], dim=1)
        (tails, edge), (others, other_edge) = self._tails(size), other._tails(size)
        tails, own_edge = _largest(torch.cat([tails, others], dim=1), size // _TAIL_SHARE)
        return Observation(low, high, values, count, tails, torch.maximum(own_edge, torch.maximum(edge, other_edge)))

    def weighted(self) -> tuple[Tensor, Tensor | None]:
        """Return points that represent all values seen.

        Returns:
            Points and their weights (the number of values that each represents), float32 (groups, points) both; None
            for the weights if all are 1.
        """
        if self.edge.isinf().all():
            return self.values, None
        edge = self.edge.unsqueeze(1)
        inside, beyond = self.values.abs() <= edge, self.tails.abs() > edge
        each = (self.count - beyond.sum(dim=1, keepdim=True)) / inside.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.cat([self.values, self.tails], dim=1), torch.cat([inside * each, beyond.float()], dim=1)

    def _tails(self, size: int) -> tuple[Tensor, Tensor]:
        whole = self.values.shape[1] == self.count
        return _largest(self.values, size // _TAIL_SHARE) if whole else (self.tails, self.edge)


def observe(groups: Tensor, sample: bool = True, whole: bool = False) -> Observation:
    """Observe one tensor.

    Args:
        groups: Any floating dtype, (groups, values), not empty.
        sample: Whether to store values besides the extrema.
        whole: Whether to store all values instead of a sample, as for weights.
    """
    groups = groups.detach()
    low, high = groups.amin(dim=1).float(), groups.amax(dim=1).float()
    count, size = groups.shape[1], _sample_size(groups.shape[0])
    if not sample or whole or count <= size:
        return Observation.of(low, high, (groups if sample else groups[:, :0]).float(), count)
    values = _choose(groups, size)
    tails, edge = _largest(_candidates_for_tails(groups, values), size // _TAIL_SHARE)
    return Observation(low, high, values.float(), count, tails.float(), edge.float())


def _sample_size(groups: int) -> int:
    return max(SAMPLE_SIZE // groups, _GROUP_SAMPLE_SIZE)


def _choose(values: Tensor, size: int) -> Tensor:
    """Sample `size` columns at random (a fixed stride could align with the layout), the same at every call."""
    count = values.shape[1]
    if count <= size:
        return values
    generator = torch.Generator().manual_seed(count)
    # A permutation of a large tensor's positions takes seconds; from many positions, draws hardly repeat.
    if count <= 4 * size:
        index = torch.randperm(count, generator=generator)[:size]
    else:
        index = torch.randint(count, (size,), generator=generator)
    return values[:, index.to(values.device)]


def _largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k values of largest magnitude per group, (groups, k), and the next magnitude, (groups,)."""
    k = min(k, values.shape[1] - 1)
    order = values.abs().topk(k + 1, dim=1)
    return values.gather(1, order.indices[:, :k]), order.values[:, k]


def _candidates_for_tails(groups: Tensor, sample: Tensor) -> Tensor:
    """Preselect values of a single group by a bound estimated from its sample: sorting millions takes long."""
    if len(groups) > 1:
        return groups
    size = sample.shape[1]
    wanted = 2 * (size // _TAIL_SHARE) * size / groups.shape[1]
    bound = sample[0].abs().float().kthvalue(size - int(max(wanted, 32))).values
    found = groups[groups.abs() > bound]
    return found.unsqueeze(0) if len(found) > size // _TAIL_SHARE else groups


def minmax_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return the extrema, without clipping. Arguments and result: see `RangeEstimator`."""
    return seen.low, seen.high


def percentile_range(percentile: float) -> RangeEstimator:
    """Return an estimator that clips at a percentile of |x|, in (0, 100], interpolated linearly as in numpy."""

    def estimate(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        points, weights = seen.weighted()
        weights = torch.ones_like(points) if weights is None else weights
        bound = torch.cat(
            [_weighted_percentile(points[rows].abs(), weights[rows], percentile) for rows in _parts(points)]
        )
        return torch.maximum(seen.low, -bound), torch.minimum(seen.high, bound)

    return estimate


def _weighted_percentile(values: Tensor, weights: Tensor, percentile: float) -> Tensor:
    """Return each row's percentile, (rows,), with every value repeated as often as its weight says."""
    values, order = values.sort(dim=1)
    reached = weights.double().gather(1, order).cumsum(dim=1)
    rank = (reached[:, -1:] - 1) * (percentile / 100)
    ranks = torch.cat([rank.floor(), rank.ceil()], dim=1)
    index = torch.searchsorted(reached, ranks + 1e-6, right=True).clamp(max=values.shape[1] - 1)
    below, above = values.gather(1, index).unbind(dim=1)
    return torch.lerp(below, above, (rank - rank.floor()).squeeze(1).float())


def mse_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Shrink the extrema by the factor with the least squared quantization error: 40 factors from 1 to 0.1.

    Factor 1 is included, so no group is quantized worse than with its extrema. Arguments and result: see
    `RangeEstimator`.
    """
    points, weights = seen.weighted()
    share = torch.cat(
        [
            _best_share(
                points[rows],
                None if weights is None else weights[rows],
                seen.low[rows],
                seen.high[rows],
                format,
                symmetric,
            )
            for rows in _parts(points)
        ]
    )
    return seen.low * share, seen.high * share


def _parts(values: Tensor) -> list[slice]:
    """Split the rows of (groups, values) into slices of about CHUNK elements."""
    rows = max(CHUNK // values.shape[1], 1)
    return [slice(start, start + rows) for start in range(0, len(values), rows)]


def _best_share(
    points: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, format: IntFormat | FloatFormat, symmetric: bool
) -> Tensor:
    """Return the factor on low..high with the least error, float32 (groups,)."""
    best, share = torch.full_like(low, torch.inf), torch.ones_like(low)
    for candidate in SHARES:
        error = squared_error(points, weights, low * candidate, high * candidate, format, symmetric)
        better = error < best
        best, share = torch.where(better, error, best), torch.where(better, candidate, share)
    return share


def squared_error(
    points: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, format: IntFormat | FloatFormat, symmetric: bool
) -> Tensor:
    """Return the squared quantization error under a range.

    Args:
        points: float32 (groups, points).
        weights: float32 (groups, points); None: all 1.
        low: float32 (groups,).
        high: float32 (groups,).
        format: The format.
        symmetric: Whether integers are symmetric.

    Returns:
        Weighted sum of squared errors, float32 (groups,).
    """
    scale, zero_point = scale_from_range(low, high, format, symmetric)
    zero_point = None if zero_point is None else zero_point.unsqueeze(1)
    error = (fake_quantize(points, format, scale.unsqueeze(1), zero_point) - points).square_()
    return error.sum(dim=1) if weights is None else (error * weights).sum(dim=1)


# ------------------------------------------------------ the squared error, searched wider

_GRID_STEPS = 100
_POINTS = 2048
"""Points that represent a group's sample in the grid searches."""
_MANY_ZERO_POINTS, _FEW_ZERO_POINTS = 256, 16
"""Zero points tried: for a single scale, and for each of many."""
_GOLDEN = (math.sqrt(5) - 1) / 2

Ranges = tuple[Tensor, Tensor]
"""(low, high), each float32 (candidates, groups)."""


@dataclass(frozen=True)
class SquaredError:
    """The squared quantization error of points, as a function of the range."""

    points: Tensor
    """float32 (groups, points)."""
    weights: Tensor
    """float32 (groups, points)."""
    format: IntFormat | FloatFormat
    symmetric: bool

    @classmethod
    def of(cls, seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> SquaredError:
        """Build the function; large samples become the means of 2048 bins, in which outliers keep their own bins.

        Args:
            seen: The observation.
            format: The format.
            symmetric: Whether integers are symmetric.
        """
        values, weights = seen.weighted()
        weights = torch.ones_like(values) if weights is None else weights
        if values.shape[1] <= _POINTS:
            return cls(values, weights, format, symmetric)
        width = ((seen.high - seen.low) / _POINTS).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        index = ((values - seen.low.unsqueeze(1)) / width).long().clamp(0, _POINTS - 1)
        zeros = values.new_zeros(len(values), _POINTS)
        counts = zeros.scatter_add(1, index, weights)
        sums = zeros.scatter_add(1, index, values * weights)
        return cls(sums / torch.where(counts > 0, counts, 1.0), counts, format, symmetric)

    def __call__(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the weighted sum of squared errors of each range; all are float32 (candidates, groups)."""
        parts = max(CHUNK // self.points.numel(), 1)
        errors = []
        for lows, highs in zip(low.split(parts), high.split(parts), strict=True):
            scale, zero_point = scale_from_range(lows, highs, self.format, self.symmetric)
            zero_point = None if zero_point is None else zero_point.unsqueeze(2)
            points = self.points.expand(len(lows), -1, -1).contiguous()
            rounded = fake_quantize(points, self.format, scale.unsqueeze(2), zero_point)
            errors.append((rounded.sub_(points).square_() * self.weights).sum(dim=2))
        return torch.cat(errors)

    def best(self, candidates: Ranges) -> Ranges:
        """Return each group's range with the least error, (1, groups) each."""
        index = self(*candidates).argmin(dim=0, keepdim=True)
        return candidates[0].gather(0, index), candidates[1].gather(0, index)


def mse_grid_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Search a grid for the range with the least squared error.

    The grid has 100 bounds; for two-sided data on an asymmetric grid, 100 widths x up to 256 zero points. Arguments and
    result: see `RangeEstimator`.
    """
    error = SquaredError.of(seen, format, symmetric)
    low, high = error.best(_candidates(seen, format, symmetric, _GRID_STEPS))
    return low[0], high[0]


def mse_fast_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Search a coarse grid, then refine each bound by golden-section search around the best point.

    Arguments and result: see `RangeEstimator`.
    """
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
    """Whether a single bound determines the range (symmetric or one-sided): bool (groups,)."""
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
    """Return ranges to try, (candidates, groups): `steps` bounds, or `steps` widths x zero points."""
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
    # One-sided groups among two-sided ones try their bounds repeatedly, which costs only time.
    repeat = [side.repeat_interleave(count, dim=0) for side in one]
    return torch.where(flat, repeat[0], low), torch.where(flat, repeat[1], high)


def _golden_section(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, steps: int = 12) -> Tensor:
    """Minimize an elementwise function that has a single minimum between low and high."""
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


# ------------------------------------------------------ the error of a layer's output


def weighted_mse_range(seen: Weighed, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Shrink a weight's extrema by the factor with the least error of the layer's output, see `weighted_mse`.

    Without inputs, as for a layer that calibration never calls, the least squared error of the weight itself decides.
    Arguments and result: see `RangeEstimator`.
    """
    if seen.sketch is None:
        return mse_range(observe(seen.values, whole=True), format, symmetric)
    low, high = torch.aminmax(seen.values.detach().float(), dim=1)
    share = least_output_error(seen, low, high, format, symmetric)
    return low * share, high * share


# ------------------------------------------------------ mean and deviation


@dataclass(frozen=True)
class Moments:
    """Running sums for mean and standard deviation."""

    total: Tensor
    """Sum, float64 (groups,)."""
    squares: Tensor
    """Sum of squares, float64 (groups,)."""
    count: int
    """Number of values seen per group."""

    @classmethod
    def of(cls, groups: Tensor, before: Moments | None = None) -> Moments:
        """Add a tensor (groups, values) of any floating dtype to what was seen before."""
        values = groups.detach().double()
        seen = cls(values.sum(dim=1), values.square().sum(dim=1), values.shape[1])
        if before is None:
            return seen
        return cls(before.total + seen.total, before.squares + seen.squares, before.count + seen.count)


def lsq_plus_range(seen: Moments, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return LSQ+'s initial range, mean +- 3 sigma (arXiv 2004.09576).

    A symmetric integer scale is max|mean +- 3 sigma| / 2^(k-1). Arguments and result: see `RangeEstimator`.
    """
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
    """Extrema of each token of a batch."""

    low: Tensor
    """float32 (tokens,)."""
    high: Tensor
    """float32 (tokens,)."""

    @classmethod
    def of(cls, tokens: Tensor) -> Tokens:
        """Observe a tensor (tokens, features) of any floating dtype."""
        low, high = torch.aminmax(tokens.detach().float(), dim=1)
        return cls(low, high)


def pruned_range(quantile: float) -> RangeEstimator:
    """Return an estimator that clips at a quantile, in (0, 1], of the tokens' bounds.

    Token-Wise Clipping of Outlier Suppression (arXiv 2209.13325). The upper bound is the largest token maximum that
    does not exceed the quantile of the maxima's magnitudes; the lower bound likewise.
    """

    def estimate(seen: Tokens, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        high, low = _largest_within(seen.high, quantile), -_largest_within(-seen.low, quantile)
        return low.unsqueeze(0), high.unsqueeze(0)

    return estimate


def _largest_within(bounds: Tensor, quantile: float) -> Tensor:
    """Return the largest of `bounds`, (tokens,), that does not exceed the quantile of their magnitudes, 0-d."""
    within = bounds <= torch.quantile(bounds.abs(), quantile)
    return torch.where(within, bounds, -torch.inf).max()


def _quantile_clipped(groups: Tensor) -> Observation:
    """Clip the extrema at the centre of the bin, of 2048 over |x|, that holds the 99.999th percentile."""
    seen = Histogram.of(groups)
    low, high = seen.clipped((quantile_bins(seen.counts, _AVG_QUANTILE) + 0.5) * seen.width)
    return Observation.of(low, high, groups[:, :0].float(), groups.shape[1])


_AVG_QUANTILE = 0.99999


# ------------------------------------------------------ by name

RangeEstimator = Callable[[Any, IntFormat | FloatFormat, bool], tuple[Tensor, Tensor]]
"""(observer's state, format, whether integers are symmetric) -> (low, high), each float32 (groups,)."""


@dataclass(frozen=True)
class Observer:
    """Statistics to collect of a tensor, and the range that follows from them."""

    see: Callable[[Tensor, Any], Any]
    """(tensor (groups, values), state before or None) -> state after."""
    estimate: RangeEstimator
    per_token: bool = False
    """Whether `see` takes (tokens, features) instead."""

    def __call__(self, seen: Any, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Return the range for a state of this observer; see `RangeEstimator`."""
        return self.estimate(seen, format, symmetric)


def _see_extrema(groups: Tensor, before: Observation | None) -> Observation:
    seen = observe(groups, sample=False)
    return seen if before is None else before.merge(seen)


def _see_sample(groups: Tensor, before: Observation | None) -> Observation:
    seen = observe(groups)
    return seen if before is None else before.merge(seen)


def averaged(see: Callable[[Tensor], Any], estimate: RangeEstimator, per_token: bool = False) -> Observer:
    """Return an observer that averages the ranges of single batches, with one scale for the whole tensor.

    Args:
        see: Collects the statistics of one batch. The observer's state is a tuple of these.
        estimate: Chooses the range of one batch.
        per_token: Whether `see` takes (tokens, features).
    """

    def mean(seen: Any, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        lows, highs = zip(*(estimate(batches, format, symmetric) for batches in _side_by_side(seen)), strict=True)
        return torch.cat(lows).mean(dim=0, keepdim=True), torch.cat(highs).mean(dim=0, keepdim=True)

    return Observer(lambda groups, before: (*(before or ()), see(groups)), mean, per_token)


def _side_by_side(batches: Sequence[Any]) -> list[Any]:
    """Stack observations of equal sizes as groups of a single one, so that a search handles them at once."""
    if not isinstance(batches[0], Observation):
        return list(batches)
    sizes: dict[tuple[int, ...], list[Observation]] = {}
    for batch in batches:
        sizes.setdefault((batch.count, batch.values.shape[1], batch.tails.shape[1]), []).append(batch)

    def joined(alike: list[Observation], name: str) -> Tensor:
        return torch.cat([getattr(batch, name) for batch in alike])

    return [
        Observation(
            joined(alike, "low"),
            joined(alike, "high"),
            joined(alike, "values"),
            alike[0].count,
            joined(alike, "tails"),
            joined(alike, "edge"),
        )
        for alike in sizes.values()
    ]


@dataclass(frozen=True)
class Whole:
    """A weight, and an observer's state for it."""

    values: Tensor
    """The weight, (groups, values)."""
    seen: Any


def on_weights(observer: Observer, guarded: bool = True) -> Observer:
    """Adapt an observer to weights, which are available as a whole: no sampling.

    Args:
        observer: Sees a weight once; earlier states are dropped.
        guarded: Whether to keep the extrema of groups for which clipping would increase the squared error. Rows with
            rare, large weights lose far more by clipping than all others gain by a finer grid.
    """
    if observer.estimate is weighted_mse_range:
        return observer  # sees weights alone, and has a guard of its own

    def see(groups: Tensor, before: Any) -> Whole:
        sampled = observer.see is _see_sample
        return Whole(groups, observe(groups, whole=True) if sampled else observer.see(groups, None))

    def estimate(seen: Whole, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        low, high = observer.estimate(seen.seen, format, symmetric)
        if not guarded or observer.estimate in (minmax_range, mse_range):  # never worse than the extrema
            return low, high
        least, most = torch.aminmax(seen.values.detach().float(), dim=1)
        clip = torch.cat(
            [
                squared_error(x, None, low[rows], high[rows], format, symmetric)
                <= squared_error(x, None, least[rows], most[rows], format, symmetric)
                for rows in _parts(seen.values)
                for x in [seen.values[rows].detach().float()]
            ]
        )
        return torch.where(clip, low, least), torch.where(clip, high, most)

    return Observer(see, estimate)


def percentile_observer(percentile: float) -> Observer:
    """Return an observer that clips at a percentile of a sample, see `percentile_range`."""
    return Observer(_see_sample, percentile_range(percentile))


def token_observer(quantile: float) -> Observer:
    """Return an observer for Token-Wise Clipping at a quantile, averaged over batches; 1 means no clipping."""
    return averaged(Tokens.of, pruned_range(quantile), per_token=True)


OBSERVERS: dict[str, Observer] = {
    "minmax": Observer(_see_extrema, minmax_range),
    "mse": Observer(_see_sample, mse_range),
    "mse_grid": Observer(_see_sample, mse_grid_range),
    "mse_fast": Observer(_see_sample, mse_fast_range),
    "lsq_plus": Observer(Moments.of, lsq_plus_range),
    "percentile": Observer(Histogram.of, histogram_percentile),
    "mse_histogram": Observer(Histogram.of, histogram_mse),
    "weighted_mse": Observer(lambda groups, before: Weighed(groups), weighted_mse_range),
    "entropy": Observer(Histogram.of, histogram_entropy),
    "avg_minmax": averaged(lambda groups: observe(groups, sample=False), minmax_range),
    "avg_quantile": averaged(_quantile_clipped, minmax_range),
    "avg_mse_fast": averaged(observe, mse_fast_range),
    "avg_prune_minmax": token_observer(1.0),
}
"""The names are `quant.validation.OBSERVER_NAMES`. For percentiles other than 99.99 see `percentile_observer`."""
AVERAGING = frozenset(name for name in OBSERVERS if name.startswith("avg_"))
"""Observers that average over batches; they support a single scale for the whole tensor only."""
