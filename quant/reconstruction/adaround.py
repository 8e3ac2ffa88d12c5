"""AdaRound (arXiv 2004.10568): learns for each weight whether to round it up or down, without training the weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quant.reconstruction.grid import WeightGrid

ITERATIONS = 1000
LEARNING_RATE = 1e-2
WARM_START = 0.2
"""Share of the iterations without the regularizer."""
BETA = (20.0, 2.0)
"""Exponent of the regularizer at its start and end: it first moves values near up or down, then all."""
REGULARIZER = 1.0
"""Weight of the regularizer's mean, beside an error counted in that of rounding to nearest."""
STRETCH = (-0.1, 1.1)
"""Ends of the stretched sigmoid (zeta and gamma of equation 23)."""


def adaround(
    weight: Tensor,
    hessian: Tensor,
    cross: Tensor,
    grid: WeightGrid,
    *,
    iterations: int = ITERATIONS,
    learning_rate: float = LEARNING_RATE,
) -> Tensor:
    """Round matrices up or down so that the outputs on rounded inputs X' come close to those of float on its own X.

    The squared error of all calibration examples is a quadratic form of the weights, so that no input is kept and no
    batch drawn: |(W + D) X' - W X|^2 = tr(D A D^T) + 2 tr(D B^T) + const, A = X' X'^T, B = W (A - X X'^T).

    Args:
        weight: W, (G, R, C).
        hessian: 2 X' X'^T of each matrix's inputs, (G, C, C).
        cross: 2 X X'^T, (G, C, C).
        grid: The values that the weight may take.
        iterations: Steps of Adam.
        learning_rate: Of Adam.

    Returns:
        The rounded matrices, float64 (G, R, C). No output channel's error exceeds that of rounding to nearest.
    """
    with torch.no_grad():
        weight, hessian, cross = weight.double(), hessian.double(), cross.double()
        nearest = grid.round(weight)
        pull = weight @ (hessian - cross)
        learned = _learn(weight, hessian, pull, grid, nearest, iterations, learning_rate)
        better = error(learned - weight, hessian, pull) < error(nearest - weight, hessian, pull)
        return torch.where(better.unsqueeze(2), learned, nearest)


def error(change: Tensor, hessian: Tensor, pull: Tensor) -> Tensor:
    """Return twice the squared error of each output channel, up to a constant.

    Args:
        change: D, (G, R, C).
        hessian: 2 A, (G, C, C).
        pull: 2 B, (G, R, C).

    Returns:
        (G, R).
    """
    return (change * (change @ hessian + 2 * pull)).sum(2)


def _learn(
    weight: Tensor, hessian: Tensor, pull: Tensor, grid: WeightGrid, nearest: Tensor, iterations: int, rate: float
) -> Tensor:
    units = grid.units(weight).clamp(grid.low, grid.high)
    step = grid.step_at(units)
    down = torch.floor(units / step) * step
    of_nearest = error(nearest - weight, hessian, torch.zeros_like(pull)).sum()
    if not of_nearest > 0:
        return nearest
    # The rest is float32: a gradient needs no more.
    scale, floor = (grid.scale * step).float(), (grid.values(down) - weight).float()
    form, linear = (hessian / of_nearest).float(), (pull / of_nearest).float()
    room = (grid.high - down).div(step).clamp(max=1).float()
    low, high = STRETCH
    start = ((units - down) / step).clamp(0.01, 0.99).float()
    v = torch.logit((start - low) / (high - low)).requires_grad_()
    optimizer = torch.optim.Adam([v], rate, fused=True)
    for iteration in range(iterations):
        soft = torch.sigmoid(v.detach())
        h = soft * (high - low) + low
        inside = (h > 0) & (h < 1)
        h = h.clamp(0, 1)
        change = floor + scale * torch.minimum(h, room)
        gradient = 2 * (change @ form + linear) * scale
        if (beta := _beta(iteration / iterations)) is not None:
            from_middle = 2 * h - 1
            slope = 2 * beta * from_middle.abs().pow(beta - 1) * from_middle.sign()
            gradient -= REGULARIZER / v.numel() * slope
        v.grad = gradient * (inside * (high - low) * soft * (1 - soft))
        optimizer.step()
    up = torch.sigmoid(v.detach()) * (high - low) + low >= 0.5
    return grid.values((down + up * step).clamp(grid.low, grid.high))


def _beta(done: float) -> float | None:
    """Return the regularizer's exponent, annealed along a cosine; None during the warm start."""
    if done < WARM_START:
        return None
    progress = (done - WARM_START) / (1 - WARM_START)
    return BETA[1] + (BETA[0] - BETA[1]) * (1 + math.cos(math.pi * progress)) / 2
