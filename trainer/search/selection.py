"""CandidateSelector: compares candidates, and the neighbours of the best of them, on held-out data.

The noise of a policy gradient exceeds the effect of a single layer, and sensitivities measured one layer at a time on
the float model miss what training has changed. Policy and allocators therefore only propose. The trained weights
decide, on examples disjoint from those used to propose, because the best of many is optimistically biased.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policy.budget import Budget
from policy.factors import Factor
from policy.solve import Table

Choice: TypeAlias = tuple[int, ...]
Evaluate: TypeAlias = Callable[[Sequence[Choice]], NDArray[np.float64]]
"""Choices -> held-out (degradation, quality), (choices, 2, batches), every choice on the same batches."""

ROUNDS = 3
"""Largest number of rounds in which the neighbourhood of the best choice is measured."""
PROPOSALS = 12
"""Choices per round that are proposed from the measured sensitivities and then evaluated."""
CHANGE_PENALTIES = (1e-3, 0.5)
"""Smallest and largest penalty per changed decision, relative to the largest sensitivity."""


@dataclass
class CandidateSelector:
    """Compares choices by their degradation on held-out data and remembers all evaluations."""

    budget: Budget
    evaluate: Evaluate
    """Evaluates on the examples that propose."""
    rounds: int = ROUNDS
    decide_by: Evaluate | None = None
    """Evaluates on examples that have proposed nothing; None: those of `evaluate` decide too."""
    seen: dict[Choice, NDArray[np.float64]] = field(default_factory=dict)
    """Choice -> its (degradation, quality) per batch, (2, batches)."""
    decided: dict[Choice, NDArray[np.float64]] = field(default_factory=dict)
    """The same on the deciding examples."""

    def evaluated(self, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """Return degradation and quality, (choices, 2, batches); nothing is evaluated twice."""
        return _remembered(self.evaluate, self.seen, choices)

    def degradations(self, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """Return the degradations on the proposing examples, (choices, batches)."""
        return self.evaluated(choices)[:, 0]

    def deciding_degradations(self, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """Return the degradations on the deciding examples, (choices, batches)."""
        if self.decide_by is None:
            return self.degradations(choices)
        return _remembered(self.decide_by, self.decided, choices)[:, 0]

    def select(self, candidates: Mapping[str, Sequence[int]]) -> SelectionResult:
        """Return the first candidate, unless another or a neighbour of the best one is better (see `better_of`).

        Args:
            candidates: name -> choice.

        Raises:
            ValueError: for a candidate over the budget.
        """
        named = {name: tuple(choice) for name, choice in candidates.items()}
        if over := [name for name, choice in named.items() if not self.budget.fits(choice)]:
            raise ValueError(f"over the budget: {', '.join(over)}")
        first, *others = named.values()
        best = self.better_of(others, first) or first
        winner = origin = next(name for name, choice in named.items() if choice == best)
        for round_ in range(self.rounds):
            better = self.better_of(self.neighbours(best), best)
            if better is None:
                break
            best, origin = better, f"swap {round_ + 1} of {winner}"
        means = self.degradations(list(named.values())).mean(1)
        by_name = {name: float(mean) for name, mean in zip(named, means, strict=True)}
        return SelectionResult(best, origin, by_name, self)

    def better_of(self, challengers: Sequence[Choice], best: Choice) -> Choice | None:
        """Return the challenger with the least degradation if it is significantly better than `best`.

        The deciding examples have to confirm it by more than the standard error of the paired difference.
        """
        if not challengers:
            return None
        challenger = challengers[int(self.degradations(challengers).mean(1).argmin())]
        if self.degradations([challenger]).mean() >= self.degradations([best]).mean():
            return None
        before, after = self.deciding_degradations([best, challenger])
        gain = before - after
        return challenger if gain.mean() > standard_error(gain) else None

    def best_of_all(self, everything: Sequence[Choice], best: Choice) -> Choice:
        """Return the choice with the least degradation where all choices can be evaluated; ties keep `best`.

        Every choice has then been compared on the same examples, so no candidate has precedence. If there are deciding
        examples, they have to confirm the difference as in `better_of`.
        """
        if self.decide_by is not None:
            return self.better_of(everything, best) or best
        choices = [best, *everything]
        return choices[int(self.degradations(choices).mean(1).argmin())]

    def sensitivities(self, around: Choice) -> dict[tuple[int, int], float]:
        """Measure (decision, other index) -> increase of the degradation from that single change of `around`."""
        moves = self.moves(around)
        values = self.degradations([around, *(_moved(around, move) for move in moves)]).mean(1)
        return {move: float(value - values[0]) for move, value in zip(moves, values[1:], strict=True)}

    def sensitivity_table(self, around: Choice) -> tuple[Table, float]:
        """Return `sensitivities` as (decisions, choices) and their largest magnitude.

        Entries without a measurement are too large to be chosen.
        """
        measured = self.sensitivities(around)
        largest = max((abs(value) for value in measured.values()), default=0.0)
        table = np.full(self.budget.tables[0].shape, 1e3 * (largest or 1.0))
        table[np.arange(len(around)), around] = 0
        for move, value in measured.items():
            table[move] = value
        return table, largest

    def moves(self, around: Choice) -> list[tuple[int, int]]:
        """Return (decision, other index) for every change to the next lower, the same or the next higher cost.

        Decisions that should move further get there in another round; measuring distant formats is mostly wasted.
        """
        table, moves = self.budget.tables[0], []
        for decision, taken in enumerate(around):
            levels = np.unique(table[decision]).tolist()
            level = levels.index(table[decision, taken])
            near = levels[max(level - 1, 0) : level + 2]
            moves += [(decision, c) for c, cost in enumerate(table[decision]) if cost in near and c != taken]
        return moves

    def single_swaps(self, around: Choice) -> list[Choice]:
        """Return every choice within the budget that differs in one decision, however far."""
        choices = self.budget.tables[0].shape[1]
        swaps = [_moved(around, (d, c)) for d, taken in enumerate(around) for c in range(choices) if c != taken]
        return [swap for swap in swaps if self.budget.fits(swap)]

    def neighbours(self, around: Choice, terms: Sequence[Factor] = ()) -> list[Choice]:
        """Propose choices within the budget that change few to many decisions, by the measured sensitivities.

        Sensitivities are the less additive the more decisions change at once. Each change is therefore charged a
        penalty; every penalty of a geometric series gives one exactly solved choice, from few changes to any number.

        Args:
            around: choice whose neighbours are proposed.
            terms: values of joint changes, see `trainer.search.pairs`.
        """
        sensitivity, largest = self.sensitivity_table(around)
        changed = np.ones_like(sensitivity)
        changed[np.arange(len(around)), around] = 0
        lowest, highest = CHANGE_PENALTIES
        penalties = [0.0, *np.geomspace(lowest, highest, PROPOSALS - 1) * largest]
        found = [tuple(self.budget.solve(-sensitivity - penalty * changed, terms)) for penalty in penalties]
        return [choice for choice in dict.fromkeys(found) if choice != around]


@dataclass(frozen=True)
class SelectionResult:
    """The selected choice and what it was compared with."""

    choice: Choice
    origin: str
    """Name of the winning candidate, or the swap of it."""
    candidates: dict[str, float]
    """Name -> held-out degradation of each candidate."""
    selector: CandidateSelector

    def describe(self) -> dict[str, Any]:
        """Return the `contest` entries of the run's record."""
        degradation, quality = self.selector.evaluated([self.choice])[0].mean(1)
        return {
            "winner": self.origin,
            "held_out_harm": float(degradation),
            "held_out_quality": float(quality),
            "candidates": self.candidates,
            "compared": len(self.selector.seen),
        }


def _remembered(
    evaluate: Evaluate, results: dict[Choice, NDArray[np.float64]], choices: Sequence[Choice]
) -> NDArray[np.float64]:
    """Look up the choices in `results`, evaluating and adding those that are missing."""
    new = [choice for choice in dict.fromkeys(choices) if choice not in results]
    if new:
        results.update(zip(new, evaluate(new), strict=True))
    return np.array([results[choice] for choice in choices])


def _moved(choice: Choice, move: tuple[int, int]) -> Choice:
    decision, index = move
    return (*choice[:decision], index, *choice[decision + 1 :])


def standard_error(values: NDArray[np.float64]) -> float:
    """Return the standard error of the mean of (batches,) values; 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
