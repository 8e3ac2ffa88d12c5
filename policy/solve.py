"""Exact multiple-choice knapsack: the most valuable assignment under hard budgets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from quant.errors import UserError

Table: TypeAlias = NDArray[np.float64]
"""float64 (decisions, choices)."""

ROUNDING = 1e-14
"""Relative tolerance of a budget. Summing the same costs in another order differs by this much, and a budget equal to
the cost of an assignment has to admit that assignment."""

MAGNITUDE = 1e3
"""Largest entry of the tables passed to HiGHS, whose absolute tolerance of infeasibility and gap is 1e-6."""
FORGIVEN = 1e-6
"""HiGHS's absolute tolerance of infeasibility."""

FINEST = 1e-7
"""Smallest step of a lattice relative to the largest entry: half of it is still above HiGHS's tolerance."""

MAX_CUTS = 10
"""Number of assignments just over a budget (within HiGHS's tolerance) to exclude before lowering the budget."""

MAX_NODES = 10_000
"""Branches after which the best assignment so far is taken. A time limit would make results irreproducible."""

_OPTIMAL, _INFEASIBLE = 0, 2  # status of scipy's milp


class InfeasibleError(UserError):
    """No assignment meets the budgets.

    Args:
        budgets: the budgets.
        ranges: (lowest, highest) cost of any assignment, per budget.
    """

    def __init__(self, budgets: Sequence[float], ranges: Sequence[tuple[float, float]]) -> None:
        self.ranges = list(ranges)
        limits = zip(budgets, ranges, strict=True)
        wanted = " and ".join(f"{budget!r} (possible: {low!r} to {high!r})" for budget, (low, high) in limits)
        super().__init__(f"no assignment costs at most {wanted}")


def solve_assignment(
    values: ArrayLike, costs: ArrayLike | Sequence[ArrayLike], budgets: float | Sequence[float]
) -> list[int]:
    """Return the choice with the largest sum of `values` whose sum of `costs` is within every budget.

    The result is exact to 1e-9 of the largest difference between values; budgets are checked on exactly rounded sums
    (see ROUNDING). In the rare case that optimality cannot be proven within MAX_NODES, such as values proportional to
    costs, a warning gives the gap.

    Args:
        values: (decisions, choices), for example log-probabilities.
        costs: (decisions, choices), or one such table per budget.
        budgets: a number, or one per table of costs.

    Returns:
        One index per decision.

    Raises:
        ValueError: for shapes that do not fit and numbers that are not finite.
        InfeasibleError: if no assignment meets the budgets; it states the possible range.
    """
    gains, tables, limits = _checked(values, costs, budgets)
    ranges = [(math.fsum(table.min(1)), math.fsum(table.max(1))) for table in tables]
    infeasible = InfeasibleError(limits, ranges)
    limits = [limit + ROUNDING * abs(limit) for limit in limits]
    if any(low > limit for limit, (low, _) in zip(limits, ranges, strict=True)):
        raise infeasible

    gains = gains - gains.max(1, keepdims=True)
    objective = -gains.ravel() / magnitude_unit(gains)
    one_each = LinearConstraint(csr_array(np.kron(np.eye(len(gains)), np.ones(gains.shape[1]))), 1, 1)

    def solve(constraints: list[LinearConstraint], presolve: bool) -> OptimizeResult:
        return minimize(objective, np.ones(gains.size), [one_each, *constraints], presolve)

    return solve_within(
        solve,
        [_row(table, limit) for table, limit in zip(tables, limits, strict=True)],
        gains.shape,
        lambda choice: [_total(table, choice) > limit for table, limit in zip(tables, limits, strict=True)],
        lambda: infeasible,
    )


@dataclass(frozen=True)
class Row:
    """A limit as HiGHS sees it."""

    weights: NDArray[np.float64]
    bound: float
    clear: bool
    """Whether the bound is clear of every possible sum: presolve is wrong if it is below one by less than HiGHS's
    tolerance."""

    @classmethod
    def within(cls, extra: NDArray[np.float64], room: float) -> Row:
        """Bound a sum of costs that count from the cheapest choice, because a large constant would hide differences.

        Bits times integers lie on a lattice: its bound is moved to the middle between the last sum within the limit and
        the next one.
        """
        if step := lattice_step(extra):
            weights, bound = np.rint(extra / step), math.floor(room / step) + 0.5
            unit = max(magnitude_unit(weights), 1.0)
            return cls(weights / unit, bound / unit, True)
        return cls(extra / magnitude_unit(extra), room / magnitude_unit(extra), False)

    @property
    def constraint(self) -> LinearConstraint:
        """The limit as scipy takes it."""
        return LinearConstraint(csr_array(self.weights.reshape(1, -1)), -np.inf, self.bound)

    def lowered(self, by: float) -> Row:
        """Return the limit, lower by `by`."""
        return replace(self, bound=self.bound - by)


def choice_of(result: OptimizeResult, shape: tuple[int, int]) -> list[int]:
    """Return the choice, one index per decision, that the first variables of a result make."""
    choice: list[int] = result.x[: shape[0] * shape[1]].reshape(shape).argmax(1).tolist()
    return choice


def minimize(
    objective: NDArray[np.float64], integrality: NDArray[Any], constraints: list[LinearConstraint], presolve: bool
) -> OptimizeResult:
    """Run HiGHS on variables in [0, 1].

    Raises:
        RuntimeError: if it returns neither a solution nor a proof that there is none.
    """
    result = milp(
        objective,
        integrality=integrality,
        bounds=(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0, "node_limit": MAX_NODES, "presolve": presolve},
    )
    if result.x is None and result.status != _INFEASIBLE:
        raise RuntimeError(f"HiGHS found no solution: {result.message}")
    return result


def solve_within(
    solve: Callable[[list[LinearConstraint], bool], OptimizeResult],
    rows: Sequence[Row],
    shape: tuple[int, int],
    over: Callable[[list[int]], Sequence[bool]],
    infeasible: Callable[[], InfeasibleError],
) -> list[int]:
    """Return the best choice that is within its limits exactly, not only within HiGHS's tolerance.

    Args:
        solve: (constraints, whether to presolve) -> result; its first variables are the choices of the decisions.
        rows: the limits.
        shape: (decisions, choices).
        over: choice -> whether it exceeds each limit.
        infeasible: makes the error for limits that nothing meets.

    Returns:
        One index per decision.
    """
    rows, cuts, margin = list(rows), list[LinearConstraint](), 2 * FORGIVEN
    while True:
        result = solve([*(row.constraint for row in rows), *cuts], all(row.clear for row in rows))
        if result.status == _INFEASIBLE:
            raise infeasible()
        choice = choice_of(result, shape)
        exceeded = over(choice)
        if not any(exceeded):
            if result.status != _OPTIMAL:
                warnings.warn(f"the proof did not end: within {result.mip_gap:.1e} of the best value", stacklevel=3)
            return choice
        # Over a budget by less than HiGHS's tolerance.
        if len(cuts) < MAX_CUTS:
            taken = np.zeros(len(result.x))
            taken[np.arange(shape[0]) * shape[1] + choice] = 1
            cuts.append(Row(taken, shape[0] - 1, True).constraint)
        else:  # Equal layers give too many such assignments, and their costs leave none just below the budget.
            rows = [row.lowered(margin * one) for row, one in zip(rows, exceeded, strict=True)]
            margin *= 2


def _row(table: Table, limit: float) -> Row:
    """Return the limit on the sum of one entry per decision."""
    return Row.within(table - table.min(1, keepdims=True), limit - math.fsum(table.min(1)))


def lattice_step(extra: Table) -> float:
    """Return the common divisor of all entries by Euclid's algorithm; 0 if it is below FINEST of the largest."""
    largest, step = float(extra.max()), 0.0
    for entry in np.unique(extra).tolist():
        while entry > FINEST * largest:
            step, entry = entry, abs(math.remainder(step, entry))
    if not step:
        return 1.0  # every entry is 0
    step = largest / round(largest / step)
    return step if np.abs(extra - np.rint(extra / step) * step).max() <= ROUNDING * largest else 0.0


def magnitude_unit(table: Table) -> float:
    """Return the divisor that makes MAGNITUDE the table's largest entry."""
    return float(np.abs(table).max()) / MAGNITUDE or 1.0


def _total(table: Table, choice: Sequence[int]) -> float:
    return math.fsum(table[np.arange(len(table)), choice])


def _checked(
    values: ArrayLike, costs: ArrayLike | Sequence[ArrayLike], budgets: float | Sequence[float]
) -> tuple[Table, list[Table], list[float]]:
    """Return values (decisions, choices), one table of costs per budget, and the budgets, all checked."""
    gains, tables = np.asarray(values, np.float64), np.asarray(costs, np.float64)
    limits = np.atleast_1d(np.asarray(budgets, np.float64))
    if tables.ndim == 2:
        tables = tables[None]
    if gains.ndim != 2 or gains.size == 0 or tables.shape[1:] != gains.shape or limits.shape != tables.shape[:1]:
        raise ValueError(
            f"values {gains.shape}, costs {tables.shape} and budgets {limits.shape} do not fit: they are "
            "(decisions, choices), one such table per budget, and one number per budget"
        )
    for name, numbers in (("values", gains), ("costs", tables), ("budgets", limits)):
        if not np.isfinite(numbers).all():
            raise ValueError(f"{name} must be finite numbers")
    return gains, list(tables), limits.tolist()
