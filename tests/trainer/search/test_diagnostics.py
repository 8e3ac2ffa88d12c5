import numpy as np
import pytest

from policy.budget import Budget
from trainer.search.diagnostics import additivity, optimality_report
from trainer.search.selection import CandidateSelector

COSTS = np.array([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [3.0, 6.0, 12.0]])
BUDGET = Budget((COSTS,), (20.0,))


def selector(loss, tables=BUDGET):
    wobble = np.linspace(-0.1, 0.1, 6)
    return CandidateSelector(
        tables, lambda choices: np.array([[loss(c) + wobble, np.exp(-loss(c) - wobble)] for c in choices])
    )


def additive(choice):
    return 0.1 + sum(0.1 * (d + 1) * (2 - index) for d, index in enumerate(choice))


def interacting(choice):
    return additive(choice) + 2.0 * (choice[0] == 0 and choice[1] == 0)


def test_the_report_of_a_small_space_is_exact():
    ranked = sorted(BUDGET.all_fitting(), key=additive)
    for rank in (1, 2, 5, len(ranked)):
        chosen = ranked[rank - 1]
        report = optimality_report(selector(additive), chosen, affordable=81, seed=0)
        better = sum(additive(other) < additive(chosen) - 1e-12 for other in ranked)
        assert (report["kind"], report["among"], report["rank"]) == ("all", len(ranked), better + 1)
        assert report["harm_rank"] == report["rank"], "here quality falls with the degradation"
        wobble = np.exp(-np.linspace(-0.1, 0.1, 6)).mean()
        lost = np.exp(-additive(ranked[0])) - np.exp(-additive(chosen))
        assert report["regret"] == pytest.approx(lost * wobble)
    assert optimality_report(selector(additive), ranked[0], 81, 0)["regret"] == 0


def test_a_large_space_is_sampled_and_says_so():
    many = Budget((np.tile(COSTS, (5, 1)),), (100.0,))
    report = optimality_report(selector(additive, many), (1,) * 20, affordable=10, seed=0)
    assert report["kind"] == "sampled" and 2 + 40 <= report["among"] <= 11 + 40, "all 40 single swaps fit"
    assert optimality_report(selector(additive), (1, 1, 1, 1), affordable=1, seed=0)["kind"] == "sampled"


def test_a_sampled_report_holds_every_single_swap_within_the_budget():
    many = Budget((np.tile(COSTS, (5, 1)),), (85.0,))
    used, chosen = selector(additive, many), (2, *(1,) * 19)
    report = optimality_report(used, chosen, affordable=1, seed=0)
    swaps = {(*chosen[:d], c, *chosen[d + 1 :]) for d in range(20) for c in range(3)} - {chosen}
    fitting = {swap for swap in swaps if many.fits(swap)}
    assert (0, *chosen[1:]) in fitting and len(fitting) < len(swaps), "one is two steps away, others are too dear"
    assert fitting < set(used.seen) and report["among"] in (len(fitting) + 1, len(fitting) + 2)


def test_a_report_of_many_decisions_samples_the_single_swaps():
    many = Budget((np.tile(COSTS, (50, 1)),), (1000.0,))
    report = optimality_report(selector(additive, many), (1,) * 200, affordable=10, seed=0)
    assert 100 < report["among"] <= 1 + 10 + 100, "of 400 swaps"
    assert optimality_report(selector(additive, many), (1,) * 200, affordable=10, seed=0) == report


def test_additivity_is_one_where_sensitivities_add_up_and_less_where_they_do_not():
    report = additivity(selector(additive), (1, 1, 1, 1), seed=0)
    assert report["predicted"] == pytest.approx(report["actual"]) and report["correlation"] == pytest.approx(1)
    report = additivity(selector(interacting), (1, 1, 1, 1), seed=0)
    assert report["correlation"] < 0.99
    assert max(np.subtract(report["actual"], report["predicted"])) == pytest.approx(2.0)
    assert additivity(selector(lambda choice: 1.0), (1, 1, 1, 1), seed=0)["correlation"] is None


def test_additivity_asks_for_joint_changes_alone():
    used = selector(interacting)
    report = additivity(used, (1, 1, 1, 1), seed=0)
    assert report["changed"] == 2 and len(report["predicted"]) == len(report["actual"]) == 8
    joint = [choice for choice in used.seen if sum(index != 1 for index in choice) == 2]
    assert len(joint) == 8, "all different"
    one = Budget((np.tile(COSTS, (1, 1))[:1],), (100.0,))
    alone = additivity(selector(lambda choice: float(choice[0]), one), (1,), seed=0)
    assert alone == {"changed": 0, "predicted": [], "actual": [], "correlation": None}
