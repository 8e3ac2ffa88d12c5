"""What a contest should judge by, so that its pick is good on other examples too; for benchmarks/RESULTS.md.

    python -m benchmarks.contest --shared ../shared [--rows resnet20-3,mrpc] [--seed 0]

The search of a row of benchmarks.quality runs up to its contest. Then all assignments within the budget, of small
spaces, or the contest's choice, its candidates and some around them that use the budget, answer all held-out TRAINING
examples. By each criterion, a sample of one half of these picks the best assignment; what it is worth on the other half
is what counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.quality import parse_for_rows, searching
from policy.allocators import MAX_EXHAUSTIVE
from quant.convert import set_formats
from quant.quantizers.prefix_cache import prefix_cached
from trainer.reinforce_trainer import ReinforceTrainer
from trainer.search.selection import CandidateSelector
from trainer.search.targets import MultiTargetSearch, SearchTarget
from trainer.training.batch_norm import statistics_of_batch
from trainer.training.distillation import class_logits, divergence

AROUND, MOVES = 60, 4
"""assignments around the choice, and how many decisions of it they change at most"""
LEAST_USED = 0.97
"""of the budget, by those"""
DRAWS = 300


@dataclass
class Answers(Exception):
    """Logits of the assignments (assignments, examples, classes), the teacher's, and the labels (examples,)."""

    own: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor
    judged: int
    """examples that the contest itself sees"""


CRITERIA: dict[str, Callable[[Answers], torch.Tensor]] = {
    "loss": lambda seen: -_truth(seen).log(),
    "probability of the truth": lambda seen: -_truth(seen),
    "errors": lambda seen: (seen.own.argmax(-1) != seen.labels).double(),
    **{
        f"divergence from float, temperature {t}": lambda seen, t=t: divergence(seen.teacher / t, seen.own / t)  # type: ignore[misc]
        for t in (1, 2, 4)
    },
}
"""name -> what is the smaller, the better, of each assignment and example"""


def _truth(seen: Answers) -> torch.Tensor:
    return seen.own.softmax(-1)[:, torch.arange(len(seen.labels)), seen.labels]


def around(trainer: ReinforceTrainer, chosen: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """At most so many choices with a few decisions of `chosen` changed, which fit the budget and use it."""
    budget, generator = trainer.target.limits, np.random.default_rng(0)
    moves = CandidateSelector(budget, trainer.evaluator.evaluate_assignments).moves(tuple(chosen))
    choices: dict[tuple[int, ...], None] = {}
    for _ in range(100 * count):
        moved = list(chosen)
        for move in generator.choice(len(moves), generator.integers(1, MOVES + 1), replace=False):
            decision, index = moves[move]
            moved[decision] = index
        if len(choices) < count and budget.fits(moved) and budget.ratio(moved) >= LEAST_USED:
            choices[tuple(moved)] = None
    return list(choices)


@torch.no_grad()
def look(trainer: ReinforceTrainer, target: SearchTarget, chosen: Sequence[int]) -> Answers:
    """What the assignments around `chosen` answer to all that is held out."""
    assert target.search is not None and trainer.teacher is not None
    candidates = [tuple(choice) for choice in target.search.candidates.values() if trainer.target.limits.fits(choice)]
    small = trainer.target.limits.size <= MAX_EXHAUSTIVE
    others = trainer.target.limits.all_fitting() if small else around(trainer, chosen, AROUND)
    choices = dict.fromkeys([tuple(chosen), *candidates, *others])
    trainer.model.eval()
    own, teacher, labels = [], [], []
    for batch in trainer.batches_of(trainer.evaluator.dataset):
        answers = []
        with statistics_of_batch(trainer.model, batch), prefix_cached(trainer.modules) as cache:
            for choice in choices:
                set_formats(trainer.modules, trainer.space.assignment(choice))
                cache.restart()
                answers.append(class_logits(trainer.model(**batch), batch))
        own.append(torch.stack(answers))  # type: ignore[arg-type]
        with statistics_of_batch(trainer.teacher.model, batch):
            teacher.append(trainer.teacher.answers(batch))
        labels.append(batch["labels"])
    judged = trainer.evaluator.sizes.to_evaluate()
    return Answers(torch.cat(own, 1).double(), torch.cat(teacher).double(), torch.cat(labels), judged)


def answers(name: str, shared: Path, output: Path, seed: int) -> Answers:
    """Of a row's search, at its contest."""
    plain = MultiTargetSearch._select
    trainer = searching(name, shared, output, seed, f"contest-s{seed}")

    def stop(self: MultiTargetSearch, target: SearchTarget, best: tuple[int, ...]) -> Any:
        raise look(trainer, target, plain(self, target, best))

    with patch.object(MultiTargetSearch, "_select", stop):
        try:
            trainer.train()
        except Answers as seen:
            return seen
    raise SystemExit(f"{name}: its search has no contest")


def picks(seen: Answers, criterion: NDArray[np.float64], generator: Any) -> tuple[float, float, float]:
    """Return how good a criterion's picks are on the other examples.

    Points of accuracy over the mean assignment, points of the truth's probability under the best one, and the
    correlation of the criterion with the errors there.
    """
    wrong = (seen.own.argmax(-1) != seen.labels).double().numpy()
    truth = _truth(seen).numpy()
    gained, lost, together = [], [], []
    for _ in range(DRAWS):
        order = generator.permutation(len(seen.labels))
        half = len(order) // 2
        by = criterion[:, order[: min(seen.judged, half)]].mean(1)
        errors = wrong[:, order[half:]].mean(1)
        quality = truth[:, order[half:]].mean(1)
        gained.append(100 * (errors.mean() - errors[by.argmin()]))
        lost.append(100 * (quality.max() - quality[by.argmin()]))
        if errors.std() and by.std():
            together.append(np.corrcoef(by, errors)[0, 1])
    return float(np.mean(gained)), float(np.mean(lost)), float(np.mean(together)) if together else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parse_for_rows(parser, "resnet20-3,mrpc")
    for name in arguments.rows:
        seen = answers(name, arguments.shared, arguments.output_root_dir, arguments.seed)
        sample = min(seen.judged, len(seen.labels) // 2)
        print(f"\n**{name}**: {len(seen.own)} assignments, {sample} of {len(seen.labels)} examples to pick by\n")
        print("| judged by | accuracy over the mean one [points] | regret [points] | correlation with errors |")
        print("|---|---|---|---|")
        for criterion, harm in CRITERIA.items():
            gained, lost, together = picks(seen, harm(seen).numpy(), np.random.default_rng(0))
            print(f"| {criterion} | {gained:+.2f} | {lost:.2f} | {together:.2f} |", flush=True)


if __name__ == "__main__":
    main()
