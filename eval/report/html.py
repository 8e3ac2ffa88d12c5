"""The report as one file that opens without a network: sortable tables, figures that answer to the pointer.

Each figure is in the page twice: as data for plotly.js, whose script is part of the page, and as a static SVG for print
and for browsers that run no scripts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.report.canvas import Drawing, to_svg
from eval.report.findings import Finding, left_out
from eval.report.interactive import plain
from eval.report.records import Excluded
from eval.report.tables import Table

SIDE_BY_SIDE = ("Pareto", "Formats of all runs", "Sensitivities")
"""headings whose drawings stand side by side, one section for each task and model"""
BESIDE = ": front, formats, sensitivities"
"""end of the heading of such a section"""


def page(
    title: str,
    findings: Sequence[Finding],
    summary: Table,
    every_run: Table,
    pictures: Mapping[str, Sequence[Drawing]],
    excluded: Sequence[Excluded],
) -> str:
    """Return the HTML of the whole report. Every text from a record is escaped.

    Args:
        title: Title of the page.
        findings: What the first panel says.
        summary: One row per configuration.
        every_run: One row per run.
        pictures: Heading -> drawings below it.
        excluded: What the report does not count.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters.update(svg=lambda drawing: Markup(to_svg(drawing)), json=_json)
    interactive = any(drawing.figure for drawings in pictures.values() for drawing in drawings)
    return environment.get_template("report.html.jinja").render(
        title=title,
        findings=findings,
        left_out=left_out(excluded),
        summary=summary,
        every_run=every_run,
        sections=_sections(pictures),
        excluded=excluded,
        side_by_side=BESIDE,
        library=_library() if interactive else None,
    )


def _sections(pictures: Mapping[str, Sequence[Drawing]]) -> dict[str, list[Drawing]]:
    """Heading -> drawings, those of SIDE_BY_SIDE first and brought together by task and model."""
    beside: dict[str, list[Drawing]] = {}
    for heading in SIDE_BY_SIDE:
        for drawing in pictures.get(heading, ()):
            beside.setdefault(drawing.where, []).append(drawing)
    rest = {heading: list(drawings) for heading, drawings in pictures.items() if heading not in SIDE_BY_SIDE}
    return {f"{where}{BESIDE}": own for where, own in beside.items()} | rest


def _json(figure: Mapping[str, Any]) -> Markup:
    """A figure as JSON that cannot end the script element it stands in."""
    text = json.dumps(plain(figure), allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _library() -> Markup:
    """The script of plotly.js."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
