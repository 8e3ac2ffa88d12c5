"""The range of a weight with the least error of its layer's output, known from sums over the layer's inputs.

An error d of a row of the weight changes the output by d x, whose square over the calibration data is d M d^T, where M
is the inputs' second-moment matrix, the sum of x x^T. M itself would be as large as a weight. Its diagonal is kept, and
S = R X, a few sums of the inputs with random signs R: E[S^T S] is M times their number (Achlioptas, "Database-friendly
random projections", 2003). The sums leave no input out, so rare tokens with huge features count as they should.

The error is the mean of two estimates: by the diagonal, which is exact but takes the inputs as uncorrelated, and by the
sums, which see correlations but are noisy. Either alone chooses worse ranges on some of what was measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quant.formats import FloatFormat, IntFormat
from quant.quant_utils import fake_quantize, scale_from_range

PROJECTIONS = 32
"""Random sums kept for each half of the calibration data."""
SHARES = torch.linspace(1.0, 0.1, 40).tolist()
"""Factors on the extrema that are tried."""
CHUNK = 1 << 18
"""Elements processed at a time, so that they stay in the CPU cache."""


class InputSketch:
    """Sums over a layer's inputs, of two halves of the calibration batches; a single batch is halved.

    A weight is a stack of blocks, (blocks, rows, columns), each of which multiplies inputs of its own: the groups of a
    convolution, experts, or a single one.
    """

    def __init__(self) -> None:
        self.batch = 0
        """Number of the calibration batch that the layer is called on."""
        self._halves: list[Tensor] = []
        self._split = False
        """Whether the two halves are those of the first batch."""
        self._signs = torch.Generator().manual_seed(0)

    def add(self, inputs: Tensor | Sequence[Tensor]) -> None:
        """Add the inputs of one call.

        Args:
            inputs: Any floating dtype, (blocks, n, columns): what each block's rows are multiplied with. A sequence of
                (n, columns) if blocks have different n.
        """
        blocks = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        middle = [block.shape[-2] // 2 for block in blocks]
        first = self._sum([block[..., :m, :] for block, m in zip(blocks, middle, strict=True)])
        second = self._sum([block[..., m:, :] for block, m in zip(blocks, middle, strict=True)])
        if not self._halves:
            self._halves = [torch.zeros_like(first), torch.zeros_like(first)]
            self._split = self.batch == 0
        if self.batch == 0:
            self._halves[0] += first
            self._halves[1] += second
            return
        if self._split:  # there are batches enough for two halves
            self._halves[0] += self._halves[1]
            self._halves[1].zero_()
            self._split = False
        self._halves[self.batch % 2] += first + second

    def _sum(self, blocks: list[Tensor]) -> Tensor:
        """Return float32 (blocks, PROJECTIONS + 1, columns)."""
        sums = []
        for block in blocks:
            x = block.float()
            signs = torch.randint(0, 2, (PROJECTIONS, x.shape[-2]), generator=self._signs, dtype=torch.int8)
            projected = signs.to(x.device).float().mul_(2).sub_(1) @ x
            sums.append(torch.cat([projected, x.square().sum(dim=-2, keepdim=True)], dim=-2))
        return sums[0] if sums[0].dim() == 3 else torch.stack(sums)

    @property
    def is_finite(self) -> bool:
        """Whether no input was NaN or infinite."""
        return all(bool(half.isfinite().all()) for half in self._halves)

    def halves(self) -> Tensor | None:
        """Return float32 (2, blocks, PROJECTIONS + 1, columns): random sums, and last the sum of squares.

        None if the layer was not called.
        """
        return torch.stack(self._halves) if self._halves else None


@dataclass(frozen=True)
class Weighed:
    """A weight and what is known of its inputs; the state of the observer 'weighted_mse'."""

    values: Tensor
    """(groups, values): the values that share a scale, as for other observers."""
    rows: Tensor | None = None
    """float32 (blocks * rows, columns): the weight as matrices; or (blocks * rows * groups, columns / groups) if groups
    of columns have scales of their own. None: nothing is known of the inputs."""
    sketch: Tensor | None = None
    """See `InputSketch.halves`."""


def least_output_error(
    seen: Weighed, low: Tensor, high: Tensor, format: IntFormat | FloatFormat, symmetric: bool
) -> Tensor:
    """Choose the factor on each range that changes the layer's output least.

    The layer keeps its ranges if factors that are chosen on one half of the calibration data, for whichever half, do
    not lower the error on the other half: ranges are clipped only where that pays on data that they were not chosen on.

    Args:
        seen: The weight and its inputs' sketch.
        low: float32 (groups,).
        high: float32 (groups,).
        format: The format.
        symmetric: Whether integers are symmetric.

    Returns:
        Factors, float32 (groups,).
    """
    assert seen.rows is not None and seen.sketch is not None
    blocks, columns = seen.sketch.shape[1], seen.sketch.shape[3]
    groups = columns // seen.rows.shape[1]
    count = len(seen.rows) // (blocks * groups)
    low, high = (
        bound.expand(blocks * count * groups).view(blocks, count, groups).transpose(1, 2).reshape(-1, count, 1)
        for bound in (low, high)
    )
    parts = output_errors(seen, low, high, format, symmetric)
    if len(seen.values) == 1:  # one factor for all
        whole = torch.stack([errors.flatten(2).sum(dim=2, keepdim=True) for _, errors in parts]).sum(dim=0)
        parts, chosen = iter([((slice(None), slice(None)), whole.unsqueeze(3))]), low.new_zeros(1, 1, dtype=torch.long)
    else:
        chosen = low.new_zeros(low.shape[:2], dtype=torch.long)
    change = low.new_zeros(2)  # of the error of each half, by factors that are chosen on the other
    for part, errors in parts:
        chosen[part] = errors.sum(dim=0).argmin(dim=0)
        for half, (own, held_out) in enumerate((errors, errors.flip(0))):
            change[half] += (held_out.gather(0, own.argmin(dim=0, keepdim=True)) - held_out[:1]).sum()
    factors = torch.tensor(SHARES, device=low.device)
    chosen = torch.where((change < 0).all(), chosen, 0)
    return factors[chosen if len(seen.values) == 1 else chosen.view(blocks, groups, count).transpose(1, 2)].flatten()


def output_errors(
    seen: Weighed, low: Tensor, high: Tensor, format: IntFormat | FloatFormat, symmetric: bool
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Estimate the squared error of the layer's output, for every factor on the range and each half of the data.

    Args:
        seen: The weight and its inputs' sketch.
        low: float32 (blocks * groups, rows, 1): each group of columns counts as a block of its own.
        high: float32 of the same shape.
        format: The format.
        symmetric: Whether integers are symmetric.

    Yields:
        Slices of blocks * groups and of rows, and their errors, float32 (2, factors, *sizes of the slices), up to a
        constant factor: a part of the weight at a time, since all errors may be larger than the weight.
    """
    assert seen.rows is not None and seen.sketch is not None
    halves, blocks, sums, columns = seen.sketch.shape
    size = seen.rows.shape[1]
    weight = seen.rows.view(blocks, -1, columns // size, size).transpose(1, 2).flatten(0, 1)
    sketch = seen.sketch.view(halves, blocks, sums, -1, size).transpose(2, 3).flatten(1, 2)
    projections = sketch[:, :, :-1].permute(1, 3, 0, 2).flatten(2) / math.sqrt(sums - 1)
    squares = sketch[:, :, -1].transpose(0, 1).contiguous().transpose(1, 2)  # fast in this memory order
    for part in _parts(weight):
        points = weight[part].contiguous()
        errors = torch.empty(halves, len(SHARES), *points.shape[:2], device=weight.device)
        for number, share in enumerate(SHARES):
            scale, zero_point = scale_from_range(low[part] * share, high[part] * share, format, symmetric)
            error = fake_quantize(points, format, scale, zero_point).sub_(points)
            outputs = (error @ projections[part[0]]).square_().unflatten(2, (halves, sums - 1)).sum(dim=3)
            outputs += error.square_() @ squares[part[0]]
            errors[:, number] = outputs.permute(2, 0, 1)
        yield part, errors


def _parts(weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """Split (blocks, rows, columns) into parts of about CHUNK elements: slices of blocks and of rows."""
    blocks, rows, columns = weight.shape
    of_rows = min(max(CHUNK // columns, 1), rows)
    of_blocks = max(CHUNK // (columns * rows), 1)
    for block in range(0, blocks, of_blocks):
        for row in range(0, rows, of_rows):
            yield slice(block, block + of_blocks), slice(row, row + of_rows)
