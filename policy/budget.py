"""Budget: hard limits on costs that add up over decisions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor

from policy.factors import Factor, solve_factors
from policy.solve import ROUNDING, Table, solve_assignment
from policy.space import SearchSpace
from quant.convert import Assignment
from quant.formats import Format


@dataclass(frozen=True)
class Limit:
    """Hard limit on a cost that adds up over layers."""

    name: str
    """'memory', 'compute' or 'latency'."""
    unit: str
    value: float
    of: Callable[[str, tuple[Format, Format]], float]
    """(layer, (weight format, activation format)) -> cost in `unit`."""

    def table(self, space: SearchSpace) -> Table:
        """Return the cost of each choice of each decision, (decisions, choices)."""
        return np.array(
            [
                [math.fsum(self.of(layer, space.runs_in(layer, pair)) for layer in d.layers) for pair in d.choices]
                for d in space.decisions
            ]
        )

    def total(self, assignment: Assignment) -> float:
        """Return the cost of an assignment in `unit`."""
        return math.fsum(self.of(layer, pair) for layer, pair in assignment.items())


@dataclass(frozen=True)
class Budget:
    """Limits on one or several costs, each with its table (decisions, choices); the first is the run's own."""

    tables: tuple[Table, ...]
    limits: tuple[float, ...]

    @classmethod
    def of(cls, space: SearchSpace, costs: Table, target: float, limits: Sequence[Limit]) -> Budget:
        """Return the budget of a run.

        Args:
            space: search space.
            costs: the run's own costs, (decisions, choices).
            target: limit on them.
            limits: hard limits on further costs.
        """
        tables = costs, *(limit.table(space) for limit in limits)
        return cls(tables, (target, *(limit.value for limit in limits)))

    def costs(self, choice: Sequence[int]) -> list[float]:
        """Return the cost of a choice for each limit, in its unit."""
        taken = np.asarray(choice)
        return [math.fsum(table[np.arange(len(table)), taken]) for table in self.tables]

    def ratio(self, choice: Sequence[int]) -> float:
        """Return the largest cost / limit of a choice: above 1 it does not fit."""
        return max(cost / limit for cost, limit in zip(self.costs(choice), self.limits, strict=True))

    def fits(self, choice: Sequence[int]) -> bool:
        """Return whether no limit is exceeded by more than the rounding error of a sum."""
        limits = zip(self.costs(choice), self.limits, strict=True)
        return all(cost <= limit + ROUNDING * abs(limit) for cost, limit in limits)

    def expected_costs(self, probabilities: Table) -> list[float]:
        """Return the expectation of each cost if decisions are drawn independently: (decisions, choices) -> numbers."""
        return [(probabilities * table).sum() for table in self.tables]

    def expected_ratio(self, probabilities: Tensor) -> Tensor:
        """Return the largest expected cost / limit: (decisions, choices) -> scalar with a gradient."""
        tables = zip(self.tables, self.limits, strict=True)
        return torch.stack([(probabilities * torch.from_numpy(table / limit)).sum() for table, limit in tables]).max()

    def solve(self, values: Table, terms: Sequence[Factor] = ()) -> list[int]:
        """Return the fitting choice with the largest sum of values, exactly.

        Args:
            values: (decisions, choices).
            terms: values of joint choices of a few decisions, which are added.

        Raises:
            InfeasibleError: if nothing fits.
        """
        if not terms:
            return solve_assignment(values, self.tables, self.limits)
        costs = [Factor((d,), tuple(table[d] for table in self.tables)) for d in range(len(values))]
        return solve_factors(values, costs, self.limits, terms)

    @property
    def size(self) -> int:
        """Number of choices, fitting or not."""
        decisions, choices = self.tables[0].shape
        return int(choices) ** int(decisions)

    def all_fitting(self) -> Iterator[tuple[int, ...]]:
        """Yield every choice that fits, for small spaces."""
        decisions, choices = self.tables[0].shape
        return (choice for choice in product(range(choices), repeat=decisions) if self.fits(choice))
