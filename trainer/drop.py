"""The dual of a budget: the cheapest assignment whose quality stays within a drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from policy.budget import Budget
from policy.solve import Table

STEPS = 10
"""halvings of the range of costs: to a thousandth of it"""


def cheapest_budget(budget: Budget, values: Table, quality: Callable[[Sequence[int]], float], floor: float) -> Budget:
    """`budget` with its first limit lowered, by bisection, as far as the most valuable choice within keeps its quality.

    Args:
        values: (decisions, choices); within each limit the choice with the largest sum of them is tried.
        quality: of a choice.
        floor: least quality.

    Where not even the whole budget keeps the quality, it comes back unchanged.
    """
    best = budget.solve(values)
    low, high = float(budget.tables[0].min(1).sum()), budget.costs(best)[0]
    if quality(best) < floor:
        return budget
    cheapest = _limited(budget, low).solve(values)
    if quality(cheapest) >= floor:
        return _limited(budget, low)
    for _ in range(STEPS):
        middle = (low + high) / 2
        choice = _limited(budget, middle).solve(values)
        if quality(choice) >= floor:
            high = min(middle, budget.costs(choice)[0])
        else:
            low = middle
    return _limited(budget, high)


def _limited(budget: Budget, limit: float) -> Budget:
    return replace(budget, limits=(limit, *budget.limits[1:]))
