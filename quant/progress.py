"""The listener that long work reports its progress to."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """Function that is called when a phase begins and after each of its parts."""

    def __call__(self, phase: str, done: int = 0, total: int | None = None, what: str = "") -> None:
        """Receive a report.

        Args:
            phase: name of the phase, such as 'measuring'.
            done: number of parts done.
            total: number of all parts; None if unknown.
            what: description of the last part, such as 'layer 12 of 36'.
        """


def unheard(phase: str, done: int = 0, total: int | None = None, what: str = "") -> None:
    """Ignore a report."""
