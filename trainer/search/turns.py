"""Turns: which target of a run is trained at each step.

Targets with low budgets need most of the training, and high ones profit from theirs: weights that work in 3 bits work
in 6. So half of the turns go round, and the other half to the targets in proportion to what they still lose.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

EQUAL_SHARE = 0.5
"""Share of the turns that go round, so that no loss is of long ago."""
DECAY = 0.7
"""Weight of the earlier losses of a target in its moving average."""


class Turns:
    """Shares the steps of a run between its targets.

    Each target collects credit at every step, in proportion to its share; the one with the most credit is next and
    pays a step for it (smooth weighted round robin).

    Args:
        targets: number of targets.
    """

    def __init__(self, targets: int) -> None:
        self.credits = [0.0] * targets
        self.losses: list[float | None] = [None] * targets
        """Moving average of the training loss of each target under its final assignment; None: not trained yet."""

    def next(self) -> int:
        """Return the target of the next step; it stays the same until that step is counted."""
        credits = self._raised()
        # Among equals, the first: credits are rounded, because sums of shares differ in their last bits.
        return max(range(len(credits)), key=lambda target: (round(credits[target], 9), -target))

    def count(self, target: int, loss: float) -> None:
        """Count a step, and add its training loss to the average of its target."""
        self.credits = self._raised()
        self.credits[target] -= 1
        before = self.losses[target]
        self.losses[target] = loss if before is None else DECAY * before + (1 - DECAY) * loss

    def _raised(self) -> list[float]:
        return [credit + share for credit, share in zip(self.credits, self.shares(), strict=True)]

    def shares(self) -> list[float]:
        """Return the share of the next steps that each target gets: equal ones until the loss of each is known.

        What a target loses is its loss above the lowest one, because the rest is not the formats' fault.
        """
        equal = 1 / len(self.losses)
        losses = [loss for loss in self.losses if loss is not None]
        lost = [loss - min(losses) for loss in losses]
        if len(losses) < len(self.losses) or not sum(lost) > 0:
            return [equal] * len(self.losses)
        return [EQUAL_SHARE * equal + (1 - EQUAL_SHARE) * own / sum(lost) for own in lost]

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"credits": self.credits, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.credits, self.losses = list(state["credits"]), list(state["losses"])
