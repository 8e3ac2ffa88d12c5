"""Exact multiple-choice knapsack: the most valuable assignment under hard budgets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import LinearConstraint, milp
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
    rows = [_row(table, limit) for table, limit in zip(tables, limits, strict=True)]
    weights, bounds, clear = [list(part) for part in zip(*rows, strict=True)]
    one_each = LinearConstraint(csr_array(np.kron(np.eye(len(gains)), np.ones(gains.shape[1]))), 1, 1)
    cuts: list[LinearConstraint] = []
    margin = 2 * FORGIVEN
    while True:
        result = milp(
            objective,
            integrality=np.ones(gains.size),
            bounds=(0, 1),
            constraints=[one_each, *map(_at_most, weights, bounds), *cuts],
            # Presolve is wrong if a bound is below a possible sum by less than HiGHS's tolerance.
            options={"mip_rel_gap": 0, "node_limit": MAX_NODES, "presolve": all(clear)},
        )
        if result.status == _INFEASIBLE:
            raise infeasible
        if result.x is None:
            raise RuntimeError(f"HiGHS found no solution: {result.message}")
        choice = result.x.reshape(gains.shape).argmax(1)
        over = [_total(table, choice) > limit for table, limit in zip(tables, limits, strict=True)]
        if not any(over):
            if result.status != _OPTIMAL:
                warnings.warn(f"the proof did not end: within {result.mip_gap:.1e} of the best value", stacklevel=2)
            return choice.tolist()
        # Over a budget by less than HiGHS's tolerance.
        if len(cuts) < MAX_CUTS:
            taken = np.zeros_like(gains)
            taken[np.arange(len(gains)), choice] = 1
            cuts.append(_at_most(taken, len(gains) - 1))
        else:  # Equal layers give too many such assignments, and their costs leave none just below the budget.
            bounds = [bound - margin * exceeded for bound, exceeded in zip(bounds, over, strict=True)]
            margin *= 2


def _row(table: Table, limit: float) -> tuple[Table, float, bool]:
    """Return a budget's weights and bound for HiGHS, and whether the bound is clear of every possible sum.

    Costs count from the cheapest choice, because a large constant would hide small differences. Bits times integers
    lie on a lattice: its bound is moved to the middle between the last sum within the limit and the next one.
    """
    extra = table - table.min(1, keepdims=True)
    room = limit - math.fsum(table.min(1))
    if step := lattice_step(extra):
        weights, bound = np.rint(extra / step), math.floor(room / step) + 0.5
        unit = max(magnitude_unit(weights), 1.0)
        return weights / unit, bound / unit, True
    return extra / magnitude_unit(extra), room / magnitude_unit(extra), False


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


def _at_most(weights: Table, limit: float) -> LinearConstraint:
    """Bound the total weight of the chosen entries."""
    return LinearConstraint(csr_array(weights.reshape(1, -1)), -np.inf, limit)


def magnitude_unit(table: Table) -> float:
    """Return the divisor that makes MAGNITUDE the table's largest entry."""
    return float(np.abs(table).max()) / MAGNITUDE or 1.0


def _total(table: Table, choice: NDArray[np.int64]) -> float:
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
