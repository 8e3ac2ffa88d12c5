"""Mixes of formats are measured by their groups; where losses add up, every mix comes out exactly."""

import numpy as np
import pytest

from quant.formats import FLOAT, MixedFormat, format_pairs, parse_format
from trainer.search.measured_pairs import measured_pairs

FORMATS = [parse_format(bits) for bits in (2, 3, 4, 6, 8)]


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("how", [{}, {"weight_only": True}, {"separate_activations": True}])
def test_losses_that_add_up_over_groups_come_out_exactly(groups, how):
    choices = format_pairs(FORMATS, groups=groups, **how)
    plan = measured_pairs(choices)
    loss = {format: 1 / format.bits**2 for format in FORMATS} | {FLOAT: 0.0}

    def lost(weight, activation):
        parts = weight.parts if isinstance(weight, MixedFormat) else (weight,) * groups
        return 3 * loss[activation] + sum(loss[part] * (group + 1) for group, part in enumerate(parts))

    measured = np.array([lost(*pair) for pair in plan.pairs])
    np.testing.assert_allclose(plan.shares @ measured, [lost(*pair) for pair in choices], rtol=1e-12)
    uniform = len(FORMATS) ** (2 if "separate_activations" in how else 1)
    assert len(plan.pairs) <= uniform + (groups - 1) * (len(FORMATS) - 1) + 1 < len(choices)


def test_choices_without_mixes_are_measured_as_they_are():
    choices = format_pairs(FORMATS)
    plan = measured_pairs([*choices, choices[-1]])
    assert plan.pairs == choices and np.array_equal(plan.shares, np.eye(5)[[0, 1, 2, 3, 4, 4]])


def test_negligible_choices_take_their_share_of_the_first_of_them():
    choices = format_pairs(FORMATS)
    plan = measured_pairs([*choices, choices[-1]], np.array([16.0, 4.0, 0.5, 1 / 16, 1 / 256, 1 / 256]))
    assert plan.pairs == choices[:3]
    wanted = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1 / 8], [0, 0, 1 / 128], [0, 0, 1 / 128]]
    np.testing.assert_array_equal(plan.shares, wanted)


def test_choices_that_change_nothing_are_measured():
    choices = [*format_pairs(FORMATS), (FLOAT, FLOAT)]
    plan = measured_pairs(choices, np.array([1.0, 0.25, 0.0, 0.0, 0.0, 0.0]))
    assert plan.pairs == tuple(choices) and np.array_equal(plan.shares, np.eye(6))


@pytest.mark.parametrize("estimates", [[1.0, 0.5, 0.2, 0.1, 1 / 32], [0.0] * 5, [np.nan, 1, 1, 1, 1], [np.inf] * 5])
def test_all_are_measured_where_one_at_most_is_negligible_or_nothing_is_known(estimates):
    choices = format_pairs(FORMATS)
    plan = measured_pairs(choices, np.array(estimates))
    assert plan.pairs == choices and np.array_equal(plan.shares, np.eye(5))


def test_mixes_are_measured_by_their_groups_whatever_is_estimated():
    choices = format_pairs(FORMATS, groups=2)
    assert measured_pairs(choices, np.zeros(len(choices))).pairs == measured_pairs(choices).pairs
