"""Which formats of a decision are measured, and what follows from them for its other choices.

With groups of output channels there are many more choices than formats: 70 mixes of five formats for four groups. What
a group loses in a format is measured once, the other groups in the widest format, and a mix is taken to lose the sum,
as an assignment is taken to lose the sum over its decisions.

What wide formats lose is small and falls as the squared change of the layer's output does. Where an estimate of first
order is at hand (Fisher's, one backward pass for all formats), only the first of them is measured, and the others take
their share of its loss. Estimates cannot tell more: the loss of narrow formats saturates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policy.space import SearchSpace
from quant.engines.rules import Pair
from quant.formats import FLOAT, Format, MixedFormat

NEGLIGIBLE = 1 / 16
"""Share of a decision's largest estimate below which a choice is negligible: two bits fewer make it 16-fold."""


@dataclass(frozen=True)
class MeasuredPairs:
    """Formats of one decision to measure."""

    pairs: tuple[Pair, ...]
    shares: NDArray[np.float64]
    """(choices, pairs): what a choice loses is this times what the pairs lose."""


def measured_pairs(choices: Sequence[Pair], first_order: NDArray[np.float64] | None = None) -> MeasuredPairs:
    """Return the formats to measure for the choices of a decision.

    A choice of one format is measured as it is, unless the estimate is lower than that of a negligible one. A mix loses
    what the format of its first group loses in all groups, plus, for each other group, the difference between its own
    format and that one.

    Args:
        choices: (weight format, activation format) of each choice; for each mix, the choice with the format of its
            first group alone is among them.
        first_order: estimate of what each choice loses, (choices,); None, not finite, or mixes among the choices: all
            are measured.
    """
    mixes = [weight for weight, _ in choices if isinstance(weight, MixedFormat)]
    if mixes or first_order is None or not np.isfinite(first_order).all():
        rows = _rows_of_groups(choices, mixes)
    else:
        rows = _rows_by_estimate(choices, first_order)
    pairs = tuple(dict.fromkeys(pair for row in rows for pair in row))
    return MeasuredPairs(pairs, np.array([[row.get(pair, 0.0) for pair in pairs] for row in rows]))


def _rows_of_groups(choices: Sequence[Pair], mixes: Sequence[MixedFormat]) -> list[dict[Pair, float]]:
    widest = max((part for mix in mixes for part in mix.parts), key=lambda part: part.bits, default=FLOAT)
    rows: list[dict[Pair, float]] = []
    for weight, activation in choices:
        if not isinstance(weight, MixedFormat):
            rows.append({(weight, activation): 1.0})
            continue
        first, *others = weight.parts
        row: dict[Pair, float] = {(first, activation): 1.0}
        for group, part in enumerate(others, start=1):
            for format, sign in ((part, 1.0), (first, -1.0)):
                probe = alone(group, format, widest, len(weight.parts))
                row[probe] = row.get(probe, 0.0) + sign
        rows.append({pair: share for pair, share in row.items() if share})
    return rows


def _rows_by_estimate(choices: Sequence[Pair], first_order: NDArray[np.float64]) -> list[dict[Pair, float]]:
    negligible = first_order < NEGLIGIBLE * first_order.max()
    first = int(np.where(negligible, first_order, -np.inf).argmax())
    shares = first_order / (first_order[first] or 1.0)
    return [
        {choices[first]: share} if passed_over and share else {pair: 1.0}
        for pair, passed_over, share in zip(choices, negligible, shares.tolist(), strict=True)
    ]


def measured_formats(space: SearchSpace) -> int:
    """Return how many formats of a decision are measured, at most."""
    return max(len(measured_pairs(decision.choices).pairs) for decision in space.decisions)


def alone(group: int, format: Format, widest: Format, groups: int) -> Pair:
    """Return formats in which one group of channels has `format`, the others the widest one, inputs none."""
    if format == widest:
        return widest, FLOAT
    return MixedFormat(tuple(format if other == group else widest for other in range(groups))), FLOAT  # type: ignore[misc]
