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
