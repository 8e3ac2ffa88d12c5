import numpy as np
import pytest

from policy.budget import Budget
from trainer.search.diagnostics import additivity, certificate
from trainer.search.selection import Contest

COSTS = np.array([[2.0, 4.0, 8.0], [1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [3.0, 6.0, 12.0]])
BUDGET = Budget((COSTS,), (20.0,))


def contest(loss, tables=BUDGET):
    wobble = np.linspace(-0.1, 0.1, 6)
    return Contest(tables, lambda choices: np.array([[loss(c) + wobble, np.exp(-loss(c) - wobble)] for c in choices]))


def additive(choice):
    return 0.1 + sum(0.1 * (d + 1) * (2 - index) for d, index in enumerate(choice))


def interacting(choice):
    return additive(choice) + 2.0 * (choice[0] == 0 and choice[1] == 0)


def test_the_certificate_of_a_small_space_is_exact():
    ranked = sorted(BUDGET.all_fitting(), key=additive)
    for rank in (1, 2, 5, len(ranked)):
        chosen = ranked[rank - 1]
        told = certificate(contest(additive), chosen, affordable=81, seed=0)
        better = sum(additive(other) < additive(chosen) - 1e-12 for other in ranked)
        assert (told["kind"], told["among"], told["rank"]) == ("all", len(ranked), better + 1)
        assert told["harm_rank"] == told["rank"], "here quality falls with harm"
        wobble = np.exp(-np.linspace(-0.1, 0.1, 6)).mean()
        lost = np.exp(-additive(ranked[0])) - np.exp(-additive(chosen))
        assert told["regret"] == pytest.approx(lost * wobble)
    assert certificate(contest(additive), ranked[0], 81, 0)["regret"] == 0


def test_a_large_space_is_sampled_and_says_so():
    many = Budget((np.tile(COSTS, (5, 1)),), (100.0,))
    told = certificate(contest(additive, many), (1,) * 20, affordable=10, seed=0)
    assert told["kind"] == "sampled" and 2 + 40 <= told["among"] <= 11 + 40, "all 40 single swaps fit"
    assert certificate(contest(additive), (1, 1, 1, 1), affordable=1, seed=0)["kind"] == "sampled"


def test_a_sampled_certificate_holds_every_single_swap_within_the_budget():
    many = Budget((np.tile(COSTS, (5, 1)),), (85.0,))
    judged, chosen = contest(additive, many), (2, *(1,) * 19)
    told = certificate(judged, chosen, affordable=1, seed=0)
    swaps = {(*chosen[:d], c, *chosen[d + 1 :]) for d in range(20) for c in range(3)} - {chosen}
    fitting = {swap for swap in swaps if many.fits(swap)}
    assert (0, *chosen[1:]) in fitting and len(fitting) < len(swaps), "one is two steps away, others are too dear"
    assert fitting < set(judged.seen) and told["among"] in (len(fitting) + 1, len(fitting) + 2)


def test_additivity_is_one_where_effects_add_up_and_less_where_they_do_not():
    told = additivity(contest(additive), (1, 1, 1, 1), seed=0)
    assert told["predicted"] == pytest.approx(told["actual"]) and told["correlation"] == pytest.approx(1)
    told = additivity(contest(interacting), (1, 1, 1, 1), seed=0)
    assert told["correlation"] < 0.99
    assert max(np.subtract(told["actual"], told["predicted"])) == pytest.approx(2.0)
    assert additivity(contest(lambda choice: 1.0), (1, 1, 1, 1), seed=0)["correlation"] is None


def test_additivity_asks_for_joint_changes_alone():
    judged = contest(interacting)
    told = additivity(judged, (1, 1, 1, 1), seed=0)
    assert told["changed"] == 2 and len(told["predicted"]) == len(told["actual"]) == 8
    joint = [choice for choice in judged.seen if sum(index != 1 for index in choice) == 2]
    assert len(joint) == 8, "all different"
    one = Budget((np.tile(COSTS, (1, 1))[:1],), (100.0,))
    alone = additivity(contest(lambda choice: float(choice[0]), one), (1,), seed=0)
    assert alone == {"changed": 0, "predicted": [], "actual": [], "correlation": None}
