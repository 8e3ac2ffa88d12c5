"""Costs and values as sums of factors, tables over the joint choices of a few decisions: expectation, exact program.

The cost of a layer in a search of architecture depends on its format, on its widths, on its kernel and on whether its
block is kept: a table over the choices of these decisions. So does the value of two formats whose errors meet in one
block. Costs that add up over single decisions are the special case of one decision per factor, see `policy.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import LinearConstraint, OptimizeResult
from scipy.sparse import csr_array
from torch import Tensor

from policy.solve import ROUNDING, InfeasibleError, Row, Table, choice_of, magnitude_unit, minimize, solve_within

Values: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Factor:
    """Part of every cost, or of the value, that depends on a few decisions."""

    decisions: tuple[int, ...]
    """Indices of the decisions, each once."""
    tables: tuple[Values, ...]
    """One table per limit, with an axis per decision; of values, a single one."""

    def __post_init__(self) -> None:
        if len(set(self.decisions)) != len(self.decisions) or not self.decisions:
            raise ValueError(f"a factor is of one or several different decisions, got {self.decisions}")
        if any(table.ndim != len(self.decisions) or table.shape != self.tables[0].shape for table in self.tables):
            shapes = [table.shape for table in self.tables]
            raise ValueError(f"a factor of {len(self.decisions)} decisions has an axis each, got tables of {shapes}")

    def cost(self, limit: int, choice: Sequence[int]) -> float:
        """Return the cost of a choice, one index per decision of the whole space."""
        return float(self.tables[limit][tuple(choice[decision] for decision in self.decisions)])


def total_cost(factors: Sequence[Factor], limit: int, choice: Sequence[int]) -> float:
    """Return the cost of a choice for one of the limits, rounded once."""
    return math.fsum(factor.cost(limit, choice) for factor in factors)


def expected_cost(factors: Sequence[Factor], limit: int, probabilities: Tensor) -> Tensor:
    """Return the exact expectation of a cost if every decision is drawn independently.

    Args:
        factors: factors of the cost.
        limit: index of the limit that the cost is held against.
        probabilities: (decisions, choices).

    Returns:
        Scalar with a gradient.
    """

    def contracted(factor: Factor) -> Tensor:
        table = torch.from_numpy(factor.tables[limit])
        return reduce(lambda left, decision: left @ probabilities[decision], reversed(factor.decisions), table)

    return torch.stack([contracted(factor) for factor in factors]).sum()


def mean_costs(factors: Sequence[Factor], limit: int, decisions: int, choices: int) -> Table:
    """Return the mean cost of each choice of each decision, over all choices of the others: (decisions, choices).

    Parts of the cost in which a decision has no say are left out of its row.
    """
    table = np.zeros((decisions, choices))
    for factor in factors:
        for axis, decision in enumerate(factor.decisions):
            others = tuple(a for a in range(len(factor.decisions)) if a != axis)
            table[decision] += factor.tables[limit].mean(axis=others)
    return table


def cost_range(factors: Sequence[Factor], limit: int, decisions: int, choices: int) -> tuple[float, float]:
    """Return the lowest and the highest cost of any choice, for one of the limits."""
    program = _Program(factors, decisions, choices)
    ends = []
    for sign in (1.0, -1.0):
        result = program.solve(sign * program.costs(limit), [], presolve=True)
        ends.append(total_cost(factors, limit, choice_of(result, program.shape)))
    return ends[0], ends[1]


def solve_factors(
    values: Table, factors: Sequence[Factor], limits: Sequence[float], terms: Sequence[Factor] = ()
) -> list[int]:
    """Return the choice with the largest sum of `values` and `terms` whose costs are within every limit, exactly.

    Products of decisions are linear in one variable per joint choice of a factor, whose marginals are the decisions'
    own variables. Only these are integers: with them, the others follow.

    Args:
        values: (decisions, choices).
        factors: factors of the costs.
        limits: one per table of a factor.
        terms: values of joint choices, one table each.

    Returns:
        One index per decision.

    Raises:
        InfeasibleError: if no choice is within the limits; it states the range of each cost.
    """
    program = _Program(factors, values.shape[0], values.shape[1], terms)
    objective = program.of_decisions(values.max(1, keepdims=True) - values) + program.of_terms()
    allowed = [limit + ROUNDING * abs(limit) for limit in limits]
    return solve_within(
        partial(program.solve, objective),
        [program.row(index, limit) for index, limit in enumerate(allowed)],
        program.shape,
        lambda choice: [total_cost(factors, index, choice) > limit for index, limit in enumerate(allowed)],
        lambda: InfeasibleError(limits, [cost_range(factors, index, *values.shape) for index in range(len(limits))]),
    )


class _Program:
    """Mixed integer program: a 0/1 variable per choice, and one in [0, 1] per joint choice of several decisions."""

    def __init__(self, factors: Sequence[Factor], decisions: int, choices: int, terms: Sequence[Factor] = ()) -> None:
        self.factors, self.terms, self.shape = factors, terms, (decisions, choices)
        self.integers = decisions * choices
        sizes = [factor.tables[0].size if len(factor.decisions) > 1 else 0 for factor in (*factors, *terms)]
        self.starts = (self.integers + np.concatenate([[0], np.cumsum(sizes)])).astype(int).tolist()
        self.size: int = self.starts[-1]
        self.structure = [self._one_each(), *self._marginals()]

    def of_decisions(self, table: Table) -> Values:
        """Return the coefficients of a table (decisions, choices)."""
        return np.concatenate([table.ravel(), np.zeros(self.size - self.integers)])

    def costs(self, limit: int) -> Values:
        """Return the coefficients of a cost, counted from the cheapest joint choice of each factor."""
        return self._coefficients(
            (f, start, f.tables[limit]) for f, start in zip(self.factors, self.starts, strict=False)
        )

    def of_terms(self) -> Values:
        """Return the coefficients of what the terms lose, counted from the best joint choice of each."""
        starts = self.starts[len(self.factors) :]
        return self._coefficients(
            (term, start, -term.tables[0]) for term, start in zip(self.terms, starts, strict=False)
        )

    def _coefficients(self, tables: Iterable[tuple[Factor, int, Values]]) -> Values:
        """Return the coefficients of a sum of tables, each counted from its least entry."""
        coefficients = np.zeros(self.size)
        for factor, start, table in tables:
            first = factor.decisions[0] * self.shape[1] if table.ndim == 1 else start
            coefficients[first : first + table.size] += (table - table.min()).ravel()
        return coefficients

    def row(self, limit: int, most: float) -> Row:
        """Return the constraint that a cost is at most `most`."""
        room = math.fsum([most, *(-float(factor.tables[limit].min()) for factor in self.factors)])
        return Row.within(self.costs(limit), room)

    def solve(self, objective: Values, constraints: list[LinearConstraint], presolve: bool) -> OptimizeResult:
        """Minimize under further constraints."""
        scaled = objective / magnitude_unit(objective)
        return minimize(scaled, np.arange(self.size) < self.integers, [*self.structure, *constraints], presolve)

    def _one_each(self) -> LinearConstraint:
        rows = np.repeat(np.arange(self.shape[0]), self.shape[1])
        entries = np.ones(self.integers), (rows, np.arange(self.integers))
        return LinearConstraint(csr_array(entries, shape=(self.shape[0], self.size)), 1, 1)

    def _marginals(self) -> list[LinearConstraint]:
        """Return the equalities between each decision's variables and the sums of its joint choices' variables."""
        values, rows, columns, count = [], [], [], 0
        for factor, start in zip((*self.factors, *self.terms), self.starts, strict=False):
            if len(factor.decisions) == 1:
                continue
            shape = factor.tables[0].shape
            joint = np.arange(factor.tables[0].size)
            for axis, taken in enumerate(np.unravel_index(joint, shape)):
                own = np.arange(shape[axis])
                values += [np.ones(len(joint)), -np.ones(len(own))]
                rows += [count + taken, count + own]
                columns += [start + joint, factor.decisions[axis] * self.shape[1] + own]
                count += len(own)
        if not count:
            return []
        entries = np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))
        return [LinearConstraint(csr_array(entries, shape=(count, self.size)), 0, 0)]
