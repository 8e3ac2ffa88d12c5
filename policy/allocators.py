"""The competitors of the search: assignments that are decided once, before any training.

Each is a pure function of costs and measured effects; `trainer.search.baselines` makes the measurements. All give a
choice, one index per decision, that fits the budget.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":  # `python -m policy.allocators`: what it prints needs models and data, of a package above
    runpy.run_module("eval.sensitivity", run_name="__main__", alter_sys=True)

from typing import Literal, TypeAlias

import numpy as np

from policy.budget import Budget
from policy.solve import InfeasibleError, Table

Allocator: TypeAlias = Literal[
    "uniform", "random", "head_tail", "measured", "fisher", "hawq_v2", "qbert", "greedy", "exhaustive"
]

MAX_EXHAUSTIVE = 4096
"""choices up to which a space is small enough to try every one"""


def best_uniform(budget: Budget) -> list[int]:
    """The one choice for all decisions that costs most and still fits. Raises InfeasibleError if none does."""
    decisions, choices = budget.tables[0].shape
    fitting = [index for index in range(choices) if budget.fits([index] * decisions)]
    if not fitting:
        raise InfeasibleError(budget.limits, [(t.sum(0).min(), t.sum(0).max()) for t in budget.tables])
    return [max(fitting, key=lambda index: budget.tables[0][:, index].sum())] * decisions


def head_tail(budget: Budget) -> list[int]:
    """The first and the last decision in the widest choice that fits, the rest uniform: the folklore rule.

    Where not even the rest's cheapest choice leaves room for both, the widest pair that does.
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
    """A random choice that fits: every decision alike, tilted towards what uses the budget.

    The tilt is drawn anew for each try, the fullest of the first 100 that fit is taken. Uniform draws would leave most
    of a tight budget unused, or never meet it.
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


def greedy(effect: Table, budget: Budget) -> list[int]:
    """From the best choice of each decision, step down where the least quality is lost for the cost saved.

    Args:
        effect: (decisions, choices), what each choice alone costs in quality.

    Raises InfeasibleError if nothing fits.
    """
    costs = np.sum([table / limit for table, limit in zip(budget.tables, budget.limits, strict=True)], axis=0)
    # An error rate on few examples has many equals: among them the dearer is kept, and little is given up at a time.
    choice = np.lexsort((-costs, effect), axis=1)[:, 0].tolist()
    while not budget.fits(choice):
        steps = [
            ((effect[d, c] - effect[d, taken]) / (costs[d, taken] - costs[d, c]), costs[d, taken] - costs[d, c], d, c)
            for d, taken in enumerate(choice)
            for c in range(effect.shape[1])
            if costs[d, c] < costs[d, taken]
        ]
        if not steps:
            raise InfeasibleError(budget.limits, [(t.min(1).sum(), t.max(1).sum()) for t in budget.tables])
        *_, decision, cheaper = min(steps)
        choice[decision] = cheaper
    return choice


def least_degradation(effect: Table, budget: Budget) -> list[int]:
    """The choice whose effects add up to the least, exactly: what every additive sensitivity asks for."""
    return budget.solve(-effect)
