"""How good the chosen assignment is, and whether layer-by-layer effects could have been trusted to find it.

Both are measured at the moment of the choice, under the weights that all assignments have trained together: once the
chosen one has trained alone, the others are no longer comparable.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from policy.allocators import MAX_EXHAUSTIVE, random_choice
from trainer.search.selection import Choice, Contest, standard_error

ALL_SHARE = 10
"""times the affordable judgements that may go into judging every assignment: a proof is worth more than a sample"""
SAMPLES = 8
"""assignments that the additivity is measured on"""


def certificate(contest: Contest, chosen: Choice, affordable: int, seed: int) -> dict[str, Any]:
    """Rank and regret of the chosen assignment, by held-out quality in (0, 1].

    Among ALL assignments within the budget, if the space has at most MAX_EXHAUSTIVE and judging those that the contest
    has not seen takes no more than ALL_SHARE x `affordable`; else among `affordable` random ones, every one that
    differs from the chosen in a single decision, and all that the contest has seen. Returns `kind` 'all' or 'sampled',
    `among` (how many, the chosen one included), `rank` (1 is best), `regret` (best quality less the chosen one's),
    `regret_error` (standard error over the batches) and `harm_rank`, the rank by what the contest goes by.
    """
    budget = contest.budget
    fitting = {choice for choice in contest.seen if budget.fits(choice)} | {chosen}
    everything = all_if_affordable(contest, affordable)
    if everything is not None:
        fitting = set(everything)
    else:
        generator = np.random.default_rng(seed)
        fitting |= set(contest.single_swaps(chosen))
        fitting |= {tuple(random_choice(budget, generator, tries=1000)) for _ in range(affordable)}
    others = sorted(fitting - {chosen})
    judged = contest.judged([chosen, *others])
    harms, qualities = judged[:, 0].mean(1), judged[:, 1]
    means = qualities.mean(1)
    best = qualities[int(means.argmax())]
    lost = best - qualities[0]
    return {
        "kind": "sampled" if everything is None else "all",
        "among": len(fitting),
        "rank": int((means > means[0]).sum()) + 1,
        "regret": float(lost.mean()),
        "regret_error": standard_error(lost),
        "harm_rank": int((harms < harms[0]).sum()) + 1,
    }


def all_if_affordable(contest: Contest, affordable: int) -> list[Choice] | None:
    """Every choice within the budget, if these are few enough to be judged; else None. See `certificate`."""
    if contest.budget.size > MAX_EXHAUSTIVE:
        return None
    everything = list(contest.budget.all_fitting())
    return everything if len(set(everything) - set(contest.seen)) <= ALL_SHARE * affordable else None


def additivity(contest: Contest, chosen: Choice, seed: int) -> dict[str, Any]:
    """The harm that single changes predict, added up, against the harm of making them together.

    Random assignments around the chosen one, all different, with two decisions or a quarter of them moved to a
    neighbouring cost: a single move would predict itself. Returns `predicted` and `actual` increases of the held-out
    harm, the `changed` decisions, and the `correlation` (None if either does not vary; empty lists where there are no
    two decisions to move).
    """
    effects = contest.effects(chosen)
    generator = np.random.default_rng(seed)
    movable = sorted({decision for decision, _ in effects})
    together = max(2, round(len(movable) / 4))
    drawn: dict[Choice, float] = {}
    for _ in range(10 * SAMPLES if len(movable) >= together else 0):
        changed, total = list(chosen), 0.0
        for decision in generator.choice(movable, together, replace=False):
            moves = [move for move in effects if move[0] == decision]
            move = moves[generator.integers(len(moves))]
            changed[decision] = move[1]
            total += effects[move]
        drawn[tuple(changed)] = total
        if len(drawn) == SAMPLES:
            break
    samples, predicted = list(drawn), list(drawn.values())
    harms = contest.harms([chosen, *samples]).mean(1)
    actual = harms[1:] - harms[0]
    varies = len(samples) > 1 and np.std(predicted) > 0 and np.std(actual) > 0
    return {
        "changed": together if samples else 0,
        "predicted": [float(value) for value in predicted],
        "actual": actual.tolist(),
        "correlation": float(np.corrcoef(predicted, actual)[0, 1]) if varies else None,
    }
