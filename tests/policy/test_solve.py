"""The solver against exhaustive search, dynamic programming, and budgets at the edge of float64."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.solve import InfeasibleError, solve_assignment
from quant.errors import UserError


def total(table, choice):
    return math.fsum(table[i][k] for i, k in enumerate(choice))


def brute_force(values, tables, budgets):
    """The best value within the budgets, or None."""
    feasible = (
        choice
        for choice in itertools.product(*(range(len(row)) for row in values))
        if all(total(table, choice) <= budget * (1 + 1e-14) for table, budget in zip(tables, budgets, strict=True))
    )
    return max((total(values, choice) for choice in feasible), default=None)


def real(low, high):
    return st.floats(low, high, allow_subnormal=False)


@st.composite
def instances(draw, budgets):
    """Values with ties and real ones; costs on a lattice, where budgets are met exactly, and off it."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    value = draw(st.sampled_from([st.integers(-3, 3).map(float), real(-100, 100)]))
    cost = draw(st.sampled_from([st.integers(0, 5).map(float), st.integers(1, 9).map(lambda n: n / 10), real(0, 1e6)]))

    def table(entry):
        row = st.lists(entry, min_size=shape[1], max_size=shape[1])
        return np.array(draw(st.lists(row, min_size=shape[0], max_size=shape[0])))

    tables = [table(cost) for _ in range(budgets)]
    some = [draw(st.integers(0, shape[1] - 1)) for _ in range(shape[0])]
    slack = draw(st.sampled_from([1, 1 - 1e-9, 1 - 1e-12, 0.9, 1.1]))
    return table(value), tables, [total(costs, some) * slack for costs in tables]


def test_two_budgets_that_are_a_little_short():
    """HiGHS' presolve returns value 0 here when it sees the first budget as it is."""
    values = [[0, 0, -2], [0, 1, 0], [0, 0, 0], [0, 2, 0]]
    first = [[0, 0, 1], [0, 0, 0], [0, 2, 0], [1, 2, 0]]
    second = [[552476, 731221, 0], [778107, 808815, 981917], [0, 476, 152374], [476909, 385556, 917304]]
    choice = solve_assignment(values, [first, second], [1.999999999998, 1899220.9999981008])
    assert total(values, choice) == 1


@pytest.mark.parametrize("budgets", [1, 2])
def test_equals_exhaustive_search(budgets):
    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(instance=instances(budgets))
    def check(instance):
        values, tables, limits = instance
        best = brute_force(values, tables, limits)
        if best is None:
            with pytest.raises(InfeasibleError):
                solve_assignment(values, tables, limits)
            return
        choice = solve_assignment(values, tables, limits)
        assert total(values, choice) == pytest.approx(best, rel=1e-9, abs=1e-9 * np.ptp(values))
        for table, limit in zip(tables, limits, strict=True):
            assert total(table, choice) <= limit * (1 + 1e-14)

    check()


def test_equals_dynamic_programming_at_the_size_of_a_model():
    rng = np.random.default_rng(0)
    costs = rng.integers(1, 40, (60, 5)).cumsum(1)
    values = np.log(rng.dirichlet(np.ones(5), 60))
    budget = int(costs[:, 2].sum())
    best = np.full(budget + 1, -np.inf)
    best[0] = 0
    for row, gains in zip(costs, values, strict=True):
        following = np.full(budget + 1, -np.inf)
        for cost, gain in zip(row, gains, strict=True):
            following[cost:] = np.maximum(following[cost:], best[: budget + 1 - cost] + gain)
        best = following
    choice = solve_assignment(values, costs, budget)
    assert total(values, choice) == pytest.approx(best.max(), rel=1e-9)
    assert total(costs, choice) <= budget


@pytest.mark.parametrize("index", range(4))
def test_the_cost_of_a_uniform_assignment_is_a_feasible_budget(index):
    rng = np.random.default_rng(index)
    costs = np.outer(rng.uniform(1e-3, 1e9, 70), [2, 3, 4, 8])
    naive = sum(row[index] for row in costs)  # adds up another rounding than fsum
    assert solve_assignment(np.eye(4)[[index] * 70], costs, naive) == [index] * 70


@pytest.mark.parametrize("short", [1e-5, 1e-7, 1e-9, 1e-11, 1e-13])
@pytest.mark.parametrize("costs", [[0, 1], [0, 1, math.pi]], ids=["lattice", "irrational"])
def test_equal_layers_under_a_budget_that_is_a_little_short(costs, short):
    """924 assignments are over the budget by less than HiGHS forgives; the best of those within takes 5 of 12."""
    gains = np.random.default_rng(0).uniform(0.5, 1, (12, 1))
    values = gains * np.minimum(costs, 1)
    choice = solve_assignment(values, np.tile(costs, (12, 1)), 6 * (1 - short))
    assert sum(choice) == 5
    assert sorted(np.flatnonzero(choice)) == sorted(np.argsort(gains[:, 0])[-5:])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_units_do_not_matter(scale):
    rng = np.random.default_rng(1)
    values, costs = rng.normal(size=(20, 4)), rng.uniform(1, 2, (20, 4)).cumsum(1)
    expected = solve_assignment(values, costs, 60.0)
    assert solve_assignment(values * scale, costs, 60.0) == expected
    assert solve_assignment(values, costs * scale, 60.0 * scale) == expected
    large = 1e9 * np.arange(20)[:, None]  # what no choice can change
    assert solve_assignment(values + large, costs, 60.0) == expected


def test_budgets_bind_together():
    values = [[0, 1, 1], [0, 1, 1]]
    memory, compute = [[0, 1, 2], [0, 1, 2]], [[0, 2, 1], [0, 2, 1]]
    choice = solve_assignment(values, [memory, compute], [3, 3])
    assert sorted(choice) == [1, 2]


def test_an_infeasible_budget_states_the_range():
    with pytest.raises(InfeasibleError, match=r"at most 2\.5 \(possible: 3\.0 to 8\.0\)") as error:
        solve_assignment([[1, 2], [1, 2]], [[1, 4], [2, 4]], 2.5)
    assert isinstance(error.value, UserError)
    assert error.value.ranges == [(3.0, 8.0)]
    assert solve_assignment([[1, 2], [1, 2]], [[1, 4], [2, 4]], 3.0) == [0, 0]
    with pytest.raises(InfeasibleError):
        solve_assignment([[1, 2], [1, 2]], [[1, 4], [2, 4]], 3.0 * (1 - 1e-13))


def test_budgets_that_only_conflict_with_each_other_are_infeasible():
    with pytest.raises(InfeasibleError, match=r"0\.5 \(.*\) and 0\.5 \(.*\)"):
        solve_assignment([[0, 0]], [[[0, 1]], [[1, 0]]], [0.5, 0.5])


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number):
    for arguments in (
        ([[0, number]], [[1, 2]], 2),
        ([[0, 1]], [[1, number]], 2),
        ([[0, 1]], [[1, 2]], number),
    ):
        with pytest.raises(ValueError, match="finite"):
            solve_assignment(*arguments)


@pytest.mark.parametrize(
    ("values", "costs", "budgets"),
    [
        ([[0, 1]], [[1, 2, 3]], 1),
        ([[0, 1]], [[1, 2]], [1, 2]),
        ([0, 1], [1, 2], 1),
        (np.zeros((0, 2)), np.zeros((0, 2)), 1),
        ([[0, 1]], [[[1, 2]], [[1, 2]]], 1),
    ],
)
def test_shapes_that_do_not_fit_are_refused(values, costs, budgets):
    with pytest.raises(ValueError, match="do not fit"):
        solve_assignment(values, costs, budgets)


def test_the_same_input_gives_the_same_choice():
    table = np.ones((8, 3)).cumsum(1)
    assert len({tuple(solve_assignment(np.zeros((8, 3)), table, 12)) for _ in range(3)}) == 1


def test_a_proof_without_end_is_cut_short_with_a_warning(monkeypatch):
    """Values that equal costs: a subset-sum problem."""
    monkeypatch.setattr("policy.solve.MAX_NODES", 20)
    costs = np.outer(np.random.default_rng(0).integers(1000, 3_000_000, 54), [2, 3, 4, 6, 8])
    budget = 0.45 * costs[:, -1].sum()
    with pytest.warns(UserWarning, match="of the best value"):
        choice = solve_assignment(costs, costs, budget)
    assert budget * 0.999 < total(costs, choice) <= budget
