"""Pairwise terms: what two decisions of a block lose together, beyond the sum of what each loses alone.

The errors of two layers of a block meet in its output, where they add to each other or cancel. Where the effects of
single decisions do not add up, the pairs that matter most are measured, and the choice is solved again with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policy.factors import Factor
from policy.space import SearchSpace
from quant.reconstruction.blocks import Unit
from trainer.search.selection import CandidateSelector, Choice

ADDS_UP = 0.9
"""Least correlation of predicted and actual degradations at which effects count as additive."""
PAIRS_SHARE = 1 / 32
"""Largest share of the training's time for measuring pairs."""
MOST_RECORDED = 10
"""Pairs that a record holds, those with the largest terms."""

Move = tuple[int, int]
"""(decision, other index): one decision of a choice is changed."""
Pair = tuple[Move, Move]


@dataclass(frozen=True)
class PairTerms:
    """Terms of pairs of changes around a choice."""

    measured: Mapping[Pair, float]
    """Pair of changes -> the degradation of both together minus that of each alone."""

    def factors(self, choices: int) -> list[Factor]:
        """Return the terms as values, a table over the choices of each pair of decisions: what they do not lose."""
        tables: dict[tuple[int, int], Any] = {}
        for ((d, i), (e, j)), term in self.measured.items():
            tables.setdefault((d, e), np.zeros((choices, choices)))[i, j] = -term
        return [Factor(decisions, (table,)) for decisions, table in tables.items()]

    def describe(self, space: SearchSpace, changed: bool) -> dict[str, Any]:
        """Return the `pairs` entry of a record's `contest`.

        Args:
            space: search space.
            changed: whether the choice that was solved with the terms has won.
        """
        largest = sorted(self.measured.items(), key=lambda entry: -abs(entry[1]))[:MOST_RECORDED]
        shown = [{"changes": dict(_described(space, move) for move in pair), "term": term} for pair, term in largest]
        return {"measured": len(self.measured), "largest": shown, "changed_choice": changed}


def _described(space: SearchSpace, move: Move) -> tuple[str, str]:
    decision = space.decisions[move[0]]
    weight, activation = decision.choices[move[1]]
    return decision.name, f"{weight}/{activation}"


def adds_up(additivity: Mapping[str, Any]) -> bool:
    """Return whether effects of single decisions add up, by the `additivity` of a record; so they do if it is empty."""
    correlation = additivity["correlation"]
    return correlation is None or correlation >= ADDS_UP


def decisions_by_block(space: SearchSpace, units: Sequence[Unit]) -> list[list[int]]:
    """Return the decisions within each block of a model, for blocks with several; without blocks, all decisions.

    Args:
        space: search space.
        units: blocks and single layers, see `quant.reconstruction.blocks.find_units`.
    """
    blocks = [set(unit.layers) for unit in units if unit.chain is not None]
    within = [[d for d, own in enumerate(space.decisions) if block.issuperset(own.layers)] for block in blocks]
    found = [decisions for decisions in within if len(decisions) > 1]
    return found or ([] if blocks else [list(range(len(space.decisions)))])


def pairs_that_matter(effects: Mapping[Move, float], blocks: Sequence[Sequence[int]], most: int) -> list[Pair]:
    """Return the pairs of changes within a block whose term can be largest, at most `most`, the largest first.

    To second order, single changes lose quadratic forms of the two layers' errors, and their term is the mixed part,
    which is at most 2 sqrt(a b) for effects a and b (Cauchy-Schwarz).

    Args:
        effects: change -> its own effect.
        blocks: decisions of each block.
        most: number of pairs to return at most.
    """
    of: dict[int, list[Move]] = {}
    for move in effects:
        of.setdefault(move[0], []).append(move)
    pairs = [
        pair
        for block in blocks
        for d, e in itertools.combinations(sorted(block), 2)
        for pair in itertools.product(of.get(d, []), of.get(e, []))
    ]
    bound = {pair: math.sqrt(abs(effects[pair[0]] * effects[pair[1]])) for pair in pairs}
    return sorted(pairs, key=lambda pair: -bound[pair])[:most]


def measure_pairs(selector: CandidateSelector, around: Choice, blocks: Sequence[Sequence[int]], most: int) -> PairTerms:
    """Measure the terms of the pairs of changes of a choice that matter most.

    Args:
        selector: selector that has chosen, with its evaluations.
        around: the choice.
        blocks: decisions of each block.
        most: number of pairs to measure at most.
    """
    effects = selector.sensitivities(around)
    pairs = pairs_that_matter(effects, blocks, most)
    if not pairs:
        return PairTerms({})
    together = []
    for pair in pairs:
        changed = list(around)
        for decision, index in pair:
            changed[decision] = index
        together.append(tuple(changed))
    values = selector.degradations([around, *together]).mean(1)
    terms = values[1:] - values[0] - [effects[one] + effects[two] for one, two in pairs]
    return PairTerms({pair: float(term) for pair, term in zip(pairs, terms, strict=True)})
