"""How many held-out examples an evaluation takes, so that all evaluations together stay a share of the training."""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST_EVALUATED, MOST_EVALUATED = 64, 512
"""Bounds on the held-out examples per assignment: fewer say too little, more are not worth their time."""
LEAST_MEASURED = 32
"""Held-out examples per single format in a run without training, of which measuring could take a share."""
DECIDING_SHARE = 4
"""Largest multiple of the proposing examples that decide: only two choices are compared then, not a neighbourhood."""
TRAINING_PASSES = 3
"""Forward passes that one training step (forward and backward) counts as."""
EVALUATED_SHARE = 1 / 32
"""Share of the training that evaluating a neighbourhood once may take. The final choice needs a few of them."""


def examples_to_evaluate(steps: int, batch_size: int, assignments: int) -> int:
    """Return the held-out examples per assignment for which evaluating all takes `EVALUATED_SHARE` of the training.

    Args:
        steps: optimizer steps of the training.
        batch_size: training examples per optimizer step.
        assignments: number of assignments to evaluate.
    """
    affordable = TRAINING_PASSES * steps * batch_size * EVALUATED_SHARE / max(assignments, 1)
    return int(min(max(affordable, LEAST_EVALUATED), MOST_EVALUATED))


def examples_to_measure(steps: int, batch_size: int, assignments: int, share: float) -> int:
    """Return the held-out examples per single format, for which measuring all takes at most a share of the training.

    Args:
        steps: optimizer steps of the training; 0 leaves the share without effect.
        batch_size: training examples per optimizer step.
        assignments: number of (decision, choice) pairs to measure.
        share: largest share of the training's time that measuring may take.
    """
    if steps <= 0:
        return LEAST_MEASURED
    affordable = TRAINING_PASSES * steps * batch_size * share / max(assignments, 1)
    return int(min(max(affordable, 1), MOST_EVALUATED))


@dataclass(frozen=True)
class EvaluationSizes:
    """Sizes of all evaluations of one run."""

    available: int
    """Held-out examples."""
    decisions: int
    choices: int
    batch_size: int
    """Largest evaluation batch."""
    total_steps: int = 0
    step_examples: int = 1
    """Training examples per optimizer step."""
    examples: int | None = None
    """Fixed number of examples per evaluation; None: derived from the length of the training."""
    measure_share: float = 0.12
    targets: int = 1
    """Budgets of the run, which share the time for evaluations."""
    measured: int | None = None
    """Formats of a decision that are measured, see `trainer.search.measured_pairs`; None: as many as choices."""

    @property
    def neighbours(self) -> int:
        """Assignments next to a chosen one: one step up and one step down for each decision."""
        return 2 * self.decisions

    def to_evaluate(self, assignments: int | None = None) -> int:
        """Examples for evaluating this many assignments for each target; None: the `neighbours`."""
        count = self.targets * (self.neighbours if assignments is None else assignments)
        wanted = self.examples or examples_to_evaluate(self.total_steps, self.step_examples, count)
        return min(wanted, self.available)

    def to_measure(self) -> int:
        """Examples for measuring every single format."""
        pairs = self.decisions * (self.choices if self.measured is None else self.measured)
        measured = examples_to_measure(self.total_steps, self.step_examples, pairs, self.measure_share)
        wanted = self.examples or measured
        return min(wanted, self.available)

    def to_decide(self) -> tuple[int, int]:
        """Return (first, count) of the examples that decide, which follow those that propose; count 0 if too few."""
        first = self.to_evaluate()
        left = min(self.available - first, MOST_EVALUATED, DECIDING_SHARE * first)
        return first, left if left >= LEAST_EVALUATED else 0

    def affordable(self, share: float) -> int:
        """Assignments whose evaluation, for each target, takes a share of the training's time in all."""
        passes = share * TRAINING_PASSES * self.total_steps * self.step_examples
        return int(passes / self.to_evaluate() / self.targets)

    def batch_starts(self, first: int, count: int, least: int = 1) -> range:
        """Split `count` examples from `first` on into batches; the range's step is their size.

        There are at least four batches where `least` allows, so that a mean over batches has a standard error.
        """
        return range(first, first + count, min(self.batch_size, max(math.ceil(count / 4), least)))

    @property
    def smallest_batch(self) -> int:
        """Examples in the smallest batch that assignments are compared on."""
        parts = (self.batch_starts(0, self.to_evaluate()), self.batch_starts(*self.to_decide()))
        return min((starts.stop - starts[-1] for starts in parts if starts), default=self.batch_size)

    @property
    def passes(self) -> int:
        """Forward passes per evaluated assignment."""
        return len(self.batch_starts(0, self.to_evaluate()))
