"""How far a run is: what it does by name, how much of it is done, told to whoever listens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """Hears of a phase when it begins, and each time that something in it is done."""

    def __call__(self, phase: str, done: int = 0, total: int | None = None, what: str = "") -> None:
        """Told of a phase, how much of it is done, of how much, and what was done last.

        Args:
            phase: what is being done: 'measuring'.
            done: how many of `total`.
            total: None where that is not known.
            what: the part that was done last, in words: 'layer 12 of 36'.
        """


def unheard(phase: str, done: int = 0, total: int | None = None, what: str = "") -> None:
    """The listener of those who want to hear nothing."""


def counted(items: Iterable[T], total: int, phase: str, tell: Listener, noun: str = "batch") -> Iterator[T]:
    """`items`, which are `total`; each is told of when the next one is asked for."""
    tell(phase, 0, total)
    for number, item in enumerate(items, start=1):
        yield item
        tell(phase, number, total, f"{noun} {number} of {total}")


@dataclass
class Passes:
    """Forward passes of a phase that judges many assignments, of about how many."""

    phase: str
    expected: int
    done: int = 0

    def count(self, tell: Listener) -> None:
        """One more is done."""
        self.done += 1
        tell(self.phase, self.done, max(self.done, self.expected), f"pass {self.done} of at most {self.expected}")
