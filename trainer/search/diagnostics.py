"""Diagnostics of a selection: how close to optimal the choice is, and whether sensitivities would have found it.

Both are measured when the choice is made, with the weights that all assignments have trained together. Once the chosen
assignment has been fine-tuned alone, the others are no longer comparable.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from policy.allocators import MAX_EXHAUSTIVE, random_choice
from trainer.search.selection import CandidateSelector, Choice, standard_error

ALL_SHARE = 10
"""Multiple of the affordable evaluations that may go into evaluating every assignment: that is a proof, no sample."""
LEAST_SWAPS, SWAPS_SHARE = 100, 4
"""All assignments that differ in one decision are evaluated if they are at most so many, or so many times the
affordable evaluations; else a random sample of that size."""
SAMPLES = 8
"""Assignments on which the additivity is measured."""


def optimality_report(selector: CandidateSelector, chosen: Choice, affordable: int, seed: int) -> dict[str, Any]:
    """Rank the chosen assignment by held-out quality: the record's `certificate`.

    It is compared with ALL assignments within the budget, if the space has at most MAX_EXHAUSTIVE and evaluating the
    new ones takes no more than ALL_SHARE x `affordable` evaluations. Otherwise it is compared with `affordable` random
    ones, those that differ in a single decision (see LEAST_SWAPS) and all that the selector has seen.

    Args:
        selector: selector that made the choice, with its evaluations.
        chosen: the choice.
        affordable: number of assignments worth evaluating.
        seed: seed of the random assignments.

    Returns:
        `kind` 'all' or 'sampled'; `among`, the number compared with the chosen one included; `rank`, 1 for the best
        quality; `regret`, the best quality minus the chosen one's; `regret_error`, its standard error over the
        batches; `harm_rank`, the rank by degradation.
    """
    budget = selector.budget
    fitting = {choice for choice in selector.seen if budget.fits(choice)} | {chosen}
    everything = all_if_affordable(selector, affordable)
    if everything is not None:
        fitting = set(everything)
    else:
        generator = np.random.default_rng(seed)
        swaps, most = selector.single_swaps(chosen), most_swaps(affordable)
        if len(swaps) > most:
            swaps = [swaps[index] for index in generator.choice(len(swaps), most, replace=False)]
        fitting |= set(swaps)
        fitting |= {tuple(random_choice(budget, generator, tries=1000)) for _ in range(affordable)}
    others = sorted(fitting - {chosen})
    evaluated = selector.evaluated([chosen, *others])
    degradations, qualities = evaluated[:, 0].mean(1), evaluated[:, 1]
    means = qualities.mean(1)
    best = qualities[int(means.argmax())]
    lost = best - qualities[0]
    return {
        "kind": "sampled" if everything is None else "all",
        "among": len(fitting),
        "rank": int((means > means[0]).sum()) + 1,
        "regret": float(lost.mean()),
        "regret_error": standard_error(lost),
        "harm_rank": int((degradations < degradations[0]).sum()) + 1,
    }


def most_swaps(affordable: int) -> int:
    """Return how many assignments that differ in one decision a sampled report holds at most."""
    return max(LEAST_SWAPS, SWAPS_SHARE * affordable)


def all_if_affordable(selector: CandidateSelector, affordable: int) -> list[Choice] | None:
    """Return every choice within the budget if all can be evaluated (see `optimality_report`), else None."""
    if selector.budget.size > MAX_EXHAUSTIVE:
        return None
    everything = list(selector.budget.all_fitting())
    return everything if len(set(everything) - set(selector.seen)) <= ALL_SHARE * affordable else None


def additivity(selector: CandidateSelector, chosen: Choice, seed: int) -> dict[str, Any]:
    """Compare the sum of single sensitivities with the degradation of making the changes together.

    The samples are different random assignments around the chosen one, with two decisions or a quarter of them moved
    to a neighbouring cost; a single move would predict itself.

    Args:
        selector: selector that made the choice.
        chosen: the choice.
        seed: seed of the samples.

    Returns:
        `predicted` and `actual` increases of the degradation, the number of `changed` decisions, and the `correlation`
        (None if either is constant). The lists are empty if fewer than two decisions can move.
    """
    measured = selector.sensitivities(chosen)
    generator = np.random.default_rng(seed)
    movable = sorted({decision for decision, _ in measured})
    together = max(2, round(len(movable) / 4))
    drawn: dict[Choice, float] = {}
    for _ in range(10 * SAMPLES if len(movable) >= together else 0):
        changed, total = list(chosen), 0.0
        for decision in generator.choice(movable, together, replace=False):
            moves = [move for move in measured if move[0] == decision]
            move = moves[generator.integers(len(moves))]
            changed[decision] = move[1]
            total += measured[move]
        drawn[tuple(changed)] = total
        if len(drawn) == SAMPLES:
            break
    samples, predicted = list(drawn), list(drawn.values())
    degradations = selector.degradations([chosen, *samples]).mean(1)
    actual = degradations[1:] - degradations[0]
    varies = len(samples) > 1 and np.std(predicted) > 0 and np.std(actual) > 0
    return {
        "changed": together if samples else 0,
        "predicted": [float(value) for value in predicted],
        "actual": actual.tolist(),
        "correlation": float(np.corrcoef(predicted, actual)[0, 1]) if varies else None,
    }
