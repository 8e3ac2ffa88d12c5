"""Range estimators that use a histogram of |x|: percentile, MSE and entropy.

The histogram grows with the data: a batch with larger values adds bins of the same width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats import FloatFormat, IntFormat
from quant.quant_utils import fake_quantize, scale_from_range

BINS = 2048
"""Bins of the first batch."""
MAX_BINS = 8192
"""Above this number of bins, neighbours are merged, so that a late outlier cannot exhaust the memory."""
PERCENTILE = 99.99
_EDGES = 512
"""Evenly spaced bounds that the MSE search tries."""
_TIE = 1e-12
_FEWEST_BINS = 128
"""Least number of bins that the entropy search keeps."""
_CHUNK = 1 << 22
"""Elements processed at a time."""


@dataclass(frozen=True)
class Histogram:
    """Counts of |x| in bins of equal width from 0, and the extrema of x; a group is the values that share a scale."""

    low: Tensor
    """float32 (groups,): smallest value."""
    high: Tensor
    """float32 (groups,): largest value."""
    width: Tensor
    """float32 (groups,): width of the bins."""
    counts: Tensor
    """float64 (groups, bins)."""

    @classmethod
    def of(cls, groups: Tensor, before: Histogram | None = None) -> Histogram:
        """Add a tensor to a histogram.

        Bins keep their width, unless there would be more than MAX_BINS. Infinities count as the largest value; NaN
        makes everything NaN. Calibration rejects both.

        Args:
            groups: Any floating dtype, (groups, values), not empty.
            before: The histogram so far.
        """
        groups = groups.detach().float()
        largest = torch.finfo(torch.float32).max / 4
        low, high = (values.clamp(-largest, largest) for values in torch.aminmax(groups, dim=1))
        if before is None:
            width = torch.maximum(-low, high) / BINS
            return cls(low, high, width, _count(groups, width, BINS))
        low, high = torch.minimum(before.low, low), torch.maximum(before.high, high)
        reach = torch.maximum(-low, high)
        # Only zeros so far: the width is still open.
        width, counts = torch.where(before.width > 0, before.width, reach / BINS), before.counts
        while (needed := float((reach / width).nan_to_num(0).max())) > MAX_BINS:
            counts, width = _pairs(counts), width * 2
        bins = max(counts.shape[1], math.ceil(needed))
        counts = torch.nn.functional.pad(counts, (0, bins - counts.shape[1]))
        return cls(low, high, width, counts + _count(groups, width, bins))

    def centres(self) -> Tensor:
        """Return the centres of the bins, float32 (groups, bins)."""
        return (torch.arange(self.counts.shape[1], device=self.counts.device) + 0.5) * self.width.unsqueeze(1)

    def clipped(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Return the extrema, clipped at +-bound; all (groups,)."""
        return torch.maximum(self.low, -bound), torch.minimum(self.high, bound)


def _count(groups: Tensor, width: Tensor, bins: int) -> Tensor:
    """Count |x| in bins: (groups, values) -> float64 (groups, bins)."""
    index = (groups.abs() / width.unsqueeze(1)).nan_to_num(0, bins, bins).clamp(max=bins - 1).long()
    rows = len(groups)
    if rows > 1:
        index += torch.arange(rows, device=groups.device).unsqueeze(1) * bins
    return torch.bincount(index.flatten(), minlength=rows * bins).view(rows, bins).double()


def _pairs(counts: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(counts, (0, counts.shape[1] % 2))
    return padded.view(len(counts), -1, 2).sum(dim=2)


def histogram_percentile(seen: Histogram, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Clip at the upper edge of the bin that holds the 99.99th percentile of |x|; see `observers.RangeEstimator`."""
    return seen.clipped(quantile_bins(seen.counts, PERCENTILE / 100).add(1) * seen.width)


def quantile_bins(counts: Tensor, share: float) -> Tensor:
    """Return the first bin whose cumulative count reaches a share of all values.

    Args:
        counts: (groups, bins).
        share: In (0, 1].

    Returns:
        int64 (groups,).
    """
    cumulative = counts.cumsum(dim=1)
    return (cumulative < share * cumulative[:, -1:]).sum(dim=1).clamp(max=counts.shape[1] - 1)


def histogram_mse(seen: Histogram, format: IntFormat | FloatFormat, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Clip at the bin edge, of 512 candidates, with the least squared error of the bins' centres, weighted by counts.

    On an asymmetric grid, the centres lie on the side of the larger extremum. Arguments and result: see
    `observers.RangeEstimator`.
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
    """Clip where the Kullback-Leibler divergence between the clipped and the quantized histogram is least.

    As pytorch-quantization's HistogramCalibrator does with 'entropy'. The count of the first bin is replaced by that of
    the second: values at zero are represented exactly, and after ReLU, GELU or softmax they would dominate the choice.
    Arguments and result: see `observers.RangeEstimator`.
    """
    counts = torch.cat([seen.counts[:, 1:2], seen.counts[:, 1:]], dim=1)
    one_sided = (seen.low >= 0) | (seen.high <= 0)
    unsigned = one_sided & (not symmetric and isinstance(format, IntFormat))
    levels = [2 ** int(format.bits - 1 + own) for own in unsigned.int().tolist()]
    bins = torch.stack([_least_divergence(row, own) for row, own in zip(counts, levels, strict=True)])
    return seen.clipped(bins * seen.width)


def _least_divergence(counts: Tensor, levels: int) -> Tensor:
    """Return the number of bins to keep, int64 0-d: the largest with the least KL(P || Q), at least _FEWEST_BINS.

    For i bins, P is the histogram up to i, with the mass of the rest added to its last bin. Q is the histogram up to i
    without that mass, merged to `levels` levels, each spread evenly over its bins that are not empty. Within a level,
    log Q is constant, so all sums over bins are differences of cumulative sums at the levels' borders.
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
    # If the last bin is empty, the tail's mass in it gives an infinite divergence; with all bins there is no tail.
    divergence = torch.where((tail > 0) & (last == 0), torch.inf, divergence)
    return sizes[(divergence <= divergence.min() + _TIE).nonzero()[-1, 0]]


def _cumulative(values: Tensor) -> Tensor:
    """Return the sums of the first 0, 1, ... values: (n,) -> (n + 1,)."""
    return torch.nn.functional.pad(values.cumsum(0), (1, 0))
