"""Converts labels as written in files to class numbers from 0, or to values for regression."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.errors import UserError

MAX_RARE_CLASSES = 20
"""most classes if there are fewer than two rows per class; more are taken for texts or row numbers, and refused"""


@dataclass(frozen=True)
class Labels:
    """How the labels of a task are read: as one of the named classes, or as a number for regression."""

    names: tuple[str, ...]
    numbers: Mapping[Any, int]
    """cell -> class number; empty for regression"""
    regression: bool = False
    words: bool = False
    """whether cells are compared as text, even if some look like numbers"""
    notes: tuple[str, ...] = ()

    def number(self, cell: Any) -> int | float:
        """Convert a cell to its class number, or to its value for regression.

        Raises:
            ValueError: says why the cell is not a label.
        """
        value = written(cell) if self.words else plain(cell)
        if self.regression:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{cell!r} is not a number")
            return float(value)
        if not is_missing(cell) and value in self.numbers:
            return self.numbers[value]
        if is_hidden(cell):
            raise ValueError("has no label")
        known = ", ".join(map(str, list(self.numbers)[:10])) + (", ..." if len(self.numbers) > 10 else "")
        raise ValueError(f"label {cell!r} is not one of {known}")


def is_missing(cell: Any) -> bool:
    """Return whether a cell is None, blank or NaN."""
    return (
        cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell))
    )


def is_hidden(cell: Any) -> bool:
    """Return whether a cell marks a withheld label, as in the test splits of GLUE: empty, or -1."""
    return is_missing(cell) or cell in (-1, "-1")


def plain(cell: Any) -> Any:
    """Convert a cell to the number it denotes, whole ones as int; else to its text without surrounding spaces.

    Raises:
        ValueError: for lists, dicts and bytes.
    """
    if isinstance(cell, list | dict | tuple | bytes):
        raise ValueError(f"{str(cell)[:60]} is no label: a row has one class or one number")
    if isinstance(cell, str):
        cell = cell.strip()
        try:
            value = float(cell)
        except ValueError:
            return cell
        cell = value if math.isfinite(value) else cell  # a class may be called nan
    return int(cell) if isinstance(cell, float) and cell.is_integer() else cell


def written(cell: Any) -> str:
    """Convert a cell to the name of a class."""
    return str(plain(cell)) if not isinstance(cell, str) else cell.strip()


def labels_of(
    cells: Sequence[Any], names: Sequence[str] | None, regression: bool, place: Callable[[int], str]
) -> Labels:
    """Find out how to read labels from those of the training split.

    Args:
        cells: the labels as written in the files; numbers may be text.
        names: names of the classes in the order of their numbers, if the files have them.
        regression: whether the task is known to be a regression; labels with fractions make it one too.
        place: row -> its description in errors.

    Raises:
        UserError: names the row whose label does not fit the others.
    """
    if regression:
        return Labels((), {}, regression=True)
    if names is not None:
        return Labels(tuple(names), {number: number for number in range(len(names))})
    given = []
    for row, cell in enumerate(cells):
        if not is_missing(cell):
            try:
                given.append((row, plain(cell)))
            except ValueError as error:
                raise UserError(f"{place(row)}: {error}") from None
    counts = Counter(value for _, value in given)
    if hides := counts[-1] == 1 and len(counts) > 2:  # a single -1 marks a missing label
        given = [(row, value) for row, value in given if value != -1]
    words = [(row, value) for row, value in given if not isinstance(value, int | float)]
    numbers = [(row, value) for row, value in given if isinstance(value, int | float)]
    fractions = any(isinstance(value, float) for _, value in numbers)
    for row, value in words if 2 * len(numbers) > len(given) else ():
        if fractions or counts[value] == 1:
            raise UserError(f"{place(row)}: label {cells[row]!r} is text where most labels are numbers")
    if words:
        classes = sorted({written(cells[row]) for row, _ in given})
        return checked(Labels(tuple(classes), {name: number for number, name in enumerate(classes)}, words=True), given)
    if fractions:
        return Labels((), {}, regression=True)
    values = sorted({int(value) for _, value in numbers})
    check_whole(numbers, values, counts, place)
    truths = given and isinstance(given[0][1], bool)
    called = ("False", "True") if truths and len(values) == 2 else tuple(map(str, values))
    notes = ("-1 is taken for a class: training rows have it",) if -1 in values and not hides else ()
    return checked(Labels(called, {value: number for number, value in enumerate(values)}, notes=notes), given)


def check_whole(
    numbers: Sequence[tuple[int, Any]], values: Sequence[int], counts: Mapping[Any, int], place: Callable[[int], str]
) -> None:
    """Check that whole numbers are plausible classes.

    Classes may be numbered from 0 or from 1, or be -1, 0 and 1. Any other number, such as a year, must occur in
    several rows.

    Args:
        numbers: (row, label) of every numeric label.
        values: the distinct labels in ascending order.
        counts: label -> number of rows.
        place: row -> its description in errors.

    Raises:
        UserError: names the row of an implausible label.
    """
    first = max(min(values[0], 1), 0) if values else 0
    usual = range(first, first + len(values)) if set(values) - {-1, 0, 1} else (-1, 0, 1)
    for row, value in numbers:
        if value not in usual and counts[value] == 1:
            raise UserError(
                f"{place(row)}: label {value} is out of range: {len(values)} classes without names are 0 to "
                f"{len(values) - 1} or 1 to {len(values)}, or any numbers with several rows each"
            )


def checked(labels: Labels, given: Sequence[Any]) -> Labels:
    """Return the labels unchanged; raise UserError if there is only one class, or nearly one class per row."""
    count = len(labels.names)
    if count < 2:
        raise UserError(f"the training labels are all the same: {', '.join(labels.names) or '(none)'}")
    if count > MAX_RARE_CLASSES and 2 * count > len(given):
        raise UserError(
            f"--label_column: {count} different labels in {len(given)} rows are no classes; name another column"
        )
    return labels
