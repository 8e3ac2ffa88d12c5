"""Labels as they stand in files -> class numbers from 0, or values for regression."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quant.errors import UserError

MANY = 20
"""most classes that may stand in about one row each: more such labels are something else, texts or numbers of rows"""


@dataclass(frozen=True)
class Labels:
    """How the labels of a task are read: class names with what stands for them, or any number for regression."""

    names: tuple[str, ...]
    numbers: Mapping[Any, int]
    """cell -> class number; empty for regression"""
    regression: bool = False
    words: bool = False
    """whether cells are the classes' names as they are written, however much one of them looks like a number"""
    notes: tuple[str, ...] = ()

    def number(self, cell: Any) -> int | float:
        """ValueError, saying why, for a cell that is no label."""
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
    """Whether a cell holds nothing."""
    return (
        cell is None or (isinstance(cell, str) and not cell.strip()) or (isinstance(cell, float) and math.isnan(cell))
    )


def is_hidden(cell: Any) -> bool:
    """Whether a cell is how data sets write that a label is not given: nothing, or -1."""
    return is_missing(cell) or cell in (-1, "-1")


def plain(cell: Any) -> Any:
    """The number that a cell is written as, whole numbers as int; other text without spaces around it.

    ValueError for lists and the like: a row has one label.
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
    """A cell as the name of a class."""
    return str(plain(cell)) if not isinstance(cell, str) else cell.strip()


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
    given = []
    for row, cell in enumerate(cells):
        if not is_missing(cell):
            try:
                given.append((row, plain(cell)))
            except ValueError as error:
                raise UserError(f"{place(row)}: {error}") from None
    counts = Counter(value for _, value in given)
    if hides := counts[-1] == 1 and len(counts) > 2:  # a row without a label among those of several classes
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
    """UserError for a whole number that is no class: out of the range of the others, and in one row alone.

    Classes are numbered from 0 or 1, or are -1, 0 and 1; any others (years, say) stand in several rows each.
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
    """UserError where there is nothing to tell apart, or hardly two of the given labels are the same."""
    count = len(labels.names)
    if count < 2:
        raise UserError(f"the training labels are all the same: {', '.join(labels.names) or '(none)'}")
    if count > MANY and 2 * count > len(given):
        raise UserError(
            f"--label_column: {count} different labels in {len(given)} rows are no classes; name another column"
        )
    return labels
