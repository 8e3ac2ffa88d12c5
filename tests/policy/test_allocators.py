import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.allocators import best_uniform, greedy, head_tail, least_degradation, random_choice
from policy.budget import Budget
from policy.solve import InfeasibleError

COSTS = np.array([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [3.0, 6.0, 12.0]])


def budget(limit, *more):
    return Budget((COSTS, *(table for table, _ in more)), (limit, *(own for _, own in more)))


@st.composite
def instances(draw):
    decisions, choices = draw(st.integers(1, 5)), draw(st.integers(2, 4))
    widths = st.lists(st.integers(1, 50), min_size=choices, max_size=choices, unique=True).map(sorted)
    table = np.array([draw(widths) for _ in range(decisions)], dtype=float)
    limit = draw(st.floats(table.min(1).sum(), table.max(1).sum()))
    effect = np.array(draw(st.lists(st.lists(st.floats(-1, 9), min_size=choices, max_size=choices),
                                    min_size=decisions, max_size=decisions)))  # fmt: skip
    return Budget((table,), (limit,)), effect


@settings(max_examples=60, deadline=None)
@given(instance=instances(), seed=st.integers(0, 9))
def test_every_competitor_fits_the_budget(instance, seed):
    limits, effect = instance
    chosen = [
        greedy(effect, limits),
        head_tail(limits),
        least_degradation(effect, limits),
        random_choice(limits, np.random.default_rng(seed), tries=20),
    ]
    for choice in chosen:
        assert limits.fits(choice) and len(choice) == len(effect)


@settings(max_examples=60, deadline=None)
@given(instance=instances())
def test_least_degradation_equals_trying_everything(instance):
    limits, effect = instance
    decisions = np.arange(len(effect))
    best = min(effect[decisions, list(choice)].sum() for choice in limits.all_fitting())
    assert effect[decisions, least_degradation(effect, limits)].sum() == pytest.approx(best, abs=1e-9)


def test_uniform_is_the_widest_that_fits():
    assert best_uniform(budget(16)) == [1] * 4
    assert best_uniform(budget(31.9)) == [1] * 4
    assert best_uniform(budget(32)) == [2] * 4
    with pytest.raises(InfeasibleError, match="no assignment costs at most 7"):
        best_uniform(budget(7))


def test_head_and_tail_are_the_widest_that_leave_room_for_the_rest():
    assert head_tail(budget(26)) == [2, 1, 1, 2]
    assert head_tail(budget(25)) == [2, 0, 0, 2]
    assert head_tail(budget(15)) == [1, 0, 0, 1], "no room for the widest ends"


def test_random_choices_differ_by_seed_and_use_the_budget():
    drawn = [random_choice(budget(20), np.random.default_rng(seed)) for seed in range(20)]
    assert len({tuple(choice) for choice in drawn}) > 5
    assert np.mean([budget(20).ratio(choice) for choice in drawn]) > 0.8
    assert drawn[3] == random_choice(budget(20), np.random.default_rng(3))


def test_greedy_gives_up_what_costs_least_quality_first():
    effect = np.array([[9.0, 9.0, 0.0], [0.1, 0.1, 0.0], [9.0, 1.0, 0.0], [9.0, 9.0, 0.0]])
    # 32 in all: layer b to its cheapest saves 3 for 0.1, layer c to the middle saves 4 for 1
    assert greedy(effect, budget(29)) == [2, 0, 2, 2]
    assert greedy(np.zeros_like(effect), budget(1000)) == [2, 2, 2, 2], "nothing is given up that the budget allows"
    assert greedy(effect, budget(25)) == [2, 0, 1, 2]
    with pytest.raises(InfeasibleError):
        greedy(effect, budget(7))


def test_several_limits_hold_at_once():
    memory = np.ones((4, 1)) * [2.0, 4.0, 8.0]
    both = budget(24, (memory, 14.0))
    fitting = list(both.all_fitting())
    assert fitting and len(fitting) < len(list(budget(24).all_fitting()))
    by_hand = [c for c in itertools.product(range(3), repeat=4)
               if COSTS[range(4), c].sum() <= 24 and memory[range(4), c].sum() <= 14]  # fmt: skip
    assert fitting == by_hand
    assert both.solve(COSTS) in [list(choice) for choice in fitting]
    assert both.ratio([2, 0, 0, 0]) == pytest.approx(max(14 / 24, 14 / 14))
    assert both.size == 81
