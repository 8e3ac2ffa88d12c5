"""Labels as they stand in files -> class numbers from 0, or values for regression."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.errors import UserError

HIDDEN = (None, -1, "", "-1")
"""how data sets write that a label is not given"""


@dataclass(frozen=True)
class Labels:
    """How the labels of a task are read: class names with what stands for them, or any number for regression."""

    names: tuple[str, ...]
    numbers: Mapping[Any, int]
    """cell -> class number; empty for regression"""
    regression: bool = False

    def number(self, cell: Any) -> int | float:
        """ValueError, saying why, for a cell that is no label."""
        if cell in HIDDEN and not self.regression:
            raise ValueError("has no label")
        value = plain(cell)
        if self.regression:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{cell!r} is not a number")
            return float(value)
        if value not in self.numbers:
            known = ", ".join(map(str, list(self.numbers)[:10])) + (", ..." if len(self.numbers) > 10 else "")
            raise ValueError(f"label {cell!r} is not one of {known}")
        return self.numbers[value]


def plain(cell: Any) -> Any:
    """The number that a cell is written as, whole numbers as int; other text without spaces around it."""
    if isinstance(cell, str):
        cell = cell.strip()
        try:
            value = float(cell)
        except ValueError:
            return cell
        cell = value if math.isfinite(value) else cell  # a class may be called nan
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


def labels_of(
    cells: Sequence[Any], names: Sequence[str] | None, regression: bool, place: Callable[[int], str]
) -> Labels:
    """How to read the labels of a training split.

    Args:
        cells: as they are in the files; numbers may be written as text.
        names: the classes where the files name them, in the order of their numbers.
        regression: whether the task is known to be one; fractions make it one too.
        place: row -> what an error calls it.
    """
    if regression:
        return Labels((), {}, regression=True)
    if names is not None:
        return Labels(tuple(names), {number: number for number in range(len(names))})
    rows = [(row, plain(cell)) for row, cell in enumerate(cells) if cell not in HIDDEN]
    numbers = [(row, value) for row, value in rows if isinstance(value, int | float)]
    if 2 * len(numbers) <= len(rows):
        classes = sorted({str(value) for _, value in rows})
        return checked(Labels(tuple(classes), {name: number for number, name in enumerate(classes)}))
    if stray := next((row for row, value in rows if not isinstance(value, int | float)), None):
        raise UserError(f"{place(stray)}: label {cells[stray]!r} is text where most labels are numbers")
    if any(isinstance(value, float) for _, value in numbers):
        return Labels((), {}, regression=True)
    values = sorted({int(value) for _, value in numbers})
    expected = range(min(values[0], 1), len(values) + min(values[0], 1))
    for row, value in numbers:
        if value not in expected:
            raise UserError(
                f"{place(row)}: label {value} is out of range: {len(values)} classes without names are 0 to "
                f"{len(values) - 1} or 1 to {len(values)}"
            )
    names = ["False", "True"] if isinstance(rows[0][1], bool) else [str(value) for value in values]
    return checked(Labels(tuple(names), {value: number for number, value in enumerate(values)}))


def checked(labels: Labels) -> Labels:
    """UserError where there is nothing to tell apart."""
    if len(labels.names) < 2:
        raise UserError(f"the training labels are all the same: {', '.join(labels.names) or '(none)'}")
    return labels
