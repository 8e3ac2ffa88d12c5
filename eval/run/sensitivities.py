"""The table of sensitivities in a run's folder, which a search writes and `python -m eval.sensitivity` extends."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from trainer.training.atomic import write_atomically

if TYPE_CHECKING:  # torch takes seconds to import
    from policy.solve import Table
    from policy.space import SearchSpace

FILE = "sensitivity.csv"
Columns: TypeAlias = dict[str, list[tuple[float, float | None]]]
"""title -> per decision (value, standard error or spread; None without one)"""


def choice_names(space: SearchSpace) -> list[str]:
    """Names of the choices: 'int4', or 'int4/int8' if weights and activations differ; other decisions' in brackets."""
    titles = []
    for pairs in zip(*(decision.choices for decision in space.decisions), strict=True):
        first, *others = dict.fromkeys(weight.name if weight == act else f"{weight}/{act}" for weight, act in pairs)
        titles.append(first + (f" ({', '.join(others)})" if others else ""))
    return titles


def write_csv(names: Sequence[str], columns: Columns, path: Path) -> None:
    """Write one row per decision: its name, then each column and its error; a file is complete or absent."""

    def write(temporary: str) -> None:
        with open(temporary, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["decision", *(f"{title}{part}" for title in columns for part in ("", " error"))])
            for row, name in enumerate(names):
                writer.writerow([name, *(part for values in columns.values() for part in values[row])])

    write_atomically(path, write)


def keep_sensitivities(folder: Path, space: SearchSpace, kind: str, table: Table) -> None:
    """Write what a search has measured into its folder, for reports. A table that is there stays: it may hold more.

    Args:
        folder: Folder of the run.
        space: The search space.
        kind: How it was measured, such as "measured" or "fisher".
        table: Sensitivities, (decisions, choices).
    """
    if not (folder / FILE).exists():
        titles = (f"{kind} {name}" for name in choice_names(space))
        columns: Columns = {
            title: [(float(value), None) for value in own] for title, own in zip(titles, table.T, strict=True)
        }
        write_csv([decision.name for decision in space.decisions], columns, folder / FILE)
