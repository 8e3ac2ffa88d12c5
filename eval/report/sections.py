"""Which pictures a report shows: fronts of all runs, and the course of those few that get pictures of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from eval.report import plots
from eval.report.canvas import Drawing, format_palette
from eval.report.pareto import panels
from eval.report.records import Group, Run

MAX_ROWS = 40
"""runs in one picture of all formats"""


History: TypeAlias = Sequence[Mapping[str, Any]]


def pictures(
    runs: Sequence[Run], groups: Sequence[Group], shown: Sequence[Run], told: Mapping[Path, History]
) -> dict[str, list[Drawing]]:
    """Heading -> drawings; `shown`: runs with pictures of their own, `told`: folder -> its history where it has one."""
    methods = sorted({run.record["method"] for run in runs})
    palette = format_palette(runs)
    histories = {run.folder: told.get(run.folder, ()) for run in shown}
    mixed = [run for run in runs if len({tuple(pair) for pair in run.record["assignment"].values()}) > 1]
    sections: dict[str, list[Drawing]] = {
        "Pareto": [plots.pareto(panel, methods) for panel in panels(groups)],
        "Formats": [plots.layer_formats(run, palette) for run in shown],
        "Formats of all runs": [
            plots.all_formats(members[:MAX_ROWS], side, palette)
            for members in _alike(mixed, "task", "model")
            if len(members) > 1
            for side in _sides(members)
        ],
        "Policy": [drawing for run in shown if (drawing := plots.policy(run, histories[run.folder]))],
        "Curves": [
            drawing
            for members in _alike([run for run in shown if histories[run.folder]], "task", "model", "cost_type")
            if (drawing := plots.curves(members, [histories[run.folder] for run in members]))
        ],
        "Draws": [drawing for run in shown if (drawing := plots.drawn_assignments(run, histories[run.folder]))],
    }
    return {heading: drawings for heading, drawings in sections.items() if drawings}


def _alike(runs: Sequence[Run], *names: str) -> list[list[Run]]:
    """Runs together whose records are the same in `names`."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.record[name] for name in names), []).append(run)
    return list(found.values())


def _sides(runs: Sequence[Run]) -> tuple[int, ...]:
    """0 weights; also 1, activations, where any of them differ from the weights."""
    return (0, 1) if any(w != a for run in runs for w, a in run.record["assignment"].values()) else (0,)
