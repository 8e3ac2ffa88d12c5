"""Range estimators: from the values a tensor takes to the range its format should span."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats import FloatFormat, IntFormat
from quant.quant_utils import fake_quantize, scale_from_range

SAMPLE_SIZE = 1 << 16
"""values kept of a tensor for percentiles and the MSE search; the extrema see every value"""
_MSE_STEPS = 40
_MSE_NARROWEST = 0.1


@dataclass
class Observation:
    """What was seen of a tensor: running extrema and a sample of its values.

    low, high: float32 (groups,), one entry for each scale; values: float32 (groups, samples).
    """

    low: Tensor
    high: Tensor
    values: Tensor

    def merge(self, other: Observation) -> Observation:
        """Both together; the sample is thinned evenly once it outgrows SAMPLE_SIZE."""
        values = torch.cat([self.values, other.values], dim=1)
        return Observation(
            torch.minimum(self.low, other.low), torch.maximum(self.high, other.high), _thin(values, SAMPLE_SIZE)
        )


def observe(groups: Tensor) -> Observation:
    """Extrema and sample of a tensor laid out as (groups, values)."""
    groups = groups.detach().float()
    # At least 512 values for each group: a weight with thousands of output channels still searches well.
    return Observation(
        groups.amin(dim=1),
        groups.amax(dim=1),
        _thin(groups, max(SAMPLE_SIZE // groups.shape[0], 512) * groups.shape[0]),
    )


def _thin(values: Tensor, size: int) -> Tensor:
    """At most `size` values, taken at even distances; the distance is odd so that it does not follow an even layout."""
    step = math.ceil(values.numel() / size)
    return values if step <= 1 else values[:, :: step | 1].contiguous()


def minmax_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The extrema themselves: nothing is clipped."""
    return seen.low, seen.high


def percentile_range(percentile: float) -> RangeEstimator:
    """Clips at the given percentile of |x|, in (0, 100]."""

    def estimate(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
        bound = torch.quantile(seen.values.abs(), percentile / 100, dim=1)
        return torch.maximum(seen.low, -bound), torch.minimum(seen.high, bound)

    return estimate


def mse_range(seen: Observation, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The share of the extrema, over 40 steps down to a tenth, that quantizes the sample with the least squared error."""
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
