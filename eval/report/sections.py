"""Which pictures a report shows: fronts of all runs, and details of the few runs that get pictures of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from eval.report import plots
from eval.report.architecture import architecture
from eval.report.canvas import Drawing, format_palette
from eval.report.layers import NOT_MEASURED, Sensitivities
from eval.report.pareto import panels
from eval.report.records import Group, Run, evenly_spaced

MAX_ROWS = 40
"""runs in one picture of all formats"""
MAX_MARKED = 4
"""runs in one picture of sensitivities"""

History: TypeAlias = Sequence[Mapping[str, Any]]


def pictures(
    runs: Sequence[Run],
    groups: Sequence[Group],
    shown: Sequence[Run],
    histories: Mapping[Path, History],
    sensitivities: Mapping[Path, Sensitivities] = MappingProxyType({}),
) -> dict[str, list[Drawing]]:
    """The report's pictures by heading; headings without a picture are left out.

    Args:
        runs: All runs.
        groups: The same runs, grouped by configuration.
        shown: The runs that get pictures of their own.
        histories: Run folder -> lines of its history, for those of `shown` that have one.
        sensitivities: Run folder -> measured sensitivities of its layers, where it has them.
    """
    series = sorted({run.series for run in runs})
    palette = format_palette(runs)
    steps = {run.folder: histories.get(run.folder, ()) for run in shown}
    mixed = [run for run in runs if len({tuple(pair) for pair in run.record["assignment"].values()}) > 1]
    measured = [run for run in runs if sensitivities.get(run.folder)]
    sections: dict[str, list[Drawing]] = {
        "Pareto": [plots.pareto(panel, series) for panel in panels(groups)],
        "Formats": [plots.layer_formats(run, palette, sensitivities.get(run.folder, NOT_MEASURED)) for run in shown],
        "Architecture": [drawing for run in shown if (drawing := architecture(run, palette))],
        "Formats of all runs": [
            plots.all_formats(_some(members, MAX_ROWS), side, palette, sensitivities, len(members))
            for members in _alike(mixed, "task", "model")
            if len(members) > 1
            for side in _sides(members)
        ],
        "Sensitivities": [
            plots.sensitivities(kind, _some(members, MAX_MARKED), sensitivities)
            for kind, members in _by_kind(measured, sensitivities)
        ],
        "Policy": [drawing for run in shown if (drawing := plots.policy(run, steps[run.folder]))],
        "Curves": [
            drawing
            for members in _alike([run for run in shown if steps[run.folder]], "task", "model", "cost_type")
            if (drawing := plots.curves(members, [steps[run.folder] for run in members]))
        ],
        "Draws": [drawing for run in shown if (drawing := plots.drawn_assignments(run, steps[run.folder]))],
    }
    return {heading: drawings for heading, drawings in sections.items() if drawings}


def _some(runs: Sequence[Run], most: int) -> list[Run]:
    """At most `most` of the runs: if there are more, the first seed of configurations that are evenly spaced."""
    if len(runs) <= most:
        return list(runs)
    first = list({run.key: run for run in reversed(runs)}.values())[::-1]
    return evenly_spaced(first, most)


def _alike(runs: Sequence[Run], *names: str) -> list[list[Run]]:
    """Runs grouped by the values of `names` in their records."""
    found: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.record[name] for name in names), []).append(run)
    return list(found.values())


def _by_kind(runs: Sequence[Run], sensitivities: Mapping[Path, Sensitivities]) -> list[tuple[str, list[Run]]]:
    """(kind of measurement, runs of one task and model that have it), such as ("fisher", [...])."""
    found = []
    for members in _alike(runs, "task", "model"):
        kinds = {run.folder: {title.split()[0] for title in sensitivities[run.folder]} for run in members}
        for kind in sorted(set().union(*kinds.values())):
            found.append((kind, [run for run in members if kind in kinds[run.folder]]))
    return found


def _sides(runs: Sequence[Run]) -> tuple[int, ...]:
    """0 for weights; also 1, for activations, where any of them differ from the weights."""
    return (0, 1) if any(w != a for run in runs for w, a in run.record["assignment"].values()) else (0,)
