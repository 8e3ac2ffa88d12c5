"""The report as one page that needs no network: tables that sort, pictures in the page's own colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.report.canvas import Drawing, to_svg
from eval.report.records import Excluded
from eval.report.tables import Table


def page(
    title: str,
    summary: Table,
    every_run: Table,
    pictures: Mapping[str, Sequence[Drawing]],
    excluded: Sequence[Excluded],
) -> str:
    """HTML of the whole report; `pictures`: heading -> what stands below it. Every text from a record is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    sections = {
        heading: [(drawing, Markup(to_svg(drawing))) for drawing in drawings] for heading, drawings in pictures.items()
    }
    return environment.get_template("report.html.jinja").render(
        title=title, summary=summary, every_run=every_run, sections=sections, excluded=excluded
    )
