"""The dual of a budget: the cheapest assignment whose quality stays within a drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from policy.budget import Budget
from policy.solve import Table
from trainer.search.selection import Choice, Contest

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
    cheapest = limited(budget, low).solve(values)
    if quality(cheapest) >= floor:
        return limited(budget, low)
    for _ in range(STEPS):
        middle = (low + high) / 2
        choice = limited(budget, middle).solve(values)
        if quality(choice) >= floor:
            high = min(middle, budget.costs(choice)[0])
        else:
            low = middle
    return limited(budget, high)


def cheapest_choice(contest: Contest, choice: Choice, floor: float, everything: Sequence[Choice] | None) -> Choice:
    """The cheapest choice found that keeps the quality; `choice` itself where none does.

    What bisects over budgets sees one choice for each of them, the most valuable by what is known of single decisions.
    So it is done again with the effects measured around the best choice so far, as long as that finds a cheaper one.

    Args:
        everything: all fitting choices, where so many can be judged: then nothing is left to search.
    """
    budget = contest.budget

    def quality(choice: Sequence[int]) -> float:
        return float(contest.judged([tuple(choice)])[0, 1].mean())

    def cheapest() -> Choice:
        keeping = (c for c in contest.seen if budget.fits(c) and quality(c) >= floor)
        return min(keeping, key=lambda c: budget.costs(c)[0], default=choice)

    if everything is not None:
        contest.judged(everything)
        return cheapest()
    choice = cheapest()
    for _ in range(contest.rounds):
        effect, _ = contest.effect_table(choice)
        cheapest_budget(limited(budget, budget.costs(choice)[0]), -effect, quality, floor)
        before, choice = choice, cheapest()
        if choice == before:
            break
    return choice


def limited(budget: Budget, limit: float) -> Budget:
    """`budget` with another first limit."""
    return replace(budget, limits=(limit, *budget.limits[1:]))
