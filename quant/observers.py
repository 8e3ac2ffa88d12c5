"""Range estimators: from the values a tensor takes to the range its format should span."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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
    if count <= 16 * size:
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


RangeEstimator = Callable[[Observation, IntFormat | FloatFormat, bool], tuple[Tensor, Tensor]]
"""(what was seen, format, symmetric) -> (low, high), each float32 (groups,)"""

OBSERVERS: dict[str, RangeEstimator] = {"minmax": minmax_range, "mse": mse_range}
"""by name; percentiles carry a number: `percentile_range(99.9)`"""
