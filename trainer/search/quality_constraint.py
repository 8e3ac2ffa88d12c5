"""The dual of a budget: the cheapest assignment whose held-out quality stays within a drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from policy.budget import Budget
from policy.solve import Table
from trainer.search.selection import CandidateSelector, Choice

HALVINGS = 10
"""Bisection steps: the limit is found to a thousandth of the range of costs."""


def cheapest_budget(budget: Budget, values: Table, quality: Callable[[Sequence[int]], float], floor: float) -> Budget:
    """Lower the first limit by bisection as far as the most valuable choice within it keeps its quality.

    Args:
        budget: limits to start from; returned unchanged if not even its best choice keeps the quality.
        values: (decisions, choices); every limit is tried with the choice of the largest sum of values within it.
        quality: choice -> held-out quality.
        floor: least quality.
    """
    best = budget.solve(values)
    low, high = float(budget.tables[0].min(1).sum()), budget.costs(best)[0]
    if quality(best) < floor:
        return budget
    cheapest = limited(budget, low).solve(values)
    if quality(cheapest) >= floor:
        return limited(budget, low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        choice = limited(budget, middle).solve(values)
        if quality(choice) >= floor:
            high = min(middle, budget.costs(choice)[0])
        else:
            low = middle
    return limited(budget, high)


def cheapest_choice(
    selector: CandidateSelector, choice: Choice, floor: float, everything: Sequence[Choice] | None
) -> Choice:
    """Return the cheapest choice found that keeps the quality; `choice` itself if none does.

    A bisection sees one choice per budget, the most valuable by the sensitivities of single decisions. It is repeated
    with sensitivities measured around the best choice so far, as long as that finds a cheaper one.

    Args:
        selector: evaluates and remembers choices.
        choice: choice to improve on.
        floor: least quality.
        everything: all choices within the budget if all of them can be evaluated, else None.
    """
    budget = selector.budget

    def quality(choice: Sequence[int]) -> float:
        return float(selector.evaluated([tuple(choice)])[0, 1].mean())

    def cheapest() -> Choice:
        keeping = (c for c in selector.seen if budget.fits(c) and quality(c) >= floor)
        return min(keeping, key=lambda c: budget.costs(c)[0], default=choice)

    if everything is not None:
        selector.evaluated(everything)
        return cheapest()
    choice = cheapest()
    for _ in range(selector.rounds):
        sensitivity, _ = selector.sensitivity_table(choice)
        cheapest_budget(limited(budget, budget.costs(choice)[0]), -sensitivity, quality, floor)
        before, choice = choice, cheapest()
        if choice == before:
            break
    return choice


def limited(budget: Budget, limit: float) -> Budget:
    """Return the budget with another first limit."""
    return replace(budget, limits=(limit, *budget.limits[1:]))
