"""The final choice: candidates, and the swaps around the best of them, compared on held-out data.

A policy gradient's noise is larger than a layer's effect, and effects measured one layer at a time on the float model
miss what training has changed. So neither has the last word: both propose, the trained weights decide. What is best of
many on the examples that proposed it is so by luck, in part; so other examples decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policy.budget import Budget
from policy.solve import Table

Choice: TypeAlias = tuple[int, ...]
Judge: TypeAlias = Callable[[Sequence[Choice]], NDArray[np.float64]]
"""choices -> held-out (harm, quality), (choices, 2, batches), each choice on the same batches"""

ROUNDS = 3
"""times at most that the neighbourhood of the best choice is measured"""
PROPOSALS = 12
"""choices that are proposed from what was measured, and then tried for real"""
TOLLS = (1e-3, 0.5)
"""least and greatest charge for a change, as a share of the largest effect"""


@dataclass
class Contest:
    """Compares choices by their harm on held-out data and remembers all that it has seen."""

    budget: Budget
    judge: Judge
    rounds: int = ROUNDS
    decide_by: Judge | None = None
    """judges on examples that have proposed nothing; None: there are no others, those of `judge` decide too"""
    seen: dict[Choice, NDArray[np.float64]] = field(default_factory=dict)
    """choice -> its (harm, quality) on each batch, (2, batches)"""
    decided: dict[Choice, NDArray[np.float64]] = field(default_factory=dict)
    """the same on the examples that decide"""

    def judged(self, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """Harm and quality, (choices, 2, batches); what was seen before is not judged again."""
        return _remembered(self.judge, self.seen, choices)

    def harms(self, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """(choices, batches)"""
        return self.judged(choices)[:, 0]

    def deciding_harms(self, choices: Sequence[Choice]) -> NDArray[np.float64]:
        """(choices, batches), on the examples that decide."""
        return (
            self.harms(choices) if self.decide_by is None else _remembered(self.decide_by, self.decided, choices)[:, 0]
        )

    def decide(self, candidates: Mapping[str, Sequence[int]]) -> Verdict:
        """The first candidate, unless another or a local swap of the best of them is better, see `better_of`.

        Raises ValueError for a candidate over the budget.
        """
        named = {name: tuple(choice) for name, choice in candidates.items()}
        if over := [name for name, choice in named.items() if not self.budget.fits(choice)]:
            raise ValueError(f"over the budget: {', '.join(over)}")
        first, *others = named.values()
        best = self.better_of(others, first) or first
        winner = origin = next(name for name, choice in named.items() if choice == best)
        for round_ in range(self.rounds):
            better = self.better_of(self.swaps(best), best)
            if better is None:
                break
            best, origin = better, f"swap {round_ + 1} of {winner}"
        means = self.harms(list(named.values())).mean(1)
        return Verdict(best, origin, {name: float(mean) for name, mean in zip(named, means, strict=True)}, self)

    def better_of(self, challengers: Sequence[Choice], best: Choice) -> Choice | None:
        """The challenger of least harm, if the deciding examples call it better than `best` by more than the error.

        That is the standard error of the difference, taken on the same batches.
        """
        if not challengers:
            return None
        challenger = challengers[int(self.harms(challengers).mean(1).argmin())]
        if self.harms([challenger]).mean() >= self.harms([best]).mean():
            return None
        before, after = self.deciding_harms([best, challenger])
        gain = before - after
        return challenger if gain.mean() > standard_error(gain) else None

    def best_of_all(self, everything: Sequence[Choice], best: Choice) -> Choice:
        """Where every choice there is can be judged: the one of least harm, `best` if it is as good.

        All held-out examples have then spoken for all choices, and the prior's own has no claim of its own any more.
        Where other examples are left, these decide between the two, as in `better_of`.
        """
        if self.decide_by is not None:
            return self.better_of(everything, best) or best
        choices = [best, *everything]
        return choices[int(self.harms(choices).mean(1).argmin())]

    def effects(self, around: Choice) -> dict[tuple[int, int], float]:
        """(decision, other index) -> harm with that one decision changed, less the harm of `around`; measured."""
        moves = self.moves(around)
        harms = self.harms([around, *(_moved(around, move) for move in moves)]).mean(1)
        return {move: float(harm - harms[0]) for move, harm in zip(moves, harms[1:], strict=True)}

    def effect_table(self, around: Choice) -> tuple[Table, float]:
        """`effects` as (decisions, choices), out of reach where none was measured; and the largest magnitude of one."""
        effects = self.effects(around)
        largest = max((abs(value) for value in effects.values()), default=0.0)
        table = np.full(self.budget.tables[0].shape, 1e3 * (largest or 1.0))
        table[np.arange(len(around)), around] = 0
        for move, value in effects.items():
            table[move] = value
        return table, largest

    def moves(self, around: Choice) -> list[tuple[int, int]]:
        """(decision, other index) for every step to the next cheaper, the same or the next dearer cost.

        A decision that should go further gets there in another round; what lies far off would mostly be measured in
        vain.
        """
        table, moves = self.budget.tables[0], []
        for decision, taken in enumerate(around):
            levels = np.unique(table[decision]).tolist()
            level = levels.index(table[decision, taken])
            near = levels[max(level - 1, 0) : level + 2]
            moves += [(decision, c) for c, cost in enumerate(table[decision]) if cost in near and c != taken]
        return moves

    def single_swaps(self, around: Choice) -> list[Choice]:
        """Every fitting choice that differs in one decision, however far."""
        choices = self.budget.tables[0].shape[1]
        swaps = [_moved(around, (d, c)) for d, taken in enumerate(around) for c in range(choices) if c != taken]
        return [swap for swap in swaps if self.budget.fits(swap)]

    def swaps(self, around: Choice) -> list[Choice]:
        """Fitting choices from a single swap to all that the measured effects ask for, each the best of its reach.

        Effects add up less the more decisions change at once. So each change is charged a toll, and a ladder of tolls
        gives, solved exactly, the best choice with few changes, with more, and with any number.
        """
        effect, largest = self.effect_table(around)
        changed = np.ones_like(effect)
        changed[np.arange(len(around)), around] = 0
        tolls = [0.0, *np.geomspace(TOLLS[0], TOLLS[1], PROPOSALS - 1) * largest]
        found = [tuple(self.budget.solve(-effect - toll * changed)) for toll in tolls]
        return [choice for choice in dict.fromkeys(found) if choice != around]


@dataclass(frozen=True)
class Verdict:
    """What was chosen, and against what."""

    choice: Choice
    origin: str
    """the candidate that won, or the swap of it"""
    candidates: dict[str, float]
    """held-out harm of each candidate"""
    contest: Contest

    def describe(self) -> dict[str, Any]:
        """The part of the record that says how the choice was made."""
        harm, quality = self.contest.judged([self.choice])[0].mean(1)
        return {
            "winner": self.origin,
            "held_out_harm": float(harm),
            "held_out_quality": float(quality),
            "candidates": self.candidates,
            "compared": len(self.contest.seen),
        }


def _remembered(
    judge: Judge, known: dict[Choice, NDArray[np.float64]], choices: Sequence[Choice]
) -> NDArray[np.float64]:
    """What `judge` says of the choices, asked only of those that are not `known`, which then are."""
    new = [choice for choice in dict.fromkeys(choices) if choice not in known]
    if new:
        known.update(zip(new, judge(new), strict=True))
    return np.array([known[choice] for choice in choices])


def _moved(choice: Choice, move: tuple[int, int]) -> Choice:
    decision, index = move
    return (*choice[:decision], index, *choice[decision + 1 :])


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of values (batches,); 0 for a single one."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
