"""JointBudget: hard limits on costs that depend on several decisions at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.budget import Budget
from policy.factors import Factor, expected_cost, mean_costs, solve_factors, total_cost
from policy.solve import Table


@dataclass(frozen=True)
class JointBudget(Budget):
    """Limits on costs that are sums of factors.

    `tables` hold the mean cost of each choice over the choices of the other decisions: they order the choices of a
    decision, but do not add up to a cost.
    """

    factors: tuple[Factor, ...] = ()

    @classmethod
    def within(cls, factors: Sequence[Factor], limits: Sequence[float], decisions: int, choices: int) -> JointBudget:
        """Return the budget of factors whose tables belong to `limits`, for a space of this shape."""
        tables = (mean_costs(factors, index, decisions, choices) for index in range(len(limits)))
        return cls(tuple(tables), tuple(limits), tuple(factors))

    def costs(self, choice: Sequence[int]) -> list[float]:
        """Return the cost of a choice for each limit, in its unit."""
        return [total_cost(self.factors, index, choice) for index in range(len(self.limits))]

    def expected_costs(self, probabilities: Table) -> list[float]:
        """Return the expectation of each cost; see `Budget.expected_costs`."""
        drawn = torch.from_numpy(probabilities)
        return [float(expected_cost(self.factors, index, drawn)) for index in range(len(self.limits))]

    def expected_ratio(self, probabilities: Tensor) -> Tensor:
        """Return the largest expected cost / limit; see `Budget.expected_ratio`."""
        limits = enumerate(self.limits)
        return torch.stack([expected_cost(self.factors, index, probabilities) / limit for index, limit in limits]).max()

    def solve(self, values: Table, terms: Sequence[Factor] = ()) -> list[int]:
        """Return the fitting choice with the largest sum of values, exactly; see `Budget.solve`."""
        return solve_factors(values, self.factors, self.limits, terms)
