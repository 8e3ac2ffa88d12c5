import numpy as np
import pytest

from policy.budget import Budget
from trainer.search.selection import Contest, standard_error

COSTS = np.array([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [3.0, 6.0, 12.0]])
BUDGET = Budget((COSTS,), (20.0,))


def judged(loss, noise=0.0, seed=0):
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
    verdict = Contest(BUDGET, judged(additive)).decide({"policy": start})
    assert additive(verdict.choice) == pytest.approx(additive(best_of(additive)))
    assert "swap" in verdict.origin and BUDGET.fits(verdict.choice)


def test_a_challenger_must_be_better_by_more_than_its_error():
    noise = np.array([0.3, -0.3, 0.3, -0.3])
    harms = {(0,): np.zeros(4), (1,): noise - 0.1, (2,): noise / 10 - 0.1}
    contest = Contest(BUDGET, lambda choices: np.array([[harms[choice], np.ones(4)] for choice in choices]))
    assert contest.better_of([(1,)], (0,)) is None, "0.1 better, give or take 0.17"
    assert contest.better_of([(1,), (2,)], (1,)) is None
    assert contest.better_of([(2,)], (0,)) == (2,)
    assert contest.better_of([], (0,)) is None


def test_of_all_choices_the_least_harmful_wins_unless_other_examples_are_left_to_decide():
    noise = np.array([0.3, -0.3, 0.3, -0.3])
    harms = {(0,): np.zeros(4), (1,): noise - 0.1, (2,): noise / 10 + 0.1, (3,): np.zeros(4)}

    def judge(choices):
        return np.array([[harms[choice], np.ones(4)] for choice in choices])

    everything = sorted(harms)
    assert Contest(BUDGET, judge).best_of_all(everything, (0,)) == (1,), "whatever its error"
    assert Contest(BUDGET, judge).best_of_all([(0,), (2,), (3,)], (3,)) == (3,), "as good as any"
    assert Contest(BUDGET, judge, decide_by=judge).best_of_all(everything, (0,)) == (0,), (
        "0.1 better, give or take 0.17"
    )
    assert Contest(BUDGET, judge, decide_by=lambda c: judge(c) * 0).best_of_all(everything, (2,)) == (2,)


def test_what_was_best_by_luck_is_refused_by_examples_that_proposed_nothing():
    start, asked = (1, 1, 1, 1), []

    def lucky(choice):
        return -float(choice[0] == 2)

    def others(choices):
        asked.extend(choices)
        return judged(lambda choice: 1.0 + choice[0])(choices)

    by_luck = Contest(BUDGET, judged(lucky)).decide({"prior": start})
    assert by_luck.choice[0] == 2
    decided = Contest(BUDGET, judged(lucky), decide_by=others).decide({"prior": start})
    assert decided.choice == start and decided.origin == "prior"
    assert len(set(asked)) == 2, "only what is compared at last"
    confirmed = Contest(BUDGET, judged(additive), decide_by=judged(additive, seed=1)).decide({"prior": start})
    assert additive(confirmed.choice) == pytest.approx(additive(best_of(additive)))


def test_the_first_candidate_stays_unless_another_is_better_by_more_than_the_error():
    noise = np.array([0.3, -0.3, 0.3, -0.3])
    harms = {(1, 1, 1, 1): np.zeros(4), (1, 0, 1, 1): noise - 0.1, (1, 1, 1, 0): noise / 10 - 0.1}

    def judge(choices):
        return np.array([[harms.get(tuple(choice), np.ones(4)), np.ones(4)] for choice in choices])

    def winner(*names):
        candidates = {str(i): choice for i, choice in enumerate(harms)}
        return Contest(BUDGET, judge).decide({name: candidates[name] for name in names}).origin

    assert winner("0", "1") == "0", "0.1 better, give or take 0.17"
    assert winner("0", "2") == "2" and winner("1", "0") == "1" and winner("2", "0") == "2"


def test_the_better_candidate_wins():
    verdict = Contest(BUDGET, judged(interacting)).decide({"prior": (0, 2, 0, 1), "policy": (1, 1, 1, 1)})
    assert verdict.choice[0] >= 1 and verdict.choice[2] >= 1
    assert verdict.candidates == {"prior": pytest.approx(interacting((0, 2, 0, 1))),
                                  "policy": pytest.approx(interacting((1, 1, 1, 1)))}  # fmt: skip


def test_noise_moves_nothing():
    """Differences within the standard error of the same batches leave the best candidate alone."""

    def judge(choices):
        return np.array(
            [np.random.default_rng(sum(c * 3**i for i, c in enumerate(x))).normal(0, 1, (2, 8)) for x in choices]
        )

    verdict = Contest(BUDGET, judge).decide({"prior": (1, 1, 1, 1)})
    gain = judge([(1, 1, 1, 1)])[0, 0] - judge([verdict.choice])[0, 0]
    assert verdict.choice == (1, 1, 1, 1) or gain.mean() > standard_error(gain)
    shared = Contest(BUDGET, judged(lambda choice: 1.0, noise=5.0)).decide({"prior": (1, 1, 1, 1)})
    assert shared.choice == (1, 1, 1, 1)


def test_effects_are_differences_to_the_choice_they_surround():
    contest = Contest(BUDGET, judged(interacting, noise=3.0))
    effect = contest.effects((1, 1, 1, 1))
    assert sorted(effect) == [(decision, index) for decision in range(4) for index in (0, 2)]
    for (decision, index), value in effect.items():
        changed = [1, 1, 1, 1]
        changed[decision] = index
        assert value == pytest.approx(interacting(changed) - interacting((1, 1, 1, 1)))


def test_moves_go_to_the_next_costs_and_to_formats_of_the_same_cost():
    contest = Contest(Budget((np.array([[2.0, 4, 4, 8, 16]]),), (16.0,)), judged(additive))
    assert contest.moves((1,)) == [(0, 0), (0, 2), (0, 3)]
    assert contest.moves((0,)) == [(0, 1), (0, 2)]
    assert contest.moves((4,)) == [(0, 3)]


def test_nothing_is_judged_twice():
    asked = []

    def judge(choices):
        asked.extend(choices)
        return judged(additive)(choices)

    Contest(BUDGET, judge).decide({"prior": (1, 1, 1, 1), "policy": (1, 1, 1, 1)})
    assert len(asked) == len(set(asked))


def test_a_candidate_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="over the budget: policy"):
        Contest(BUDGET, judged(additive)).decide({"policy": (2, 2, 2, 2)})


def test_rounds_bound_how_often_neighbours_are_measured():
    asked = []

    def judge(choices):
        asked.append(len(choices))
        return judged(additive)(choices)

    costs = []
    for rounds in (1, 3):
        asked.clear()
        Contest(BUDGET, judge, rounds).decide({"policy": (0, 0, 0, 0)})
        costs.append(sum(asked))
    assert costs[0] < costs[1]
