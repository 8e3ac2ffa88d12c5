import numpy as np
import pytest

from policy.budget import Budget
from trainer.search.selection import CandidateSelector, standard_error

COSTS = np.array([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [3.0, 6.0, 12.0]])
BUDGET = Budget((COSTS,), (20.0,))


def evaluated(loss, noise=0.0, seed=0):
    """Losses on eight batches: `loss` of a choice, and noise that all choices share."""
    shared = np.random.default_rng(seed).normal(0, noise, 8)
    return lambda choices: np.array([[loss(choice) + shared, np.exp(-loss(choice) - shared)] for choice in choices])


def additive(choice):
    return 3 * (choice[1] < 2) + sum(0.1 * (2 - index) for index in choice)


def interacting(choice):
    """Two layers that only help together: what measuring one at a time cannot see."""
    return 1.0 - (choice[0] >= 1 and choice[2] >= 1) - 0.01 * sum(choice)


def best_of(loss):
    return min(BUDGET.all_fitting(), key=loss)


@pytest.mark.parametrize("start", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)])
def test_swaps_lead_to_the_best_choice_of_an_additive_loss(start):
    result = CandidateSelector(BUDGET, evaluated(additive)).select({"policy": start})
    assert additive(result.choice) == pytest.approx(additive(best_of(additive)))
    assert "swap" in result.origin and BUDGET.fits(result.choice)


def test_a_challenger_must_be_better_by_more_than_its_error():
    noise = np.array([0.3, -0.3, 0.3, -0.3])
    degradations = {(0,): np.zeros(4), (1,): noise - 0.1, (2,): noise / 10 - 0.1}
    selector = CandidateSelector(
        BUDGET, lambda choices: np.array([[degradations[choice], np.ones(4)] for choice in choices])
    )
    assert selector.better_of([(1,)], (0,)) is None, "0.1 better, give or take 0.17"
    assert selector.better_of([(1,), (2,)], (1,)) is None
    assert selector.better_of([(2,)], (0,)) == (2,)
    assert selector.better_of([], (0,)) is None


def test_of_all_choices_the_least_harmful_wins_unless_other_examples_are_left_to_decide():
    noise = np.array([0.3, -0.3, 0.3, -0.3])
    degradations = {(0,): np.zeros(4), (1,): noise - 0.1, (2,): noise / 10 + 0.1, (3,): np.zeros(4)}

    def evaluate(choices):
        return np.array([[degradations[choice], np.ones(4)] for choice in choices])

    everything = sorted(degradations)
    assert CandidateSelector(BUDGET, evaluate).best_of_all(everything, (0,)) == (1,), "whatever its error"
    assert CandidateSelector(BUDGET, evaluate).best_of_all([(0,), (2,), (3,)], (3,)) == (3,), "as good as any"
    assert CandidateSelector(BUDGET, evaluate, decide_by=evaluate).best_of_all(everything, (0,)) == (0,), (
        "0.1 better, give or take 0.17"
    )
    assert CandidateSelector(BUDGET, evaluate, decide_by=lambda c: evaluate(c) * 0).best_of_all(everything, (2,)) == (
        2,
    )


def test_what_was_best_by_luck_is_refused_by_examples_that_proposed_nothing():
    start, asked = (1, 1, 1, 1), []

    def lucky(choice):
        return -float(choice[0] == 2)

    def others(choices):
        asked.extend(choices)
        return evaluated(lambda choice: 1.0 + choice[0])(choices)

    by_luck = CandidateSelector(BUDGET, evaluated(lucky)).select({"prior": start})
    assert by_luck.choice[0] == 2
    decided = CandidateSelector(BUDGET, evaluated(lucky), decide_by=others).select({"prior": start})
    assert decided.choice == start and decided.origin == "prior"
    assert len(set(asked)) == 2, "only what is compared at last"
    confirmed = CandidateSelector(BUDGET, evaluated(additive), decide_by=evaluated(additive, seed=1)).select(
        {"prior": start}
    )
    assert additive(confirmed.choice) == pytest.approx(additive(best_of(additive)))


def test_the_first_candidate_stays_unless_another_is_better_by_more_than_the_error():
    noise = np.array([0.3, -0.3, 0.3, -0.3])
    degradations = {(1, 1, 1, 1): np.zeros(4), (1, 0, 1, 1): noise - 0.1, (1, 1, 1, 0): noise / 10 - 0.1}

    def evaluate(choices):
        return np.array([[degradations.get(tuple(choice), np.ones(4)), np.ones(4)] for choice in choices])

    def winner(*names):
        candidates = {str(i): choice for i, choice in enumerate(degradations)}
        return CandidateSelector(BUDGET, evaluate).select({name: candidates[name] for name in names}).origin

    assert winner("0", "1") == "0", "0.1 better, give or take 0.17"
    assert winner("0", "2") == "2" and winner("1", "0") == "1" and winner("2", "0") == "2"


def test_the_better_candidate_wins():
    result = CandidateSelector(BUDGET, evaluated(interacting)).select({"prior": (0, 2, 0, 1), "policy": (1, 1, 1, 1)})
    assert result.choice[0] >= 1 and result.choice[2] >= 1
    assert result.candidates == {"prior": pytest.approx(interacting((0, 2, 0, 1))),
                                  "policy": pytest.approx(interacting((1, 1, 1, 1)))}  # fmt: skip


def test_noise_moves_nothing():
    """Differences within the standard error of the same batches leave the best candidate alone."""

    def evaluate(choices):
        return np.array(
            [np.random.default_rng(sum(c * 3**i for i, c in enumerate(x))).normal(0, 1, (2, 8)) for x in choices]
        )

    result = CandidateSelector(BUDGET, evaluate).select({"prior": (1, 1, 1, 1)})
    gain = evaluate([(1, 1, 1, 1)])[0, 0] - evaluate([result.choice])[0, 0]
    assert result.choice == (1, 1, 1, 1) or gain.mean() > standard_error(gain)
    shared = CandidateSelector(BUDGET, evaluated(lambda choice: 1.0, noise=5.0)).select({"prior": (1, 1, 1, 1)})
    assert shared.choice == (1, 1, 1, 1)


def test_sensitivities_are_differences_to_the_choice_they_surround():
    selector = CandidateSelector(BUDGET, evaluated(interacting, noise=3.0))
    measured = selector.sensitivities((1, 1, 1, 1))
    assert sorted(measured) == [(decision, index) for decision in range(4) for index in (0, 2)]
    for (decision, index), value in measured.items():
        changed = [1, 1, 1, 1]
        changed[decision] = index
        assert value == pytest.approx(interacting(changed) - interacting((1, 1, 1, 1)))


def test_moves_go_to_the_next_costs_and_to_formats_of_the_same_cost():
    selector = CandidateSelector(Budget((np.array([[2.0, 4, 4, 8, 16]]),), (16.0,)), evaluated(additive))
    assert selector.moves((1,)) == [(0, 0), (0, 2), (0, 3)]
    assert selector.moves((0,)) == [(0, 1), (0, 2)]
    assert selector.moves((4,)) == [(0, 3)]


def test_nothing_is_evaluated_twice():
    asked = []

    def evaluate(choices):
        asked.extend(choices)
        return evaluated(additive)(choices)

    CandidateSelector(BUDGET, evaluate).select({"prior": (1, 1, 1, 1), "policy": (1, 1, 1, 1)})
    assert len(asked) == len(set(asked))


def test_a_candidate_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="over the budget: policy"):
        CandidateSelector(BUDGET, evaluated(additive)).select({"policy": (2, 2, 2, 2)})


def test_rounds_bound_how_often_neighbours_are_measured():
    asked = []

    def evaluate(choices):
        asked.append(len(choices))
        return evaluated(additive)(choices)

    costs = []
    for rounds in (1, 3):
        asked.clear()
        CandidateSelector(BUDGET, evaluate, rounds).select({"policy": (0, 0, 0, 0)})
        costs.append(sum(asked))
    assert costs[0] < costs[1]
