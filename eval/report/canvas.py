"""Size, colours and markers that all figures of a report share, and how they become PNG files or SVG elements.

The colours are safe for colour-blind readers (Okabe and Ito) and never the only cue: methods also have markers, formats
a legend.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import FuncFormatter, NullFormatter

from eval.report.records import Run, sort_formats
from quant.formats import parse_format

Canvas: TypeAlias = Figure | SubFigure
INK, GRID, PAPER = "#1f2429", "#d5dae0", "#fefefd"
"""Colours of text, grid lines and background. The page replaces them with those of its theme."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d46", "#7f7f7f")
MARKERS = "os^DvPX*<>d"
"""One marker per method. 11 markers and 8 colours: a combination repeats only after 88 methods."""
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++")
STYLE: dict[Any, Any] = {
    "font.size": 8.5,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "legend.fontsize": 7.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "figure.constrained_layout.w_pad": 0.08,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with two dollar signs is not a formula
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
}
WIDTH = 4.5
"""Width of a figure in inches. At 390 pixels its text is still legible without zooming."""


@dataclass(frozen=True)
class Drawing:
    """A figure of the report: how to draw it as a static picture, and its interactive counterpart."""

    title: str
    caption: str
    size: tuple[float, float]
    """Width and height in inches."""
    draw: Callable[[Canvas], None]
    where: str = ""
    """Task and model that it shows."""
    figure: Callable[[], Mapping[str, Any]] | None = None
    """Makes the interactive counterpart, as plotly.js takes it; None if there is none."""


def write_png(drawings: Sequence[Drawing], path: Path) -> None:
    """Write all `drawings` into one image, in as many columns as make it about square."""
    columns = min(len(drawings), max(1, round(math.sqrt(sum(d.size[1] for d in drawings) / WIDTH))), 4)
    rows = [drawings[start : start + columns] for start in range(0, len(drawings), columns)]
    heights = [max(drawing.size[1] for drawing in row) + 0.45 for row in rows]
    widths = [max(row[c].size[0] for row in rows if c < len(row)) for c in range(columns)]
    with rc_context(STYLE):
        figure = Figure(figsize=(sum(widths), sum(heights)), layout="constrained", dpi=150)
        cells = figure.subfigures(len(rows), columns, squeeze=False, height_ratios=heights, width_ratios=widths)
        for row, line in zip(rows, cells, strict=True):
            for drawing, cell in zip(row, line, strict=False):
                title = textwrap.fill(drawing.title, int(12 * drawing.size[0]))
                cell.suptitle(title, x=0.02, ha="left", fontsize=9.5, fontweight="bold")
                drawing.draw(cell)
        figure.savefig(path)


def to_svg(drawing: Drawing) -> str:
    """Render a drawing as an `<svg>` element that takes its text and grid colours from the page."""
    stream = io.StringIO()
    with rc_context({**STYLE, "figure.facecolor": "none", "savefig.facecolor": "none", "svg.hashsalt": drawing.title}):
        figure = Figure(figsize=drawing.size, layout="constrained")
        drawing.draw(figure)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = stream.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")


@dataclass(frozen=True)
class FormatStyle:
    """Appearance of a format in every figure of a report."""

    bits: float
    colour: str
    hatch: str


def format_palette(runs: Sequence[Run]) -> dict[str, FormatStyle]:
    """Assign each format a colour, from few bits (dark) to many (light), and a hatch where bits are equal."""
    names = sort_formats(
        name
        for run in runs
        for group in (*run.record["assignment"].values(), run.record["search_space"] or ())
        for name in group
    )
    bits = [parse_format(name).bits for name in names]
    shades = colormaps["viridis"](np.linspace(0.1, 0.95, len(names)))
    return {
        name: FormatStyle(bits[i], to_hex(shades[i]), HATCHES[bits[:i].count(bits[i]) % len(HATCHES)])
        for i, name in enumerate(names)
    }


def plain_log_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, since STYLE leaves mathematical text unparsed."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def series_style(series: str, every: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a series, by its position in `every`."""
    place = list(every).index(series)
    return COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
