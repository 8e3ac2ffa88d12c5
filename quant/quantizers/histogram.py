"""Calibrators: the bound that a histogram of |x| says a format should span (percentile, MSE, entropy).

The histogram grows with the data: a batch that reaches further adds bins of the same width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats import FloatFormat, IntFormat
from quant.quant_utils import fake_quantize, scale_from_range

BINS = 2048
"""bins of the first batch"""
MAX_BINS = 8192
"""bins from which neighbours are joined, so that one late outlier cannot take all memory"""
PERCENTILE = 99.99
_EDGES = 512
"""bounds that the MSE search tries, evenly spaced"""
_TIE = 1e-12
_FEWEST_BINS = 128
"""bins that the entropy search keeps at least"""
_CHUNK = 1 << 22
"""elements worked on at a time"""


@dataclass(frozen=True)
class Histogram:
    """Counts of |x| over bins of equal width, and the extrema of x.

    low, high, width: float32 (groups,), one entry for each scale; counts: float64 (groups, bins).
    """

    low: Tensor
    high: Tensor
    width: Tensor
    counts: Tensor

    @classmethod
    def of(cls, groups: Tensor, before: Histogram | None = None) -> Histogram:
        """Of a tensor laid out as (groups, values), neither of them 0, on top of what was seen `before`.

        Bins keep their width, unless there would be more than MAX_BINS. Infinities count as the largest value; NaN
        spoils everything. Calibration refuses both.
        """
        groups = groups.detach().float()
        largest = torch.finfo(torch.float32).max / 4
        low, high = (values.clamp(-largest, largest) for values in torch.aminmax(groups, dim=1))
        if before is None:
            width = torch.maximum(-low, high) / BINS
            return cls(low, high, width, _count(groups, width, BINS))
        low, high = torch.minimum(before.low, low), torch.maximum(before.high, high)
        reach = torch.maximum(-low, high)
        # Nothing but zeros so far says nothing about the width.
        width, counts = torch.where(before.width > 0, before.width, reach / BINS), before.counts
        while (needed := float((reach / width).nan_to_num(0).max())) > MAX_BINS:
            counts, width = _pairs(counts), width * 2
        bins = max(counts.shape[1], math.ceil(needed))
        counts = torch.nn.functional.pad(counts, (0, bins - counts.shape[1]))
        return cls(low, high, width, counts + _count(groups, width, bins))

    def centres(self) -> Tensor:
        """float32 (groups, bins)"""
        return (torch.arange(self.counts.shape[1], device=self.counts.device) + 0.5) * self.width.unsqueeze(1)

    def clipped(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """The extrema, clipped at +-bound (groups,)."""
        return torch.maximum(self.low, -bound), torch.minimum(self.high, bound)


def _count(groups: Tensor, width: Tensor, bins: int) -> Tensor:
    """float64 (groups, bins)"""
    index = (groups.abs() / width.unsqueeze(1)).nan_to_num(0, bins, bins).clamp(max=bins - 1).long()
    rows = len(groups)
    if rows > 1:
        index += torch.arange(rows, device=groups.device).unsqueeze(1) * bins
    return torch.bincount(index.flatten(), minlength=rows * bins).view(rows, bins).double()


def _pairs(counts: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(counts, (0, counts.shape[1] % 2))
    return padded.view(len(counts), -1, 2).sum(dim=2)


def histogram_percentile(seen: Histogram, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Clips at the upper edge of the first bin under which 99.99 % of |x| lie."""
    return seen.clipped(quantile_bins(seen.counts, PERCENTILE / 100).add(1) * seen.width)


def quantile_bins(counts: Tensor, share: float) -> Tensor:
    """Index of the first bin whose cumulative count reaches `share` of all: (groups, bins) -> int64 (groups,)."""
    cumulative = counts.cumsum(dim=1)
    return (cumulative < share * cumulative[:, -1:]).sum(dim=1).clamp(max=counts.shape[1] - 1)


def histogram_mse(seen: Histogram, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Clips at the bin edge, one of 512, for which quantizing the centres makes the least count-weighted squared error.

    On an asymmetric grid the centres stand on the side that reaches further.
    """
    bins = seen.counts.shape[1]
    sign = torch.where(seen.high >= -seen.low, 1.0, -1.0)
    centres = seen.centres() * sign.unsqueeze(1)
    best = torch.full_like(seen.low, torch.inf, dtype=torch.float64)
    bound = seen.width * bins
    for edges in torch.arange(bins, 0, -max(bins // _EDGES, 1), device=bound.device).split(
        max(_CHUNK // seen.counts.numel(), 1)
    ):
        bounds = edges.unsqueeze(1) * seen.width  # (edges, groups)
        scale, zero_point = scale_from_range(
            torch.maximum(seen.low, -bounds), torch.minimum(seen.high, bounds), format, symmetric
        )
        zero_point = None if zero_point is None else zero_point.unsqueeze(2)
        points = centres.expand(len(edges), -1, -1).contiguous()
        error = (fake_quantize(points, format, scale.unsqueeze(2), zero_point) - points).double().square()
        least, where = (error * seen.counts).sum(dim=2).min(dim=0)
        bound = torch.where(least < best, bounds.gather(0, where.unsqueeze(0))[0], bound)
        best = torch.minimum(best, least)
    return seen.clipped(bound)


def histogram_entropy(seen: Histogram, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Clips where the quantized histogram diverges least (Kullback-Leibler) from the clipped one.

    As pytorch-quantization's HistogramCalibrator does it ('entropy'). The first bin counts as the second: the mass at
    zero costs nothing to represent, and after ReLU, GELU or softmax it would rule the choice.
    """
    counts = torch.cat([seen.counts[:, 1:2], seen.counts[:, 1:]], dim=1)
    one_sided = (seen.low >= 0) | (seen.high <= 0)
    unsigned = one_sided & (not symmetric and isinstance(format, IntFormat))
    levels = [2 ** int(format.bits - 1 + own) for own in unsigned.int().tolist()]
    bins = torch.stack([_least_divergence(row, own) for row, own in zip(counts, levels, strict=True)])
    return seen.clipped(bins * seen.width)


def _least_divergence(counts: Tensor, levels: int) -> Tensor:
    """Number of bins to keep, int64 0-d: the last of those with the least KL(P || Q), at least _FEWEST_BINS.

    For i bins, P is the histogram up to i with the rest's mass on its last bin. Q is the same bins without that mass,
    merged to `levels` levels, each of which is spread evenly over those of its bins that are not empty.

    Within a level, log Q is constant: all sums over bins are differences of cumulative sums at the levels' borders.
    """
    total, bins = counts.sum(), len(counts)
    sizes = torch.arange(min(max(_FEWEST_BINS, levels), bins), bins + 1, device=counts.device)
    if not total or bins <= levels:
        return sizes[-1]
    mass, filled, plogp = (_cumulative(v) for v in (counts, (counts > 0).double(), torch.xlogy(counts, counts)))
    last, tail = counts[sizes - 1], total - mass[sizes]
    divergence = torch.xlogy(last + tail, last + tail) + plogp[sizes - 1]
    borders = torch.arange(levels + 1, device=counts.device)
    for part in torch.arange(len(sizes), device=counts.device).split(max(_CHUNK // levels, 1)):
        edges = (borders * sizes[part].unsqueeze(1) + levels - 1) // levels  # bin j is of level j * levels // size
        in_level = mass[edges].diff(dim=1)
        spread = in_level / filled[edges].diff(dim=1)
        moved = in_level.clone()
        moved[:, -1] += tail[part]
        divergence[part] -= torch.where(in_level > 0, torch.xlogy(moved, spread), 0.0).sum(dim=1)
    divergence = divergence / total + (mass[sizes] / total).log()
    # With nothing in the last bin to spread, the tail's mass there diverges without limit; with all bins, none is left.
    divergence = torch.where((tail > 0) & (last == 0), torch.inf, divergence)
    return sizes[(divergence <= divergence.min() + _TIE).nonzero()[-1, 0]]


def _cumulative(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... values: (n,) -> (n + 1,)."""
    return torch.nn.functional.pad(values.cumsum(0), (1, 0))
