"""Progress reports: the current phase of a run and how much of it is done, passed to a listener."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from transformers import TrainerCallback
from transformers.trainer_utils import has_length

from quant.progress import Listener, unheard

__all__ = ["EvaluationProgress", "Listener", "Passes", "counted", "unheard"]

T = TypeVar("T")


def counted(items: Iterable[T], total: int, phase: str, tell: Listener, noun: str = "batch") -> Iterator[T]:
    """Yield items and report each one when it is done.

    Args:
        items: the items.
        total: their number.
        phase: name of the phase.
        tell: listener.
        noun: name of an item in reports.
    """
    tell(phase, 0, total)
    for number, item in enumerate(items, start=1):
        yield item
        tell(phase, number, total, f"{noun} {number} of {total}")


@dataclass
class Passes:
    """Counter of the forward passes of a phase, with an estimate of their number."""

    phase: str
    expected: int
    done: int = 0
    purpose: str = ""
    """What the passes are for, told after their number."""

    def count(self, tell: Listener) -> None:
        """Count one pass and report it."""
        self.done += 1
        detail = f"pass {self.done} of at most {self.expected}{self.purpose}"
        tell(self.phase, self.done, max(self.done, self.expected), detail)


class EvaluationProgress(TrainerCallback):
    """Reports each batch that a Trainer evaluates."""

    def __init__(self, tell: Listener) -> None:
        self.tell = tell

    def begin(self, loader: Any) -> None:
        """Report the start of an evaluation over a data loader."""
        self.done, self.total = 0, len(loader) if has_length(loader) else None
        self.tell("evaluating", 0, self.total)

    def on_prediction_step(self, *arguments: Any, **keywords: Any) -> None:
        """Report a batch."""
        self.done += 1
        self.tell("evaluating", self.done, self.total, f"batch {self.done}")
