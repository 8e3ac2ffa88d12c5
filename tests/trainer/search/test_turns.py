"""Turns: equal until the losses are known, then in proportion to what a target loses, and the same after a resume."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.search.turns import DECAY, EQUAL_SHARE, Turns

LOSSES = st.lists(st.floats(0.01, 10), min_size=1, max_size=8)


def after_one_round(losses):
    turns = Turns(len(losses))
    for target, loss in enumerate(losses):
        turns.count(target, loss)
    return turns


def steps_of(turns, losses, steps):
    """The targets of some steps, at constant losses."""
    taken = []
    for _ in range(steps):
        taken.append(turns.next())
        turns.count(taken[-1], losses[taken[-1]])
    return taken


@pytest.mark.parametrize("targets", [1, 2, 3, 8])
def test_targets_go_round_until_the_loss_of_each_is_known(targets):
    assert steps_of(Turns(targets), [1.0] * targets, 3 * targets) == list(range(targets)) * 3


@given(LOSSES)
def test_every_target_gets_its_share_of_the_steps_within_one(losses):
    turns, steps = after_one_round(losses), 400
    shares = turns.shares()
    counted = Counter(steps_of(turns, losses, steps))
    assert sum(shares) == pytest.approx(1)
    assert all(abs(counted[target] - share * steps) <= len(losses) for target, share in enumerate(shares))


def test_half_of_the_turns_are_shared_by_what_a_target_loses_above_the_best():
    assert after_one_round([2.0, 1.5, 0.5]).shares() == pytest.approx(
        [EQUAL_SHARE / 3 + (1 - EQUAL_SHARE) * lost for lost in (0.6, 0.4, 0.0)]
    )


def test_equal_losses_leave_equal_shares():
    assert after_one_round([1.0, 1.0]).shares() == [0.5, 0.5]


def test_the_loss_of_a_target_is_a_moving_average():
    turns = after_one_round([2.0])
    turns.count(0, 1.0)
    assert turns.losses == [pytest.approx(2 * DECAY + 1 - DECAY)]


@given(LOSSES, st.integers(0, 30))
def test_a_resumed_run_takes_the_same_turns(losses, before):
    turns = after_one_round(losses)
    steps_of(turns, losses, before)
    resumed = Turns(len(losses))
    resumed.load_state_dict(turns.state_dict())
    assert steps_of(turns, losses, 20) == steps_of(resumed, losses, 20)
