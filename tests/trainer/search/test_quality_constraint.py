import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policy.budget import Budget
from trainer.search.quality_constraint import cheapest_budget, cheapest_choice
from trainer.search.selection import CandidateSelector

COSTS = np.array([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [3.0, 6.0, 12.0]])
WHOLE = Budget((COSTS,), (32.0,))


@settings(max_examples=50, deadline=None)
@given(
    sensitivity=st.lists(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), min_size=4, max_size=4),
    floor=st.floats(0.0, 1.0),
)
def test_the_cheapest_that_keeps_an_additive_quality(sensitivity, floor):
    """Trying everything is the oracle."""
    table = -np.sort(-np.array(sensitivity), axis=1)  # more bits are never worse

    def quality(choice):
        return 1 - table[range(4), list(choice)].sum() / 4

    found = cheapest_budget(WHOLE, -table, quality, floor)
    choice = found.solve(-table)
    keeping = [c for c in WHOLE.all_fitting() if quality(c) >= floor]
    if not keeping:
        assert found == WHOLE
        return
    assert quality(choice) >= floor
    least = min(WHOLE.costs(c)[0] for c in keeping)
    assert WHOLE.costs(choice)[0] == pytest.approx(least), "costs are whole numbers, a thousandth of the range apart"


def test_what_already_suffices_at_the_bottom_costs_the_least():
    found = cheapest_budget(WHOLE, COSTS, lambda choice: 1.0, 0.5)
    assert found.limits == (8.0,)


def together(choice):
    """The last two decisions only degrade where both are at their cheapest: single sensitivities from there mislead."""
    return 0.9 + 0.02 * sum(choice[:2]) - 0.5 * (choice[2] == 0 and choice[3] == 0)


def selector_of(quality):
    return CandidateSelector(WHOLE, lambda choices: np.array([[[-quality(c)] * 4, [quality(c)] * 4] for c in choices]))


@pytest.mark.parametrize("evaluated", [True, False], ids=["everything", "bisection"])
@pytest.mark.parametrize("floor", [0.9, 0.93, 0.97])
def test_slack_in_the_quality_is_spent_on_cost(floor, evaluated):
    """A selection's result is the best within its budget, so it may be better, and dearer, than asked."""
    found = cheapest_choice(
        selector_of(together), (2, 2, 2, 2), floor, list(WHOLE.all_fitting()) if evaluated else None
    )
    least = min(WHOLE.costs(c)[0] for c in WHOLE.all_fitting() if together(c) >= floor)
    assert together(found) >= floor and WHOLE.costs(found)[0] == least


def test_where_nothing_keeps_the_quality_the_choice_stays():
    assert cheapest_choice(selector_of(together), (1, 1, 1, 1), 2.0, None) == (1, 1, 1, 1)
