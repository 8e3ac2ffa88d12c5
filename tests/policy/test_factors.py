"""Sums of factors against exhaustive enumeration: costs, expectations, ranges and the exact program."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.budget import Budget
from policy.factors import Factor, cost_range, expected_cost, mean_costs, solve_factors, total_cost
from policy.joint_budget import JointBudget
from policy.solve import InfeasibleError, solve_assignment


@st.composite
def instances(draw):
    """A few decisions, factors over one to three of them, and limits near the cost of some choice."""
    decisions, choices = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    limits = draw(st.integers(1, 2))
    integers = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def factor():
        scope = rng.permutation(decisions)[: rng.integers(1, min(decisions, 3) + 1)]
        shape = (choices,) * len(scope)
        tables = [
            rng.integers(0, 6, shape).astype(float) if integers else rng.uniform(0, 1e5, shape) for _ in range(limits)
        ]
        return Factor(tuple(scope.tolist()), tuple(tables))

    factors = [factor() for _ in range(rng.integers(1, 7))]
    values = rng.integers(-3, 4, (decisions, choices)).astype(float)
    if draw(st.booleans()):
        values += rng.normal(size=values.shape)
    some = rng.integers(0, choices, decisions).tolist()
    slack = draw(st.sampled_from([1, 1 - 1e-9, 0.8, 1.1]))
    return values, factors, [by_hand(factors, index, some) * slack for index in range(limits)]


def by_hand(factors, limit, choice):
    return math.fsum(f.tables[limit][tuple(choice[d] for d in f.decisions)] for f in factors)


def everything(values):
    return itertools.product(range(values.shape[1]), repeat=values.shape[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances())
def test_the_program_equals_enumeration(instance):
    values, factors, limits = instance
    fits = [
        choice
        for choice in everything(values)
        if all(by_hand(factors, index, choice) <= limit * (1 + 1e-14) for index, limit in enumerate(limits))
    ]
    budget = JointBudget.within(factors, limits, *values.shape)
    assert set(budget.all_fitting()) == set(fits)
    if not fits:
        with pytest.raises(InfeasibleError, match="possible"):
            budget.solve(values)
        return
    found = budget.solve(values)
    assert tuple(found) in fits
    best = max(values[np.arange(len(values)), choice].sum() for choice in fits)
    assert values[np.arange(len(values)), found].sum() == pytest.approx(best, abs=1e-7)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(instances(), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_program_with_terms_equals_enumeration(instance, count, seed):
    values, factors, limits = instance
    rng, (decisions, choices) = np.random.default_rng(seed), values.shape
    scopes = [rng.permutation(decisions)[: rng.integers(1, min(decisions, 3) + 1)].tolist() for _ in range(count)]
    terms = [Factor(tuple(scope), (rng.normal(scale=3, size=(choices,) * len(scope)),)) for scope in scopes]

    def worth(choice):
        own = sum(term.tables[0][tuple(choice[d] for d in term.decisions)] for term in terms)
        return values[np.arange(decisions), list(choice)].sum() + own

    joint = JointBudget.within(factors, limits, *values.shape)
    single = [factor for factor in factors if len(factor.decisions) == 1]
    tables = [np.zeros(values.shape) for _ in limits]
    for factor in single:
        for table, own in zip(tables, factor.tables, strict=True):
            table[factor.decisions[0]] += own
    for budget in (joint, Budget(tuple(tables), tuple(limits))):
        fits = list(budget.all_fitting())
        if fits:
            found = tuple(budget.solve(values, terms))
            assert found in fits and worth(found) == pytest.approx(max(map(worth, fits)), abs=1e-6)
        else:
            with pytest.raises(InfeasibleError, match="possible"):
                budget.solve(values, terms)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(instances())
def test_expectation_range_and_means_equal_enumeration(instance):
    values, factors, limits = instance
    logits = torch.from_numpy(values).requires_grad_()
    p = logits.softmax(-1)
    choices = list(everything(values))
    chance = torch.stack([math.prod(p[d, c] for d, c in enumerate(choice)) for choice in choices])
    costs = torch.tensor([total_cost(factors, 0, choice) for choice in choices], dtype=torch.float64)
    exact, contracted = (chance * costs).sum(), expected_cost(factors, 0, p)
    torch.testing.assert_close(contracted, exact)
    gradients = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (exact, contracted)]
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-9)
    assert cost_range(factors, 0, *values.shape) == (float(costs.min()), float(costs.max()))
    means = mean_costs(factors, 0, *values.shape)
    for d, c in itertools.product(*map(range, values.shape)):
        touching = [f for f in factors if d in f.decisions]
        taken = [total_cost(touching, 0, choice) for choice in choices if choice[d] == c]
        assert means[d, c] == pytest.approx(np.mean(taken))
    budget = JointBudget.within(factors, limits, *values.shape)
    expected = budget.expected_costs(p.detach().numpy())
    assert expected[0] == pytest.approx(exact.item())
    ratios = [cost / limit for cost, limit in zip(expected, limits, strict=True) if limit]
    if len(ratios) == len(limits):
        assert budget.expected_ratio(p).item() == pytest.approx(max(ratios))


def test_one_decision_per_factor_is_the_additive_budget():
    rng = np.random.default_rng(0)
    values, table = rng.normal(size=(8, 3)), rng.integers(1, 50, (8, 3)).astype(float)
    factors = [Factor((d,), (row,)) for d, row in enumerate(table)]
    limit = float(table.mean(1).sum())
    assert solve_factors(values, factors, [limit]) == solve_assignment(values, table, limit)
    additive, joint = Budget((table,), (limit,)), JointBudget.within(factors, [limit], 8, 3)
    p = torch.rand(8, 3, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(joint.expected_ratio(p), additive.expected_ratio(p))
    np.testing.assert_array_equal(joint.tables[0], table)
    assert joint.costs([1] * 8) == additive.costs([1] * 8)


def test_a_product_of_width_and_bits():
    """Four bits at half the width cost as much as two bits at the full one; the limit admits either, not both."""
    bits, width = np.array([2.0, 4.0]), np.array([0.5, 1.0])
    factor = Factor((0, 1), (np.outer(bits, width),))
    assert solve_factors(np.array([[0, 1.0], [0, 2.0]]), [factor], [2.0]) == [0, 1]
    assert solve_factors(np.array([[0, 2.0], [0, 1.0]]), [factor], [2.0]) == [1, 0]
    with pytest.raises(InfeasibleError, match=r"possible: 1.0 to 4.0"):
        solve_factors(np.zeros((2, 2)), [factor], [0.9])


def test_factors_say_what_does_not_fit():
    with pytest.raises(ValueError, match="different decisions"):
        Factor((0, 0), (np.zeros((2, 2)),))
    with pytest.raises(ValueError, match="an axis each"):
        Factor((0, 1), (np.zeros(2),))
