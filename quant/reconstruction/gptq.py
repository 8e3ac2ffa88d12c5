"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those to come make up for each error."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import NotFiniteError
from quant.reconstruction.grid import WeightGrid

DAMPING = 0.01
"""Added to the Hessian's diagonal, as a share of its mean."""
LAZY = 128
"""Columns after which the errors are passed on to all others, in one product."""
ATTEMPTS = 8
"""Times that a Hessian is damped, ten times as much each time."""
PART_ELEMENTS = 2**26
"""Largest number of elements of weights and Hessians that are worked on at once."""


@torch.no_grad()
def gptq(
    weight: Tensor, hessian: Tensor, grid: WeightGrid, *, damping: float = DAMPING, act_order: bool = True
) -> Tensor:
    """Round matrices so that their products with the inputs change as little as possible in the squared error.

    All arithmetic is float64. The grid is fixed beforehand, so that columns in groups may be taken in any order
    ("static groups"). A column whose inputs were always 0 is rounded to nearest.

    Args:
        weight: (G, R, C).
        hessian: 2 X X^T of each matrix's inputs, (G, C, C).
        grid: The values that the weight may take.
        damping: Share of the mean of the Hessian's diagonal that is added to it.
        act_order: Whether columns are taken in descending order of the diagonal.

    Returns:
        The rounded matrices, float64 (G, R, C).
    """
    at_once = max(1, PART_ELEMENTS // (weight[0].numel() + hessian[0].numel()))
    parts = [slice(start, start + at_once) for start in range(0, len(weight), at_once)]
    return torch.cat([_gptq(weight[p].double(), hessian[p], grid.part(p), damping, act_order) for p in parts])


def _gptq(weight: Tensor, hessian: Tensor, grid: WeightGrid, damping: float, act_order: bool) -> Tensor:
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    if not act_order:
        order = order.sort(dim=1).values
    factor = _inverse_factor(hessian, order, damping)
    # Columns become rows, which are contiguous in memory.
    columns = weight.transpose(1, 2).gather(1, order.unsqueeze(2).expand(-1, -1, weight.shape[1]))
    for start in range(0, weight.shape[2], LAZY):
        block = columns[:, start : start + LAZY]
        stop = start + block.shape[1]
        errors = torch.empty_like(block)
        for i, here in enumerate(grid.columns(order[:, start:stop])):
            column = block[:, i]
            rounded = here.round(column)
            row = factor[:, start + i, start + i : stop].unsqueeze(2)
            errors[:, i] = (column - rounded) / row[:, 0]
            block[:, i + 1 :].addcmul_(row[:, 1:], errors[:, i : i + 1], value=-1)
            block[:, i] = rounded
        columns[:, stop:] -= factor[:, start:stop, stop:].transpose(1, 2) @ errors
    back = order.argsort(dim=1).unsqueeze(2).expand_as(columns)
    return columns.gather(1, back).transpose(1, 2)


def _inverse_factor(hessian: Tensor, order: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Hessian, (G, C, C), in an order of columns.

    A Hessian that is singular within float64 is damped ten times as much, until it is not.
    """
    index = order.unsqueeze(2).expand_as(hessian)
    diagonal = hessian.diagonal(dim1=1, dim2=2).double().gather(1, order)
    dead = diagonal <= 0
    live = (~dead).sum(1, keepdim=True)
    mean = torch.where(live > 0, diagonal.sum(1, keepdim=True) / live.clamp(min=1), 1.0)
    undamped = torch.where(dead, mean, diagonal)
    for attempt in range(ATTEMPTS):
        factor = hessian.gather(1, index).gather(2, index.transpose(1, 2)).double()
        factor.diagonal(dim1=1, dim2=2).copy_(undamped + damping * 10**attempt * mean)
        factor = factor.mT  # equal, since symmetric, and with the strides that LAPACK overwrites in place
        failed = torch.zeros(len(factor), dtype=torch.int32, device=factor.device)
        torch.linalg.cholesky_ex(factor, out=(factor, failed))
        if not failed.any():
            torch.cholesky_inverse(factor, out=factor)
            torch.linalg.cholesky_ex(factor, upper=True, out=(factor, failed))
        if not failed.any():
            return factor
    raise NotFiniteError("the Hessian of a layer's inputs cannot be inverted: they hold NaN or infinity")
