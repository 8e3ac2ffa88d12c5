"""Allocators: the competitors of the search, which decide once, before any training.

Each is a pure function of costs and measured sensitivities (`trainer.search.baselines` measures them) and returns a
choice, one index per decision, that fits the budget.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from policy.budget import Budget
from policy.solve import InfeasibleError, Table

Allocator: TypeAlias = Literal[
    "uniform", "random", "head_tail", "measured", "fisher", "hawq_v2", "qbert", "greedy", "exhaustive"
]

MAX_EXHAUSTIVE = 4096
"""Largest number of choices of a space that is searched exhaustively."""


def best_uniform(budget: Budget) -> list[int]:
    """Return the most expensive single index for all decisions that fits. Raises InfeasibleError if none does."""
    decisions, choices = budget.tables[0].shape
    fitting = [index for index in range(choices) if budget.fits([index] * decisions)]
    if not fitting:
        raise InfeasibleError(budget.limits, [(t.sum(0).min(), t.sum(0).max()) for t in budget.tables])
    return [max(fitting, key=lambda index: budget.tables[0][:, index].sum())] * decisions


def head_tail(budget: Budget) -> list[int]:
    """Give the first and last decision the widest choice that fits and make the rest uniform: the folklore rule.

    If not even the cheapest choice of the rest leaves room for it, take the widest one that fits.
    """
    decisions, choices = budget.tables[0].shape
    wide = sorted(range(choices), key=lambda index: -budget.tables[0][[0, -1], index].sum())
    rest = sorted(range(choices), key=lambda index: -budget.tables[0][:, index].sum())
    for end in wide:
        for middle in rest:
            choice = [middle] * decisions
            choice[0] = choice[-1] = end
            if budget.fits(choice):
                return choice
    return budget.solve(-budget.tables[0])


def random_choice(budget: Budget, generator: np.random.Generator, tries: int = 10_000) -> list[int]:
    """Return a random choice that fits, biased towards choices that use the budget.

    The bias is drawn for each try, and the fullest of the first 100 fitting choices is returned. Uniform draws would
    leave most of a tight budget unused, or never meet it.

    Args:
        budget: limits.
        generator: source of randomness.
        tries: largest number of draws; after that a random objective is solved under the budget.
    """
    table = budget.tables[0] / budget.limits[0]
    decisions = len(table)
    best: list[int] | None = None
    found = 0
    for _ in range(tries):
        weights = np.exp(-generator.exponential(10.0) * (table - table.min(1, keepdims=True)) * decisions / 4)
        shares = np.cumsum(weights / weights.sum(1, keepdims=True), axis=1)
        choice = (generator.random((decisions, 1)) > shares[:, :-1]).sum(1).tolist()
        if budget.fits(choice):
            found += 1
            if best is None or budget.ratio(choice) > budget.ratio(best):
                best = choice
            if found == 100:
                break
    return budget.solve(generator.random(table.shape)) if best is None else best


def greedy(sensitivity: Table, budget: Budget) -> list[int]:
    """Start from the best choice of each decision and step down where the least quality is lost per cost saved.

    Args:
        sensitivity: degradation from each choice alone, (decisions, choices).
        budget: limits.

    Raises:
        InfeasibleError: if nothing fits.
    """
    costs = np.sum([table / limit for table, limit in zip(budget.tables, budget.limits, strict=True)], axis=0)
    # Error rates on few examples have many ties: among these, prefer the more expensive choice and small steps.
    choice = np.lexsort((-costs, sensitivity), axis=1)[:, 0].tolist()
    while not budget.fits(choice):
        steps = [
            ((sensitivity[d, c] - sensitivity[d, taken]) / saved, saved, d, c)
            for d, taken in enumerate(choice)
            for c in range(sensitivity.shape[1])
            if (saved := costs[d, taken] - costs[d, c]) > 0
        ]
        if not steps:
            raise InfeasibleError(budget.limits, [(t.min(1).sum(), t.max(1).sum()) for t in budget.tables])
        *_, decision, cheaper = min(steps)
        choice[decision] = cheaper
    return choice


def least_degradation(sensitivity: Table, budget: Budget) -> list[int]:
    """Return the choice within the budget whose sensitivities have the smallest sum, solved exactly."""
    return budget.solve(-sensitivity)
